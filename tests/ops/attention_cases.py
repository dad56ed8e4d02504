"""Small cases that together hold every feature of attention, for kernels that run slowly where they are tested."""

from __future__ import annotations

from typing import Any

EVERYTHING: dict[str, Any] = {
    "q_lengths": (19, 0, 70),
    "heads": 2,
    "key_heads": 1,
    "width": 16,
    "value_width": 24,
    "pos_width": 8,
    "terms": 2,
    "mask": "causal",
    "dropout_p": 0.3,
    "empty_rows": True,
    "strides": "fused",
}
CASES: dict[str, dict[str, Any]] = {
    "plain": {"q_lengths": (17, 0, 34), "terms": 0, "head_scale": False, "lse_gradient": False},
    "everything": EVERYTHING,
    "one term, window": {"q_lengths": (40, 1, 21), "heads": 1, "mask": "window", "strides": "transposed"},
    "prefix": {"q_lengths": (33,), "terms": 1, "mask": "prefix", "pos_width": 16, "heads": 1},
    "cross": {"q_lengths": (5, 37), "k_lengths": (41, 3), "heads": 2, "key_heads": 2, "terms": 1},
    "any interval, dropout": {"q_lengths": (20, 17), "heads": 1, "mask": "random", "dropout_p": 0.5, "terms": 1},
    "shared positions": {"q_lengths": (9, 20), "terms": 1, "pos_width": 8, "heads": 1, "sets": ((0, 0), (0, 0))},
    "wide": {"q_lengths": (18,), "heads": 1, "width": 8, "value_width": 256, "pos_width": 72},
    "no tokens": {"q_lengths": ()},
    "no keys": {"q_lengths": (3,), "k_lengths": (0,), "terms": 1},
    "no queries": {"q_lengths": (0,), "k_lengths": (5,), "terms": 1},
}
