"""The extras of the installation: which one installs a package, and a one-line error for a missing package.

The base installation is the runtime. Everything else is imported where it is used; pyproject.toml lists what each extra
installs, and a test compares that list with this one.
"""

from __future__ import annotations

import importlib.util

from stagevar.errors import UsageError

DISTRIBUTION = "stagevar-tune"
#: Packages by the names that imports use, under the extra that installs them. One that several install stands where most
#: users meet it first.
PACKAGES: dict[str, tuple[str, ...]] = {
    "tune": ("optuna", "scipy", "open_clip", "torchvision", "pandas", "rich", "matplotlib", "sklearn"),
    "ray": ("ray",),
    "infinity": ("transformers", "huggingface_hub", "sentencepiece"),
    "metrics": ("torchmetrics", "torch_fidelity", "lpips"),
    "serve": ("fastapi", "uvicorn", "prometheus_client"),
}


class MissingExtra(UsageError):
    """A package is not installed; the message names the extra that installs it. Exit code 2."""


def extra_of(package: str) -> str | None:
    """The extra that installs a package, given by the name that imports use; None if no extra does."""
    root = package.partition(".")[0]
    return next((extra for extra, packages in PACKAGES.items() if root in packages), None)


def install_command(extra: str) -> str:
    """The command that adds an extra."""
    return f"pip install '{DISTRIBUTION}[{extra}]'"


def is_installed(package: str) -> bool:
    """Whether a package can be found, given by the name that imports use; imports nothing."""
    try:
        return importlib.util.find_spec(package) is not None
    except ImportError:
        return False
    except ValueError:  # loaded already, by something that leaves no trace of where it came from
        return True


def missing(package: str, purpose: str) -> MissingExtra:
    """The error for a package that is not installed; `purpose` is what needs it, such as "stagevar analyze"."""
    extra = extra_of(package)
    return MissingExtra(f"{purpose} needs {package}: {install_command(extra) if extra else f'pip install {package}'}")


def require(purpose: str, *packages: str) -> None:
    """Raises MissingExtra for the first of the packages that is not installed."""
    for package in packages:
        if not is_installed(package):
            raise missing(package, purpose)
