"""Beam search, greedy search and sampling on a toy decoder, against exhaustive search and step-by-step rules."""

from __future__ import annotations

import itertools

import pytest
import torch
from toy_decoder import ToyDecoder

from ofakern.errors import OfakernRuntimeError, OfakernTypeError, OfakernValueError
from ofakern.generate import (
    ChoiceTokens,
    FixedTokens,
    FreeTokens,
    GenerationConfig,
    Hypothesis,
    RangeTokens,
    RepeatTokens,
    compile_target,
    generate,
)

EOS = 2


def log_probability(model: ToyDecoder, sample: int, tokens: tuple[int, ...]) -> float:
    history: tuple[int, ...] = (0,)
    total = 0.0
    for token in tokens:
        lprobs = torch.log_softmax(model.logits_after(sample, history), -1)
        total += float(lprobs[token])
        history = (*history, token)
    return total


def every_answer(vocabulary: int, longest: int) -> list[tuple[int, ...]]:
    inner = [t for t in range(vocabulary) if t not in (1, EOS)]
    return [(*body, EOS) for n in range(longest + 1) for body in itertools.product(inner, repeat=n)]


@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_wide_beam_finds_the_best_answer(penalty: float) -> None:
    model = ToyDecoder(vocabulary=6)
    config = GenerationConfig(
        num_beams=200, max_new_tokens=3, length_penalty=penalty, num_return_sequences=4, no_repeat_ngram_size=0
    )
    found = generate(model, 3, 3, config)
    for sample, answers in enumerate(found):
        scored = {a: log_probability(model, sample, a) / len(a) ** penalty for a in every_answer(6, 3)}
        best = sorted(scored, key=lambda a: -scored[a])[:4]
        assert [a.tokens for a in answers] == best
        for answer in answers:
            assert answer.score == pytest.approx(scored[answer.tokens], abs=1e-5)
            assert sum(answer.token_scores) / len(answer.tokens) ** penalty == pytest.approx(answer.score, abs=1e-5)


def test_samples_do_not_depend_on_their_batch() -> None:
    model = ToyDecoder(vocabulary=30, scale=1.0)
    for config in (GenerationConfig(num_beams=4, max_new_tokens=8), GenerationConfig(num_beams=1, max_new_tokens=8)):
        whole = generate(model, 5, 5, config)
        assert [answers[0].tokens for answers in generate(model, 3, 3, config)] == [a[0].tokens for a in whole[:3]]


def test_greedy_takes_the_best_token_each_time() -> None:
    model = ToyDecoder(vocabulary=20)
    (answer,) = generate(model, 1, 1, GenerationConfig(num_beams=1, max_new_tokens=6))[0]
    history: tuple[int, ...] = (0,)
    for token in answer.tokens[:6]:
        lprobs = torch.log_softmax(model.logits_after(0, history), -1)
        lprobs[1] = -torch.inf
        assert token == int(lprobs.argmax())
        history = (*history, token)


def test_length_bounds() -> None:
    model = ToyDecoder(vocabulary=8)
    for beams in (1, 3):
        config = GenerationConfig(num_beams=beams, min_new_tokens=4, max_new_tokens=4)
        for answers in generate(model, 4, 4, config):
            assert all(len(a.tokens) == 5 and a.tokens[-1] == EOS and EOS not in a.tokens[:-1] for a in answers)


def test_no_ngram_is_repeated() -> None:
    model = ToyDecoder(vocabulary=5)
    config = GenerationConfig(num_beams=2, min_new_tokens=9, max_new_tokens=9, no_repeat_ngram_size=2)
    for answers in generate(model, 6, 6, config):
        tokens = answers[0].tokens
        pairs = list(itertools.pairwise(tokens))
        assert len(set(pairs)) == len(pairs)
    repeated = generate(model, 6, 6, config.replace(no_repeat_ngram_size=0))
    assert any(len(set(itertools.pairwise(a[0].tokens))) < len(a[0].tokens) - 1 for a in repeated)


