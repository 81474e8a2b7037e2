"""The plan of the house, as data for tests/repository/test_house.py. `python -m tests.house_figures` prints where it stands.

The lists of what is too large or runs in a circle may only shrink: whoever mends an entry removes it here.
"""

#: The rooms (folders) that each room may import. Modules beside the folders are the room of the package itself.
ARROWS = {
    "stagevar": set(),
    "stagevar.accelerators": {"stagevar", "stagevar.models", "stagevar.schedule", "stagevar.tensors"},
    "stagevar.analysis": {
        "stagevar",
        "stagevar.accelerators",
        "stagevar.models",
        "stagevar.prompts",
        "stagevar.sampling",
        "stagevar.schedule",
    },
    "stagevar.cli": {
        "stagevar",
        "stagevar.analysis",
        "stagevar.models",
        "stagevar.profile",
        "stagevar.prompts",
        "stagevar.sampling",
        "stagevar.schedule",
        "stagevar.serving",
        "stagevar.tensors",
    },
    "stagevar.engine": {"stagevar", "stagevar.models", "stagevar.schedule", "stagevar.tensors"},
    "stagevar.models": {"stagevar", "stagevar.prompts", "stagevar.schedule", "stagevar.tensors"},
    "stagevar.profile": {
        "stagevar",
        "stagevar.engine",
        "stagevar.models",
        "stagevar.prompts",
        "stagevar.sampling",
        "stagevar.schedule",
    },
    "stagevar.prompts": {"stagevar"},
    "stagevar.sampling": {
        "stagevar",
        "stagevar.accelerators",
        "stagevar.engine",
        "stagevar.models",
        "stagevar.prompts",
        "stagevar.schedule",
        "stagevar.tensors",
    },
    "stagevar.schedule": {"stagevar"},
    "stagevar.serving": {
        "stagevar",
        "stagevar.engine",
        "stagevar.models",
        "stagevar.profile",
        "stagevar.sampling",
        "stagevar.schedule",
    },
    "stagevar.tensors": {"stagevar", "stagevar.schedule"},
    "stagevar.testing": {
        "stagevar",
        "stagevar.accelerators",
        "stagevar.analysis",
        "stagevar.models",
        "stagevar.sampling",
        "stagevar.schedule",
        "stagevar.tensors",
    },
    "tuner": {"tuner.cli", "tuner.metrics", "tuner.report", "tuner.results"},
    "tuner.cli": {
        "tuner.cluster",
        "tuner.config",
        "tuner.evaluation",
        "tuner.metrics",
        "tuner.report",
        "tuner.results",
        "tuner.statistics",
        "tuner.study",
    },
    "tuner.cluster": {"tuner.evaluation", "tuner.report", "tuner.results"},
    "tuner.config": {"tuner.metrics"},
    "tuner.evalkit": {"tuner.metrics"},
    "tuner.evaluation": {"tuner.config", "tuner.metrics"},
    "tuner.metrics": set(),
    "tuner.proposals": {"tuner.config", "tuner.results"},
    "tuner.report": {"tuner.config", "tuner.results"},
    "tuner.results": {"tuner.config"},
    "tuner.statistics": {"tuner.config", "tuner.metrics", "tuner.results"},
    "tuner.testing": {"tuner.config", "tuner.evaluation", "tuner.metrics"},
    "tuner.study": {
        "tuner.config",
        "tuner.evaluation",
        "tuner.metrics",
        "tuner.proposals",
        "tuner.results",
        "tuner.statistics",
    },
}

#: Modules that import each other, also inside functions.
CIRCLES: set[tuple[str, ...]] = set()

#: Files above 400 lines.
LONG_FILES: set[str] = set()

#: Functions above 80 lines.
LONG_FUNCTIONS: set[str] = set()

#: `dict[str, Any]` and `Mapping[str, Any]` in both packages, at most.
OPEN_DICTIONARIES = 35

#: Reaches of tests, benchmarks and training into names that begin with an underscore, at most.
PRIVATE_REACHES = 128
