"""Plug-ins: named objects that other installed packages offer by entry point, looked up by name and imported on use.

A package offers one with a line in its pyproject.toml, such as

    [project.entry-points."stagevar.metrics"]
    brightness = "my_package:Brightness"

and from then on the name works wherever a built-in one does, including in the workers of a cluster. A plug-in that
cannot be loaded is an error only for those who ask for it. A name that this project uses, or that two packages offer,
is refused.

Source: packaging.python.org, "Entry points specification" (facts).
"""

from __future__ import annotations

import functools
import importlib.metadata
import logging
import pkgutil
import sys
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from stagevar.errors import UsageError, first_line
from stagevar.extras import DISTRIBUTION

#: Group of entry points -> what one of its objects is called in messages.
GROUPS = {
    "stagevar.metrics": "metric",
    "stagevar.accelerators": "accelerator",
    "stagevar.models": "model",
    "stagevar.similarities": "similarity",
}

log = logging.getLogger(__name__)


class PluginError(UsageError):
    """A plug-in that cannot be used: it does not load, is not what its group requires, or its name is taken."""


@dataclass(frozen=True)
class Plugin:
    """One object that a package offers.

    Attributes:
        group: one of GROUPS.
        target: "module:object".
        package: its distribution.
        version: of that distribution.
    """

    group: str
    name: str
    target: str
    package: str
    version: str

    @property
    def title(self) -> str:
        """For messages: "metric brightness of my-package 1.0"."""
        return f"{GROUPS[self.group]} {self.name} of {self.package} {self.version}"

    def load(self) -> Any:
        """The object. Raises PluginError, in one line, for anything that its module raises during import."""
        try:
            return pkgutil.resolve_name(self.target)
        except (Exception, SystemExit) as error:
            raise PluginError(
                f"the {self.title} cannot be loaded: {first_line(error)}; fix or uninstall the package"
            ) from error

    def wrong(self, what: str) -> PluginError:
        """The error for an object that loads but is not what its group requires; `what` says what it must be."""
        return PluginError(f"the {self.title} cannot be used: {self.target} {what}")


def offered(group: str, taken: Collection[str] = ()) -> dict[str, Plugin]:
    """The usable plug-ins of a group by name, without importing any; `taken` are the built-in names."""
    clashing = {*taken, *(name for name, plugins in _found(group).items() if len(plugins) > 1)}
    own = {name for name, plugins in _found(group).items() if plugins[0].package == DISTRIBUTION}
    return {name: plugins[0] for name, plugins in _found(group).items() if name in own or name not in clashing}


def refused(group: str, taken: Collection[str] = ()) -> dict[str, str]:
    """Why names of a group are not used, one line each; `taken` are the built-in names."""
    reasons = {}
    for name, plugins in _found(group).items():
        others = [plugin for plugin in plugins if plugin.package != DISTRIBUTION]
        packages = " and ".join(f"{plugin.package} {plugin.version}" for plugin in others)
        what = f"the {GROUPS[group]} {name}"
        if others and (name in taken or len(others) < len(plugins)):
            reasons[name] = f"{what} of {packages} is ignored: {name} is built in; it needs another name"
        elif len(others) > 1:
            reasons[name] = f"{what} is offered by {packages}; uninstall one of them"
    return reasons


def find(group: str, name: str, taken: Collection[str] = ()) -> Plugin | None:
    """The plug-in with this name, or None. Raises PluginError for a name that two packages offer."""
    plugin = offered(group, taken).get(name)
    if plugin is None and name not in taken and (reason := refused(group, taken).get(name)):
        raise PluginError(reason)
    return plugin


def versions(group: str, names: Collection[str], taken: Collection[str]) -> dict[str, str]:
    """The packages, with versions, of the plug-ins among these names."""
    return {plugin.package: plugin.version for name, plugin in offered(group, taken).items() if name in names}


def _found(group: str) -> dict[str, tuple[Plugin, ...]]:
    return _scan(tuple(sys.path)).get(group, {})


@functools.cache
def _scan(path: tuple[str, ...]) -> dict[str, dict[str, tuple[Plugin, ...]]]:
    """Everything that the packages on a search path offer, by group and name; this project's own comes first."""
    found: dict[str, dict[str, tuple[Plugin, ...]]] = {}
    for point in (one for group in GROUPS for one in importlib.metadata.entry_points(group=group)):
        if point.dist is None:
            continue
        plugin = Plugin(point.group, point.name, point.value, point.dist.name, point.dist.version)
        of_name = found.setdefault(point.group, {}).get(point.name, ())
        if plugin not in of_name:
            plugins = sorted((*of_name, plugin), key=lambda one: (one.package != DISTRIBUTION, one.package))
            found[point.group][point.name] = tuple(plugins)
    log.debug("plug-ins: %s", {group: sorted(names) for group, names in found.items()})
    return found
