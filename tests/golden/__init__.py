"""Parity with reference code: `python -m tests.golden DIR` runs every case it finds in a folder."""
