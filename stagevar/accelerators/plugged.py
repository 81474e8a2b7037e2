"""Accelerators of other packages, by the names that the packages give them (stagevar.plugins).

Such an accelerator carries out `Plugged` steps: it is called at the sublayers (attn, cross, mlp) of the schedule's
layers, and finds the outputs of the step's cache scale, which ran in full, in `context.state`.
"""

from __future__ import annotations

import inspect

from stagevar import plugins
from stagevar.accelerators.base import Accelerator
from stagevar.schedule import ACCELERATORS, PLUGGED_ACCELERATORS, accelerator_names


def plugged(name: str) -> Accelerator:
    """An accelerator, made from the class that a package offers.

    Raises:
        PluginError: for a name that no package offers, or a plug-in that cannot be used.
    """
    plugin = plugins.find(PLUGGED_ACCELERATORS, name, ACCELERATORS)
    if plugin is None:
        raise plugins.PluginError(
            f"no installed package offers the accelerator {name}; known: {', '.join(accelerator_names())}"
        )
    cls = plugin.load()
    if not (inspect.isclass(cls) and issubclass(cls, Accelerator)) or inspect.isabstract(cls):
        raise plugin.wrong("must be a class that inherits stagevar.accelerators.base.Accelerator and has `around`")
    if getattr(cls, "name", None) != plugin.name:
        raise plugin.wrong(f"is named {getattr(cls, 'name', None)!r}; both names must be the same")
    try:
        accelerator: Accelerator = cls()
    except TypeError as error:
        raise plugin.wrong(f"must be made without arguments: {error}") from error
    return accelerator
