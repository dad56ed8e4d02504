"""All-candidate scoring against scoring every answer alone, and its best against an exhaustive search."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ofakern.checkpoint.golden import load_model
from ofakern.checkpoint.golden_case import Case
from ofakern.errors import OfakernRuntimeError, OfakernValueError
from ofakern.generate import (
    CandidateSet,
    ChoiceTokens,
    FixedTokens,
    FreeTokens,
    GenerationConfig,
    RangeTokens,
    SpecialTokens,
    TargetElement,
    TokenAutomaton,
    best_candidates,
    compile_target,
    generate,
    score_candidates,
)

EOS, VOCABULARY, WIDTH = 2, 40, 8
GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "ofasys" / "main"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors gain nothing from threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Rows:
    """A decode state: the tokens that every row was fed."""

    def __init__(self, counts: Sequence[int]) -> None:
        self.sample = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        self.history: list[tuple[int, ...]] = [() for _ in range(len(self.sample))]

    def reorder(self, index: Tensor) -> None:
        self.sample = self.sample[index]
        assert (self.sample.diff() >= 0).all(), "a sample's rows stand together"
        self.history = [self.history[i] for i in index.tolist()]


class Writer:
    """A decoder whose output depends on the sample and all tokens before; it counts the rows it was fed."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.output_weight = torch.randn(VOCABULARY, WIDTH, generator=generator)
        self.table = torch.randn(997, WIDTH, generator=generator)
        self.fed = 0
        self.widest = 0

    def hidden(self, sample: int, history: tuple[int, ...]) -> Tensor:
        key = sample + 1
        for token in history:
            key = (key * 31 + token + 7) % 997
        return self.table[key]

    def begin_decode(self, memory: int, rows_per_sample: int | Sequence[int], max_length: int) -> Rows:
        self.longest = max_length
        counts = [rows_per_sample] * memory if isinstance(rows_per_sample, int) else list(rows_per_sample)
        assert len(counts) == memory
        return Rows(counts)

    def decode_hidden(self, state: Rows, tokens: Tensor) -> Tensor:
        self.fed += len(tokens)
        self.widest = max(self.widest, len(tokens))
        state.history = [(*history, token) for history, token in zip(state.history, tokens.tolist(), strict=True)]
        assert len(state.history[0]) <= self.longest
        rows = zip(state.sample.tolist(), state.history, strict=True)
        return torch.stack([self.hidden(sample, history) for sample, history in rows])

    def step_logits(self, state: Rows, hidden: Tensor) -> Tensor:
        return hidden @ self.output_weight.T

    def decode_step(self, state: Rows, tokens: Tensor) -> Tensor:
        return self.step_logits(state, self.decode_hidden(state, tokens))


class LogitsOnly:
    """The same decoder, of which only whole steps are known."""

    def __init__(self, writer: Writer) -> None:
        self.begin_decode, self.decode_step = writer.begin_decode, writer.decode_step


def alone(
    writer: Writer, automaton: TokenAutomaton, sample: int, tokens: Sequence[int], prefix: Sequence[int] = ()
) -> float:
    """The log-probability of one target after its prefix, a token at a time."""
    total, history, state = 0.0, (0, *prefix), torch.tensor([automaton.start])
    for token in tokens:
        logits = writer.output_weight @ writer.hidden(sample, history)
        if automaton.renormalise[state]:
            logits = logits.masked_fill(~automaton.allowed(state)[0], -torch.inf)
        total += float(logits.log_softmax(0)[token])
        state = automaton.advance(state, torch.tensor([token]))
        history = (*history, token)
    return total


