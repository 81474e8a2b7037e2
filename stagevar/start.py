"""Entry point of `stagevar`: Ctrl-C is one line from the first moment, even while the command's modules load."""

from stagevar.console import start


def main() -> int:
    """Runs `stagevar`. Exit codes as in stagevar.errors."""
    return start("stagevar", "stagevar.cli.command")
