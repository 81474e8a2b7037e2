"""Contracts for authors of metrics and executors: test classes to inherit. They need pytest, nothing else does.

# test_mine.py
from tuner.testing.metrics import MetricContract

class TestMine(MetricContract):
    def build(self):
        return Mine()
"""
