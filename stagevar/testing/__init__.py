"""Contracts for authors of accelerators, models and similarities: test classes to inherit. They need pytest, nothing else does.

# test_mine.py
from stagevar.testing.accelerators import PluggedContract

class TestMine(PluggedContract):
    def plugged(self):
        return Mine()
"""
