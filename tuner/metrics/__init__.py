"""Image quality: metrics by name, for the search-space YAML (`quality: {clip_score: 0.1, geneval: 1.0}`) and for
`stagevar-eval`. Importing this package loads no model library; `create` imports the one module that a metric needs."""

from tuner.metrics.base import Metric, Prompt, SetMetric, prompt_text
from tuner.metrics.registry import METRIC_NAMES, CompositeQuality, create, create_composite

__all__ = [
    "METRIC_NAMES",
    "CompositeQuality",
    "Metric",
    "Prompt",
    "SetMetric",
    "create",
    "create_composite",
    "prompt_text",
]
