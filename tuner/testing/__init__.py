"""Contracts for authors of metrics and executors: test classes to inherit. They are the only part that needs pytest.

# test_mine.py
from tuner.testing.metrics import MetricContract

class TestMine(MetricContract):
    def build(self):
        return Mine()
"""
