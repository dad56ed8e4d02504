"""What differs under `make sanitize`. A shorter run of the same tests (every case takes long): OFAKERN_TEST_SHORT=1.

Of a test's parameter sets those stay that together hold every pair of values (instruction set and dtype, dtype and
case, ...) of any two parameters; of drawn cases a tenth is drawn. No test is left out.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

SHORT = "OFAKERN_TEST_SHORT" in os.environ

#: AddressSanitizer keeps memory of its own beside every allocation and holds on to what is freed: resident memory then
#: says nothing. Tests that look at it check all else there.
SANITIZED = "libasan" in os.environ.get("LD_PRELOAD", "")


def examples(count: int) -> int:
    """How many cases hypothesis draws where a whole run draws `count`."""
    return max(3, count // 10) if SHORT else count


def pairwise(sets: Sequence[Mapping[str, Any]]) -> list[int]:
    """Which of the parameter sets of one test hold every pair of values, the next being always the one with most new
    pairs. Values are told apart by identity, as the sets of one `parametrize` share them."""
    pairs = [_pairs(chosen) for chosen in sets]
    missing = set().union(*pairs)
    kept = []
    while missing:
        best = max(range(len(sets)), key=lambda n: len(pairs[n] & missing))
        kept.append(best)
        missing -= pairs[best]
    return sorted(kept)


def _pairs(chosen: Mapping[str, Any]) -> set[tuple[Any, ...]]:
    values = sorted((name, id(value)) for name, value in chosen.items())
    return set(combinations(values, min(2, len(values))))