def drawn_answers(count: int = 60, seed: int = 0) -> list[tuple[int, ...]]:
    random = np.random.default_rng(seed)
    found: dict[tuple[int, ...], None] = {}
    while len(found) < count:
        found[tuple((4 + random.integers(0, 9, random.integers(1, 5)) ** 2 // 3).tolist())] = None
    return list(found)


def closed(answers: Sequence[tuple[int, ...]], *around: TargetElement) -> TokenAutomaton:
    elements = [*around[:1], ChoiceTokens(tuple(answers)), *around[1:]]
    return compile_target(elements, eos=EOS, vocabulary_size=VOCABULARY)


@pytest.mark.parametrize("hidden", [True, False], ids=["gathered", "logits"])
@pytest.mark.parametrize("max_rows", [2, 1024])
def test_equal_to_scoring_every_answer_alone(max_rows: int, hidden: bool) -> None:
    writer, answers = Writer(), drawn_answers(24)
    model: Any = writer if hidden else LogitsOnly(writer)
    got = score_candidates(model, 2, 2, answers, max_rows=max_rows)
    assert got.shape == (2, len(answers)) and got.dtype == torch.float32
    assert writer.widest <= max_rows
    automaton = closed(answers)
    for sample in range(2):
        expected = [alone(writer, automaton, sample, (*answer, EOS)) for answer in answers]
        torch.testing.assert_close(got[sample], torch.tensor(expected), rtol=0, atol=1e-5)
    torch.testing.assert_close(got.exp().sum(1), torch.ones(2))


def test_shared_prefixes_are_decoded_once_and_only_while_there_is_a_choice() -> None:
    writer, answers = Writer(), drawn_answers()
    score_candidates(writer, 2, 2, answers)
    # A row for each prefix behind which there is more than one answer, the empty one included.
    prefixes = {answer[:n] for answer in answers for n in range(len(answer) + 1)}
    open_ones = [p for p in prefixes if sum(a[: len(p)] == p for a in answers) > 1]
    assert writer.fed == 2 * len(open_ones) < 2 * len(answers)


def test_a_front_in_parts_feeds_shared_prefixes_once_a_part() -> None:
    whole, parts, answers = Writer(), Writer(), drawn_answers(200)
    torch.testing.assert_close(
        score_candidates(whole, 2, 2, answers), score_candidates(parts, 2, 2, answers, max_rows=8)
    )
    assert parts.widest <= 8 and whole.fed < parts.fed < 3 * whole.fed


@pytest.mark.parametrize("max_rows", [2, 1024])
def test_prefixes_of_several_lengths_and_fixed_text(max_rows: int) -> None:
    writer, answers = Writer(1), drawn_answers(20)
    automaton = closed(answers, FixedTokens((9, 38)), FixedTokens((39, 5)))
    prefix = torch.tensor([[30, 31, 32], [33, 1, 1], [1, 1, 1]])
    got = score_candidates(writer, 3, 3, automaton, prefix=prefix, max_rows=max_rows)
    candidates = CandidateSet(automaton)
    assert len(candidates) == len(answers)
    for sample, forced in enumerate(((30, 31, 32), (33,), ())):
        sequences = [candidates.sequence(n) for n in range(len(candidates))]
        expected = [alone(writer, automaton, sample, sequence, forced) for sequence in sequences]
        torch.testing.assert_close(got[sample], torch.tensor(expected), rtol=0, atol=1e-5)


def test_two_closed_sets_and_temperature() -> None:
    writer = Writer(2)
    elements = [ChoiceTokens(((4,), (5, 6))), FixedTokens((30,)), ChoiceTokens(((7,), (7, 8), (9,)))]
    automaton = compile_target(elements, eos=EOS, vocabulary_size=VOCABULARY)
    candidates = CandidateSet(automaton)
    assert sorted(candidates.sequence(n)[:-1] for n in range(len(candidates))) == sorted(
        (*a, 30, *b) for a in ((4,), (5, 6)) for b in ((7,), (7, 8), (9,))
    )
    got = score_candidates(writer, 1, 1, automaton, temperature=0.5)[0]
    writer.output_weight = writer.output_weight * 2
    expected = [alone(writer, automaton, 0, candidates.sequence(n)) for n in range(len(candidates))]
    torch.testing.assert_close(got, torch.tensor(expected), rtol=0, atol=1e-5)


def test_without_renormalising_probabilities_are_of_the_vocabulary() -> None:
    writer, automaton = Writer(3), closed(drawn_answers(30)).unnormalised()
    got, candidates = score_candidates(writer, 2, 2, automaton), CandidateSet(automaton)
    for sample in range(2):
        expected = [alone(writer, automaton, sample, candidates.sequence(n)) for n in range(30)]
        torch.testing.assert_close(got[sample], torch.tensor(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize("penalty", [0.0, 1.0])
@pytest.mark.parametrize("prefix", [None, torch.tensor([[30, 31], [33, 1]])], ids=["no prefix", "prefix"])
def test_the_best_are_those_of_an_exhaustive_search(prefix: Tensor | None, penalty: float) -> None:
    writer, answers = Writer(4), drawn_answers(25)
    automaton = closed(answers, FixedTokens((9, 38)))
    config = GenerationConfig(num_beams=25, num_return_sequences=6, length_penalty=penalty, early_stopping=False)
    expected = generate(writer, 2, 2, config.replace(no_repeat_ngram_size=0), automaton=automaton, prefix=prefix)
    found = best_candidates(writer, 2, 2, config, automaton=automaton, prefix=prefix)
    for got, wanted in zip(found, expected, strict=True):
        assert [a.tokens for a in got] == [a.tokens for a in wanted]
        for a, b in zip(got, wanted, strict=True):
            assert a.score == pytest.approx(b.score, abs=1e-5)
            assert a.token_scores == pytest.approx(b.token_scores, abs=1e-5)
            assert sum(a.token_scores) / len(a.tokens) ** penalty == pytest.approx(a.score, abs=1e-5)


def test_equal_scores_stand_in_the_order_of_tokens() -> None:
    writer = Writer()
    writer.output_weight = torch.ones(VOCABULARY, WIDTH)
    automaton = closed([(9,), (4,), (6,), (5, 7)])
    config = GenerationConfig(num_return_sequences=3, num_beams=3, length_penalty=0.0)
    (found,) = best_candidates(writer, 1, 1, config, automaton=automaton)
    assert [a.tokens for a in found] == [(4, EOS), (5, 7, EOS), (6, EOS)]
    more = config.replace(num_beams=9, num_return_sequences=9)
    assert len(best_candidates(writer, 1, 1, more, automaton=automaton)[0]) == 4


def test_numbers_of_candidates_there_and_back() -> None:
    automaton = closed(drawn_answers(), FixedTokens((9,)), FixedTokens((38,)))
    candidates = CandidateSet(automaton)
    sequences = [candidates.sequence(n) for n in range(len(candidates))]
    assert len(set(sequences)) == 60 and sequences == sorted(sequences)
    assert [candidates.number(sequence) for sequence in sequences] == list(range(60))
    for wrong in ((9, 4), (9, 99), (*sequences[0], EOS)):
        with pytest.raises(OfakernValueError, match="must be one of the targets"):
            candidates.number(wrong)
    with pytest.raises(OfakernValueError, match="number must be in"):
        candidates.sequence(60)


def test_one_candidate_needs_no_step() -> None:
    writer = Writer()
    (answer,) = best_candidates(writer, 1, 1, GenerationConfig(), automaton=closed([(4, 5)]))[0]
    assert answer.tokens == (4, 5, EOS) and answer.score == 0 and answer.token_scores == (0, 0, 0) and writer.fed == 0
    assert score_candidates(writer, 0, 0, [(4,), (5,)]).shape == (0, 2)


def test_repeated_candidates_keep_their_columns() -> None:
    got = score_candidates(Writer(), 1, 1, [(4, 5), (6,), (4, 5)])
    assert got[0, 0] == got[0, 2] and got.shape == (1, 3)


@pytest.mark.parametrize("element", [FreeTokens(4, 9), RangeTokens(4, 9, 2)])
def test_targets_that_cannot_be_listed(element: TargetElement) -> None:
    automaton = compile_target([FixedTokens((30,)), element], eos=EOS, vocabulary_size=VOCABULARY)
    with pytest.raises(OfakernValueError, match="target must consist of closed sets and fixed text"):
        score_candidates(Writer(), 1, 1, automaton)


def test_refusals() -> None:
    writer = Writer()
    with pytest.raises(OfakernValueError, match="must fit the decoder's positions"):
        score_candidates(writer, 1, 1, [(4, 5, 6)], max_positions=3)
    with pytest.raises(OfakernValueError, match="max_rows must be at least 1"):
        score_candidates(writer, 1, 1, [(4,), (5,)], max_rows=0)
    with pytest.raises(OfakernValueError, match="prefix must be"):
        score_candidates(writer, 2, 2, [(4,), (5,)], prefix=torch.zeros(3, 1).long())
    with pytest.raises(OfakernValueError, match="must have a target of closed sets"):
        best_candidates(writer, 1, 1, GenerationConfig(), automaton=None)
    writer.table[:] = torch.nan
    with pytest.raises(OfakernRuntimeError, match="logits must be finite"):
        score_candidates(writer, 1, 1, [(4,), (5,)])


@pytest.mark.parametrize("max_rows", [5, 1024])
def test_a_real_decoder_gives_what_answers_alone_give(max_rows: int) -> None:
    """OFAPlus: all answers of all samples against one full pass for each answer, to 1e-4."""
    model = load_model(GOLDEN)[0].eval()
    case = Case(GOLDEN, "closed_set", model)
    answers = [(269, 110, 5), (269, 176, 170), (142, 110, 214, 238, 170), (142,), (269, 176), (17, 4)]
    automaton = compile_target([ChoiceTokens(tuple(answers))], eos=EOS, vocabulary_size=model.config.vocab_size)
    with torch.inference_mode():
        memory = model.encode(case.batch(range(case.samples)).source)
    got = score_candidates(model, memory, case.samples, answers, special=SpecialTokens(), max_rows=max_rows)
    for column, answer in enumerate(answers):
        expected = torch.zeros(case.samples)
        state, at = model.begin_decode(memory, 1, 8), torch.tensor([automaton.start])
        fed = torch.zeros(case.samples, dtype=torch.int64)
        for token in (*answer, EOS):
            logits = model.decode_step(state, fed).float().masked_fill(~automaton.allowed(at), -torch.inf)
            expected += logits.log_softmax(1)[:, token]
            at, fed = automaton.advance(at, torch.tensor([token])), torch.full_like(fed, token)
        torch.testing.assert_close(got[:, column], expected, rtol=0, atol=1e-4)
