"""Entry points of `stagevar-tune` and `stagevar-eval`: Ctrl-C prints one line, even while their modules load."""

from stagevar.console import start


def tune() -> int:
    """Runs `stagevar-tune`. Exit codes as in stagevar.errors."""
    return start("stagevar-tune", "tuner.cli")


def evaluate() -> int:
    """Runs `stagevar-eval`. Exit codes as in stagevar.errors."""
    return start("stagevar-eval", "tuner.evalkit.command")