@pytest.mark.parametrize("beams", [1, 4])
def test_prefixes_of_several_lengths_are_forced(beams: int) -> None:
    model = ToyDecoder(vocabulary=15)
    prefix = torch.tensor([[5, 6, 7], [9, 1, 1], [1, 1, 1]])
    found = generate(model, 3, 3, GenerationConfig(num_beams=beams, max_new_tokens=4), prefix=prefix)
    assert found[0][0].tokens[:3] == (5, 6, 7)
    assert found[1][0].tokens[:1] == (9,)
    for answers, forced in zip(found, (3, 1, 0), strict=True):
        assert len(answers[0].tokens) <= forced + 4 + 1
        expected = log_probability(model, found.index(answers), answers[0].tokens)
        assert sum(answers[0].token_scores) == pytest.approx(expected, abs=1e-4)
    alone = generate(model, 1, 1, GenerationConfig(num_beams=beams, max_new_tokens=4), prefix=prefix[:1])
    assert alone[0][0].tokens == found[0][0].tokens


def test_closed_set_is_renormalised_and_complete() -> None:
    model = ToyDecoder(vocabulary=12)
    answers = ((5, 6), (5, 7, 8), (9,))
    automaton = compile_target([ChoiceTokens(answers)], eos=EOS, vocabulary_size=12)
    config = GenerationConfig(num_beams=5, max_new_tokens=1, length_penalty=0.0, num_return_sequences=3)
    for found in generate(model, 4, 4, config, automaton=automaton):
        assert sorted(a.tokens[:-1] for a in found) == sorted(answers)
        assert sum(torch.tensor([a.score for a in found]).exp().tolist()) == pytest.approx(1.0, abs=1e-5)


def test_prefix_then_closed_set() -> None:
    model = ToyDecoder(vocabulary=12)
    automaton = compile_target([ChoiceTokens(((5, 6), (9,)))], eos=EOS, vocabulary_size=12)
    prefix = torch.tensor([[3, 4], [7, 1]])
    found = generate(model, 2, 2, GenerationConfig(), automaton=automaton, prefix=prefix)
    assert found[0][0].tokens[:2] == (3, 4) and found[0][0].tokens[2:] in ((5, 6, EOS), (9, EOS))
    assert found[1][0].tokens[:1] == (7,) and found[1][0].tokens[1:] in ((5, 6, EOS), (9, EOS))


@pytest.mark.parametrize("beams", [1, 3])
def test_box_is_four_bins(beams: int) -> None:
    model = ToyDecoder(vocabulary=40)
    automaton = compile_target([RangeTokens(30, 38, 4)], eos=EOS, vocabulary_size=40)
    for answers in generate(model, 3, 3, GenerationConfig(num_beams=beams, max_new_tokens=2), automaton=automaton):
        assert len(answers[0].tokens) == 5 and all(30 <= t < 38 for t in answers[0].tokens[:4])


def test_several_slots_and_groups_in_order() -> None:
    model = ToyDecoder(vocabulary=40)
    group = RepeatTokens((RangeTokens(30, 38, 4), FreeTokens(4, 30)))
    automaton = compile_target([FixedTokens((8, 9)), group], eos=EOS, vocabulary_size=40)
    for answers in generate(model, 6, 6, GenerationConfig(num_beams=3, max_new_tokens=24), automaton=automaton):
        tokens = answers[0].tokens
        assert tokens[:2] == (8, 9)
        runs = [(kind, len(list(run))) for kind, run in itertools.groupby(tokens[2:], key=_kind)]
        assert runs[-1][0] == "end"
        for kind, length in runs[:-2]:
            assert kind == "text" or length % 4 == 0
        assert runs[0][0] == "bin"


def test_trace_tells_the_elements() -> None:
    group = RepeatTokens((RangeTokens(30, 38, 4), FreeTokens(4, 30)))
    automaton = compile_target([FixedTokens((8, 9)), group, FixedTokens((39,))], eos=EOS, vocabulary_size=40)
    tokens = [8, 9, 31, 32, 33, 34, 5, 6, 35, 36, 37, 30, 39, EOS]
    assert automaton.trace(tokens) == [0, 0, 1, 1, 1, 1, 2, 2, 1, 1, 1, 1, 3, 4]
    assert automaton.trace([8, 10, 31]) == [0, -1, -1]


