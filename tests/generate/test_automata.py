"""Several automata as one: the joined tables allow and lead where each automaton does."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ofakern.generate import (
    ChoiceTokens,
    FixedTokens,
    FreeTokens,
    RangeTokens,
    RepeatTokens,
    TokenAutomaton,
    compile_target,
)
from ofakern.generate.search.automata import Automata

V = 50


def automaton(*elements: Any) -> TokenAutomaton:
    return compile_target(elements, eos=2, vocabulary_size=V)


def some() -> list[TokenAutomaton]:
    random = np.random.default_rng(0)
    answers = tuple(tuple(random.integers(4, V, 3).tolist()) for _ in range(40))
    return [
        automaton(RangeTokens(30, 38, 4)),
        automaton(ChoiceTokens(answers)),
        automaton(FixedTokens((8, 9)), RepeatTokens((RangeTokens(30, 38, 4), FreeTokens(4, 30)))),
        automaton(FreeTokens(4, 20), ChoiceTokens(((21,), (22, 23)))),
    ]


def test_joined_tables_lead_where_their_parts_do() -> None:
    known = some()
    joined = Automata()
    numbers = [joined.number(one) for one in known]
    assert numbers == [0, 1, 2, 3] and joined.number(known[2]) == 2
    tables = joined.tables
    for number, one in enumerate(known):
        states = len(one.renormalise)
        pairs = torch.cartesian_prod(torch.arange(states), torch.arange(V))
        allowed = one.allowed(torch.arange(states))[pairs[:, 0], pairs[:, 1]]
        base = int(joined.base[number])
        found = joined.advance(pairs[:, 0].numpy() + base, pairs[:, 1].numpy())
        expected = one.advance(pairs[:, 0], pairs[:, 1]).numpy() + base
        assert (found[allowed] == expected[allowed]).all()
        assert (found[~allowed] == len(tables.free) - 1).all(), "what is not allowed leads nowhere"
        ranges = one.tables.range_first.diff() > 0
        few = one.allowed(torch.arange(states)).sum(1) <= V // 4
        for state in range(states):
            expected_narrow = bool(one.renormalise[state] & few[state] & ~ranges[state])
            assert joined.narrow(np.array([state + base])) == expected_narrow
    start = int(joined.base[1]) + known[1].start
    assert not joined.narrow(np.array([start])), "many tokens: the whole product is cheaper"
    assert not joined.narrow(np.array([joined.base[1], joined.base[0]]))


def test_automata_that_are_not_used_are_forgotten() -> None:
    joined, used = Automata(), some()
    for one in used:
        joined.number(one)
    assert joined.forget(np.array([1, -1])) is None
    for count in range(5, 75):
        joined.number(automaton(RangeTokens(4, 9, count)))
    renumbered = joined.forget(np.array([3, -1, 1, 3]))
    assert renumbered is not None and renumbered[[1, 3]].tolist() == [0, 1]
    assert joined.number(used[1]) == 0 and joined.number(used[3]) == 1
    assert len(joined.tables.free) == len(used[1].free) + len(used[3].free)
