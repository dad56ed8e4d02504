"""The compiled automaton against a plain interpreter of the elements, on drawn targets; its file form; large sets."""

from __future__ import annotations

import itertools
import time
import tracemalloc
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ofakern.errors import OfakernValueError
from ofakern.generate import (
    ChoiceTokens,
    FixedTokens,
    FreeTokens,
    RangeTokens,
    RepeatTokens,
    TargetElement,
    TokenAutomaton,
    compile_target,
)
from ofakern.text.trie import TokenSequences, TokenTrie

EOS, VOCABULARY = 2, 24


class Interpreter:
    """What may follow a prefix, by walking over the elements with sets of places: slow and obvious.

    A place is (path of element numbers, how far inside); an explicit token shadows the same token of a range, and an
    earlier element's explicit token that of a later one, as the automaton promises.
    """

    def __init__(self, elements: Sequence[TargetElement]) -> None:
        self.elements = list(elements)

    def allowed(self, prefix: Sequence[int]) -> set[int]:
        return {t for t in range(VOCABULARY) if self._accepts_prefix((*prefix, t))}

    def _accepts_prefix(self, tokens: tuple[int, ...]) -> bool:
        return any(True for _ in self._match(tuple(self.elements), tokens))

    def _match(self, elements: tuple[TargetElement, ...], tokens: tuple[int, ...]) -> Iterator[None]:
        """One item for each way in which `tokens` begins a target made of `elements` and the end."""
        if not tokens:
            yield None
            return
        if not elements:
            if tokens == (EOS,):
                yield None
            return
        head, rest = elements[0], elements[1:]
        if isinstance(head, FixedTokens):
            n = min(len(head.tokens), len(tokens))
            if tokens[:n] == head.tokens[:n]:
                yield from self._match(rest, tokens[n:])
        elif isinstance(head, ChoiceTokens):
            for sequence in head.sequences:
                n = min(len(sequence), len(tokens))
                if tokens[:n] == tuple(sequence[:n]):
                    yield from self._match(rest, tokens[n:])
        elif isinstance(head, RangeTokens):
            n = min(head.count, len(tokens))
            if all(head.lo <= t < head.hi for t in tokens[:n]):
                yield from self._match(rest, tokens[n:])
        elif isinstance(head, FreeTokens):
            n = 0
            while n <= len(tokens):
                yield from self._match(rest, tokens[n:])
                if n == len(tokens) or not head.lo <= tokens[n] < head.hi:
                    break
                n += 1
        else:
            again = RepeatTokens(head.elements)
            yield from self._match((*head.elements, *rest), tokens)
            if len(tokens) > 1:
                yield from self._match((*head.elements, again, *rest), tokens)


# Parts whose tokens do not overlap, so that shadowing plays no role and every prefix has one reading.
closed_sets = st.lists(st.lists(st.integers(4, 7), min_size=1, max_size=3).map(tuple), min_size=1, max_size=6)
part_makers = [
    st.lists(st.integers(8, 9), min_size=1, max_size=2).map(lambda t: FixedTokens(tuple(t))),
    closed_sets.map(lambda s: ChoiceTokens(tuple(s))),
    st.integers(1, 3).map(lambda n: RangeTokens(10, 13, n)),
    st.just(FreeTokens(14, 17)),
]


@st.composite
def targets(draw: st.DrawFn) -> list[TargetElement]:
    order = draw(st.permutations(range(4)))
    parts: list[TargetElement] = [draw(part_makers[i]) for i in order[: draw(st.integers(1, 4))]]
    if draw(st.booleans()):
        cut = draw(st.integers(0, len(parts) - 1))
        group = tuple(parts[cut:])
        # A group that can be empty, or that ends in what it begins with, has no one reading.
        if not isinstance(group[0], FreeTokens) and not isinstance(group[-1], FreeTokens | ChoiceTokens):
            parts = [*parts[:cut], RepeatTokens(group)]
    return parts


@settings(max_examples=30, deadline=None)
@given(targets(), st.randoms(use_true_random=False))
def test_allowed_equals_an_interpreter(elements: list[TargetElement], random: object) -> None:
    automaton = compile_target(elements, eos=EOS, vocabulary_size=VOCABULARY)
    interpreter = Interpreter(elements)
    state, prefix = torch.tensor([automaton.start]), []
    for _ in range(7):
        mask = automaton.allowed(state)[0]
        allowed = set(mask.nonzero()[:, 0].tolist())
        assert allowed == interpreter.allowed(prefix)
        if not allowed:
            break
        token = random.choice(sorted(allowed))  # type: ignore[attr-defined]
        state = automaton.advance(state, torch.tensor([token]))
        prefix.append(token)
    assert automaton.trace(prefix)[:1] != [-1]


