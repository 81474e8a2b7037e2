"""Whole numbers of any sign and size as seeds of generators that take fewer."""

from __future__ import annotations


def non_negative(seed: int) -> int:
    """The seed itself from 0 on; for a negative one, a unique number beyond 2^64, for NumPy's generators."""
    return seed if seed >= 0 else 2**64 - seed


def in_32_bits(seed: int) -> int:
    """The seed itself if it fits 32 bits, else its remainder, for generators of the Mersenne twister."""
    return seed % 2**32
