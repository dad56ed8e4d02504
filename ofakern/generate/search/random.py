"""Random numbers that are functions of a counter: a draw depends on its request alone, never on the batch."""

from __future__ import annotations

import numpy as np

from ofakern.generate.search.table import Array

__all__ = ["uniforms"]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def uniforms(seed: Array, sequence: Array, step: Array) -> Array:
    """float32 [rows] in [0, 1): of seed (uint64), number of the answer and step (integers), one each per row.

    The three go one after the other through splitmix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number
    generators", 2014), whose 24 highest bits become the number.
    """
    mixed = _mixed(seed.astype(np.uint64))
    mixed = _mixed(mixed ^ sequence.astype(np.uint64))
    mixed = _mixed(mixed ^ step.astype(np.uint64))
    return ((mixed >> np.uint64(40)) * 2.0**-24).astype(np.float32)


def _mixed(x: Array) -> Array:
    z = x + _GOLDEN
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: Array = z ^ (z >> np.uint64(31))
    return mixed
