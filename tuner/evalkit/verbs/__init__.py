"""The verbs of `stagevar-eval`, one file each: `add` states the options, `run` does the work."""
