"""Measuring schedules on a model: quality per prompt, latency, and the costs of single steps."""
