"""The beam searches against a plainly written one: early stopping, n-best and diverse groups."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from plain_search import search
from toy_decoder import ToyDecoder

from ofakern.errors import OfakernTypeError, OfakernValueError
from ofakern.generate import GenerationConfig, generate

SAMPLES = 6


def check(config: GenerationConfig, model: ToyDecoder | None = None) -> list[Any]:
    model = model or ToyDecoder(vocabulary=14, scale=1.2)
    found = generate(model, SAMPLES, SAMPLES, config)
    for sample, answers in enumerate(found):
        expected = search(model, sample, config)
        assert [answer.tokens for answer in answers] == [tokens for _, tokens in expected]
        for answer, (score, _) in zip(answers, expected, strict=True):
            assert answer.score == pytest.approx(score, rel=1e-5, abs=1e-5)
            total = sum(answer.token_scores) / len(answer.tokens) ** config.length_penalty
            assert total == pytest.approx(answer.score, rel=1e-5, abs=1e-5)
    return found


@pytest.mark.parametrize("early", [True, False, "never"])
@pytest.mark.parametrize("penalty", [-1.0, 0.0, 1.0, 2.0])
def test_early_stopping(early: Any, penalty: float) -> None:
    settings: dict[str, Any] = {"early_stopping": early, "length_penalty": penalty, "no_repeat_ngram_size": 2}
    check(GenerationConfig(num_beams=4, num_return_sequences=4, max_new_tokens=9, **settings))


def test_early_stopping_differs() -> None:
    config = GenerationConfig(num_beams=3, max_new_tokens=12, length_penalty=1.0, no_repeat_ngram_size=0)
    model = ToyDecoder(vocabulary=8, scale=1.0)
    fed = []
    for early in (True, False, "never"):
        before = model.rows_fed
        check(config.replace(early_stopping=early), model)
        fed.append(model.rows_fed - before)
    assert fed[0] < fed[1] < fed[2]


@pytest.mark.parametrize(("beams", "groups"), [(4, 2), (6, 3), (3, 3)])
@pytest.mark.parametrize("early", [True, False])
def test_diverse_groups(beams: int, groups: int, early: bool) -> None:
    config = GenerationConfig(
        num_beams=beams,
        num_beam_groups=groups,
        diversity_penalty=0.7,
        num_return_sequences=beams,
        max_new_tokens=6,
        early_stopping=early,
        no_repeat_ngram_size=0,
        min_new_tokens=2,
    )
    check(config)


def test_groups_begin_differently() -> None:
    model = ToyDecoder(vocabulary=14, scale=1.2)
    config = GenerationConfig(num_beams=4, num_beam_groups=4, diversity_penalty=50.0, num_return_sequences=4)
    for answers in generate(model, 3, 3, config.replace(max_new_tokens=3, min_new_tokens=3)):
        assert len({answer.tokens[0] for answer in answers}) == 4
    together = generate(model, 3, 3, config.replace(num_beam_groups=1, diversity_penalty=0.0, max_new_tokens=3))
    assert any(len({answer.tokens[0] for answer in answers}) < 4 for answers in together)


def test_more_answers_than_there_are() -> None:
    config = GenerationConfig(num_beams=9, num_return_sequences=9, max_new_tokens=1, no_repeat_ngram_size=0)
    for answers in generate(ToyDecoder(vocabulary=5), 2, 2, config):
        assert len(answers) == 1 + 3  # the end alone, or one of three tokens before it
        assert all(a.score >= b.score for a, b in itertools.pairwise(answers))


def test_where_nothing_may_follow_the_answer_is_what_stands() -> None:
    config = GenerationConfig(num_beams=2, max_new_tokens=20, min_new_tokens=20, no_repeat_ngram_size=1)
    for (answer,) in generate(ToyDecoder(vocabulary=6), 3, 3, config):
        assert sorted(answer.tokens) == [0, 3, 4, 5] and len(answer.token_scores) == 4
    (nothing,) = generate(ToyDecoder(vocabulary=4), 1, 1, config.replace(suppress_tokens=[0, 3]))
    assert nothing[0].tokens == ()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 5, "num_beam_groups": 2, "diversity_penalty": 1.0}, "multiple of num_beam_groups"),
        ({"num_beams": 4, "num_beam_groups": 2}, "diversity_penalty must be above 0"),
        ({"num_beams": 4, "diversity_penalty": 1.0}, "num_beam_groups must be above 1"),
        ({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0, "do_sample": True}, "with do_sample"),
        ({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0, "compat": "ofasys"}, "compat='ofasys'"),
        ({"early_stopping": "always"}, "True, False or 'never'"),
        ({"length_penalty": float("nan")}, "length_penalty must be finite"),
        ({"typical_p": 0.0}, r"typical_p must be in \(0, 1\]"),
        ({"min_p": 1.5}, r"min_p must be in \[0, 1\]"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0"),
        ({"suppress_tokens": [-1]}, "vocabulary ids"),
        ({"bad_words_ids": [[]]}, "sequences of ids"),
        ({"top_k": 2.5}, "top_k must be an integer"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(OfakernValueError, match=message):
        GenerationConfig(**settings)


def test_names_of_others() -> None:
    with pytest.raises(OfakernTypeError, match="Try: max_new_tokens, which counts neither"):
        GenerationConfig().replace(max_length=20)
    config = GenerationConfig().replace(
        beam=4, diverse_beam_groups=2, diverse_beam_strength=0.5, sampling_topk=-1, sampling_topp=None, unkpen=1.0
    )
    assert (config.num_beam_groups, config.diversity_penalty, config.top_k, config.top_p) == (2, 0.5, 0, 1.0)
    assert config.unk_penalty == 1.0 and GenerationConfig.from_dict(config.to_dict()) == config
    words = GenerationConfig.from_dict({"bad_words_ids": [[5, 6]], "suppress_tokens": [3]})
    assert words.bad_words_ids == ((5, 6),) and hash(words) == hash(words.replace(min_p=None))
