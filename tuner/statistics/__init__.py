"""Bounds on paired differences, when to look at them, and what can be proved with how many prompts."""
