"""The shorter run: every pair of parameter values is there, and nothing else is left out."""

from __future__ import annotations

from itertools import combinations, product

import short


def test_every_pair_of_values_stays() -> None:
    values = {"isa": ["scalar", "best"], "dtype": ["f32", "bf16", "f16"], "case": [{"n": n} for n in range(4)]}
    sets = [dict(zip(values, chosen, strict=True)) for chosen in product(*values.values())]
    kept = [sets[n] for n in short.pairwise(sets)]
    assert len(kept) <= len(sets) // 2 + 1
    for first, second in combinations(values, 2):
        for a, b in product(values[first], values[second]):
            assert any(chosen[first] is a and chosen[second] is b for chosen in kept), (a, b)


def test_all_values_of_one_parameter_and_tests_without_one_stay() -> None:
    assert short.pairwise([{"isa": isa} for isa in ("scalar", "avx2", "avx512")]) == [0, 1, 2]
    assert short.pairwise([{}]) == [0]
    assert short.pairwise([]) == []
