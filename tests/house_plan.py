"""The plan of the house, as data for tests/test_house.py. `python -m tests.house_figures` prints where it stands.

The lists of what is too large or runs in a circle may only shrink: whoever mends an entry removes it here.
"""

#: The rooms (folders) that each room may import. Modules beside the folders are the room of the package itself.
ARROWS = {
    "stagevar": {"stagevar.models", "stagevar.nano", "stagevar.accelerators", "stagevar.engine"},
    "stagevar.accelerators": {"stagevar", "stagevar.models"},
    "stagevar.engine": {"stagevar", "stagevar.models"},
    "stagevar.models": {"stagevar"},
    "stagevar.nano": {"stagevar", "stagevar.models"},
    "tuner": {"tuner.executors", "tuner.metrics", "tuner.config"},
    "tuner.config": {"tuner", "tuner.metrics"},
    "tuner.executors": {"tuner"},
    "tuner.metrics": set(),
}

#: Modules that import each other, also inside functions.
CIRCLES = {
    ("stagevar.analysis", "stagevar.analysis_plots"),
    ("stagevar.models.loading", "stagevar.models.memory", "stagevar.models.weights"),
    ("stagevar.pipeline", "stagevar.profile"),
    ("stagevar.published_settings", "stagevar.schedule"),
    ("tuner.cli", "tuner.sweep"),
}

#: Files above 400 lines.
LONG_FILES = {
    "stagevar/analysis.py",
    "stagevar/cli.py",
    "stagevar/engine/graph.py",
    "stagevar/models/infinity.py",
    "stagevar/models/registry.py",
    "stagevar/models/weights.py",
    "stagevar/nano/scenes.py",
    "stagevar/sampler.py",
    "stagevar/schedule.py",
    "tuner/cli.py",
    "tuner/eval_cli.py",
    "tuner/evaluate.py",
    "tuner/executors/ray.py",
    "tuner/report_sections.py",
    "tuner/search.py",
    "tuner/space.py",
    "tuner/study.py",
}

#: Functions above 80 lines.
LONG_FUNCTIONS = {
    "stagevar/analysis.py::analyze",
    "tuner/eval_cli.py::_build_parser",
    "tuner/report_charts.py::scatter",
}

#: `dict[str, Any]` and `Mapping[str, Any]` in both packages, at most.
OPEN_DICTIONARIES = 232