def _kind(token: int) -> str:
    return "end" if token == EOS else "bin" if token >= 30 else "text"


def test_neighbours_that_cannot_be_told_apart() -> None:
    with pytest.raises(OfakernValueError, match="told apart"):
        compile_target([FreeTokens(4, 30), FreeTokens(4, 30)], eos=EOS, vocabulary_size=40)


def test_sampling_is_seeded_and_bounded() -> None:
    model = ToyDecoder(vocabulary=30, scale=0.5)
    config = GenerationConfig(do_sample=True, num_return_sequences=6, max_new_tokens=5, seed=3)
    first, second = generate(model, 2, 2, config), generate(model, 2, 2, config)
    assert first == second != generate(model, 2, 2, config.replace(seed=4))
    assert all(len(answers) == 6 for answers in first)
    greedy = generate(model, 2, 2, GenerationConfig(num_beams=1, max_new_tokens=5))
    top1 = generate(model, 2, 2, config.replace(top_k=1))
    assert {a.tokens for a in top1[0]} == {greedy[0][0].tokens}
    tiny_p = generate(model, 2, 2, config.replace(top_p=1e-6))
    assert {a.tokens for a in tiny_p[1]} == {greedy[1][0].tokens}


def test_late_stopping_never_finds_worse() -> None:
    model = ToyDecoder(vocabulary=10, scale=1.0)
    early = GenerationConfig(num_beams=3, max_new_tokens=8, length_penalty=2.0)
    for a, b in zip(
        generate(model, 8, 8, early), generate(model, 8, 8, early.replace(early_stopping=False)), strict=True
    ):
        assert b[0].score >= a[0].score - 1e-6


def test_positions_limit() -> None:
    model = ToyDecoder(vocabulary=10)
    (answers,) = generate(model, 1, 1, GenerationConfig(num_beams=1, min_new_tokens=50), max_positions=6)
    assert len(answers[0].tokens) == 6
    with pytest.raises(OfakernValueError, match="positions"):
        generate(model, 1, 1, GenerationConfig(), prefix=torch.full((1, 9), 5), max_positions=6)


def test_nan_logits_are_reported() -> None:
    model = ToyDecoder()
    model.table[:] = torch.nan
    with pytest.raises(OfakernRuntimeError, match="NaN at step 0"):
        generate(model, 1, 1, GenerationConfig())


def test_names_and_falsy_values() -> None:
    config = GenerationConfig().replace(beam_size=3, max_len=7, no_repeat_ngram_size=0, sampling=False, len_penalty=0)
    assert (config.num_beams, config.max_new_tokens, config.no_repeat_ngram_size) == (3, 7, 0)
    assert config.resolved(closed=False).no_repeat_ngram_size == 0
    assert GenerationConfig().resolved(closed=False).num_beams == 5
    assert GenerationConfig().resolved(closed=True).num_beams == 1
    assert GenerationConfig().resolved(closed=True).no_repeat_ngram_size == 0
    assert GenerationConfig.from_dict(config.to_dict()) == config
    with pytest.raises(OfakernTypeError, match="'beams'"):
        GenerationConfig().replace(beams=3)
    with pytest.raises(OfakernTypeError, match="given once"):
        GenerationConfig().replace(num_beams=3, beam_size=4)
    with pytest.raises(OfakernValueError, match="num_beams"):
        GenerationConfig(num_beams=0)
    with pytest.raises(OfakernValueError, match="num_return_sequences"):
        GenerationConfig(num_beams=2, num_return_sequences=3)


def test_empty_batch() -> None:
    assert generate(ToyDecoder(), 0, 0, GenerationConfig()) == []
    assert Hypothesis((EOS,), 0.0, (0.0,)).tokens == (EOS,)
