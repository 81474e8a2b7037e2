"""`stagevar-tune`: one file per verb. No torch, optuna or open_clip is imported before all input is checked."""

from tuner.cli.command import main

__all__ = ["main"]