@settings(max_examples=60, deadline=None)
@given(closed_sets)
def test_a_trie_holds_its_sequences(sequences: list[tuple[int, ...]]) -> None:
    trie = TokenTrie(TokenSequences.of(sequences))
    for tokens in itertools.chain.from_iterable(itertools.product(range(4, 8), repeat=n) for n in range(4)):
        expected = sequences.index(tokens) if tokens in sequences else -1
        assert trie.find(tokens) == expected
    prefixes = {s[:n] for s in sequences for n in range(len(s) + 1)}
    assert len(trie) == len(prefixes | {()})
    for node in range(len(trie)):
        assert (np.diff(trie.children(node)) > 0).all()


def test_every_answer_of_a_closed_set_is_followed_to_its_end() -> None:
    random = np.random.default_rng(0)
    answers = sorted({tuple(random.integers(4, 20, random.integers(1, 5)).tolist()) for _ in range(400)})
    automaton = compile_target([ChoiceTokens(tuple(answers))], eos=EOS, vocabulary_size=VOCABULARY)
    wanted = {
        a[:n]: {b[n] for b in answers if b[:n] == a[:n] and len(b) > n} for a in answers for n in range(len(a) + 1)
    }
    for prefix, following in wanted.items():
        state = torch.tensor([automaton.start])
        for token in prefix:
            state = automaton.advance(state, torch.tensor([token]))
        assert bool(automaton.renormalise[state]) and not bool(automaton.free[state])
        expected = following | ({EOS} if prefix in answers else set())
        assert set(automaton.allowed(state)[0].nonzero()[:, 0].tolist()) == expected
        assert bool(automaton.is_narrow(state.numpy())) == (len(expected) <= VOCABULARY // 4)
    assert automaton.trace([*answers[7], EOS]) == [0] * len(answers[7]) + [1]
    assert automaton.trace([3]) == [-1]


def test_leaves_of_a_closed_set_are_one_state() -> None:
    answers = tuple((4, token) for token in range(5, 20))
    automaton = compile_target([ChoiceTokens(answers)], eos=EOS, vocabulary_size=VOCABULARY)
    after = automaton.advance(torch.full((15,), automaton.start), torch.full((15,), 4))
    assert len(automaton.advance(after, torch.arange(5, 20)).unique()) == 1  # type: ignore[no-untyped-call]
    assert len(automaton.tables.first) - 1 == 6  # final, end, leaf, two inner nodes, sink


def test_two_closed_sets_side_by_side() -> None:
    """The first set's longer answer wins over the second set's beginning, as its own tokens come first."""
    elements = [ChoiceTokens(((4,), (4, 5))), ChoiceTokens(((5, 6), (7,)))]
    automaton = compile_target(elements, eos=EOS, vocabulary_size=VOCABULARY)
    assert automaton.trace([4, 7, EOS]) == [0, 1, 2]
    assert automaton.trace([4, 5, 5, 6, EOS]) == [0, 0, 1, 1, 2]
    assert automaton.trace([4, 5, 6]) == [0, 0, -1]
    assert automaton.longest == 4


def test_a_closed_set_before_free_text_takes_its_ranges() -> None:
    automaton = compile_target([ChoiceTokens(((4,), (4, 5))), FreeTokens(10, 20)], eos=EOS, vocabulary_size=VOCABULARY)
    state = automaton.advance(torch.tensor([automaton.start]), torch.tensor([4]))
    assert automaton.allowed(state)[0].nonzero()[:, 0].tolist() == [EOS, 5, *range(10, 20)]
    assert not automaton.is_narrow(state.numpy()) and automaton.is_narrow(np.array([automaton.start]))
    assert automaton.trace([4, 12, 13, EOS]) == [0, 1, 1, 2]
    assert automaton.longest is None


def test_compiled_once() -> None:
    elements = [FixedTokens((8,)), ChoiceTokens([[4], [5]])]
    first = compile_target(elements, eos=EOS, vocabulary_size=VOCABULARY)
    assert compile_target(list(elements), eos=EOS, vocabulary_size=VOCABULARY) is first
    assert compile_target(elements, eos=EOS, vocabulary_size=VOCABULARY + 1) is not first


def test_tensors_there_and_back() -> None:
    elements = [
        FixedTokens((8, 9)),
        RepeatTokens((RangeTokens(10, 13, 4), FreeTokens(14, 17))),
        ChoiceTokens(((4, 5), (4,))),
    ]
    automaton = compile_target(elements, eos=EOS, vocabulary_size=VOCABULARY)
    again = TokenAutomaton.from_tensors(automaton.to_tensors())
    assert (again.start, again.final, again.longest, again.vocabulary_size) == (
        automaton.start,
        automaton.final,
        automaton.longest,
        automaton.vocabulary_size,
    )
    states = torch.arange(len(automaton.tables.first) - 1)
    assert torch.equal(again.allowed(states), automaton.allowed(states))
    for token in range(VOCABULARY):
        tokens = torch.full_like(states, token)
        assert torch.equal(again.advance(states, tokens), automaton.advance(states, tokens))
    line = [8, 9, 10, 11, 12, 10, 14, 4, 5, EOS]
    assert again.trace(line) == automaton.trace(line) == [0, 0, 1, 1, 1, 1, 2, 3, 3, 4]


@pytest.mark.parametrize(
    ("name", "place", "value"),
    [
        ("tokens", 0, VOCABULARY),
        ("targets", 1, 99),
        ("first", 1, 50),
        ("first", 0, 1),
        ("ranges", 0, -1),
        ("header", 0, 99),
    ],
)
def test_damaged_tensors_are_refused(name: str, place: int, value: int) -> None:
    elements = [ChoiceTokens(((4, 5), (6,))), RangeTokens(10, 13, 2)]
    tensors = compile_target(elements, eos=EOS, vocabulary_size=VOCABULARY).to_tensors()
    tensors = {key: tensor.clone() for key, tensor in tensors.items()}
    tensors[name].view(-1)[place] = value
    with pytest.raises(OfakernValueError, match=f"from_tensors: {name} must"):
        TokenAutomaton.from_tensors(tensors)
    for changed in ({**tensors, name: tensors[name].double()}, {k: t for k, t in tensors.items() if k != name}):
        with pytest.raises(OfakernValueError, match="from_tensors"):
            TokenAutomaton.from_tensors(changed)


def test_unnormalised_keeps_what_is_allowed() -> None:
    automaton = compile_target([ChoiceTokens(((4, 5), (6,)))], eos=EOS, vocabulary_size=VOCABULARY)
    plain = automaton.unnormalised()
    start = torch.tensor([automaton.start])
    assert torch.equal(plain.allowed(start), automaton.allowed(start))
    assert not plain.renormalise.any() and automaton.renormalise[automaton.start] and not plain.is_narrow(start.numpy())


@pytest.mark.parametrize(
    "elements", [[FixedTokens((VOCABULARY,))], [ChoiceTokens(((4, 99),))], [RangeTokens(4, 99, 2)]]
)
def test_ids_outside_the_vocabulary(elements: list[TargetElement]) -> None:
    with pytest.raises(OfakernValueError, match="tokens must be in"):
        compile_target(elements, eos=EOS, vocabulary_size=VOCABULARY)
    with pytest.raises(OfakernValueError, match="at least one answer"):
        compile_target([ChoiceTokens(())], eos=EOS, vocabulary_size=VOCABULARY)


def test_fifty_thousand_entities() -> None:
    """Time and memory grow with the tokens, not with Python objects (a dictionary of each node took 0.5 kB)."""
    random = np.random.default_rng(1)
    count, vocabulary = 50_000, 50_000
    lengths = random.integers(2, 6, count)
    offsets = np.concatenate(([0], lengths.cumsum()))
    tokens = (random.zipf(1.3, offsets[-1]) % (vocabulary - 4) + 4).astype(np.int32)
    sequences = TokenSequences(tokens, offsets)
    tracemalloc.start()
    begin = time.process_time()
    automaton = compile_target([ChoiceTokens(sequences)], eos=EOS, vocabulary_size=vocabulary)
    seconds, (_, peak) = time.process_time() - begin, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seconds < 5 and peak < 80e6
    kept = sum(t.numel() * t.element_size() for t in automaton.to_tensors().values())
    assert kept < 24 * len(tokens)
    for number in (0, count // 2, count - 1):
        assert automaton.trace([*sequences[number], EOS]) == [0] * len(sequences[number]) + [1]
