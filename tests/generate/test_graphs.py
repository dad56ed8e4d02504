"""Searches whose steps are CUDA graphs, by the CPU's stand-in: the answers that the same searches give without."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from replay import stand_in

from ofakern.errors import OfakernRuntimeError
from ofakern.generate import (
    ChoiceTokens,
    FreeTokens,
    GenerationConfig,
    RangeTokens,
    SearchRequest,
    SearchSession,
    TokenAutomaton,
    compile_target,
    generate,
)
from ofakern.generate.search import Finished, Hypothesis
from ofakern.model import OFAPlus
from ofakern.model.decode import weights
from ofakern.model.ofa_plus import SegmentWriter
from ofakern.ops.graph_use import GraphUse
from tests.model.test_decode_state import build, memory_of

CONFIGS: dict[str, dict[str, Any]] = {
    "greedy": {"num_beams": 1},
    "beams": {"num_beams": 4, "num_return_sequences": 2},
    "rules": {
        "num_beams": 3,
        "repetition_penalty": 1.3,
        "no_repeat_ngram_size": 2,
        "suppress_tokens": [7],
        "bad_words_ids": [[9, 11]],
        "min_new_tokens": 3,
        "temperature": 0.7,
        "unk_penalty": 1.0,
    },
    "drawn": {"do_sample": True, "num_return_sequences": 2, "top_p": 0.9, "top_k": 20, "seed": 3},
}
CLOSED = [[5, 6], [5, 8, 9], [11, 12, 13, 14], [20]]


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Graphs, and layer by layer on weights that are not packed."""
    monkeypatch.setattr(weights, "can_pack", lambda weight: False)
    with stand_in():
        yield


@pytest.fixture(scope="module")
def model() -> OFAPlus:
    return build()


def target(*elements: Any) -> TokenAutomaton:
    return compile_target(elements, eos=2, vocabulary_size=80)


def finished(session: SearchSession, joining: Sequence[Any] = ()) -> tuple[dict[int, list[Hypothesis]], GraphUse, int]:
    """All answers, what ran as graphs, and the steps. joining: what `add` gets before the second, third ... step."""
    answers, steps, waiting = {}, 0, list(joining)
    while session.running:
        for event in session.step():
            assert isinstance(event, Finished) and event.error is None
            answers[event.id] = event.answers
        steps += 1
        if waiting:
            session.add(*waiting.pop(0))
    return answers, session.graph_use, steps


def assert_alike(have: dict[int, list[Hypothesis]], want: dict[int, list[Hypothesis]]) -> None:
    assert have.keys() == want.keys()
    for id in have:
        assert [one.tokens for one in have[id]] == [one.tokens for one in want[id]]
        for mine, theirs in zip(have[id], want[id], strict=True):
            assert math.isclose(mine.score, theirs.score, rel_tol=1e-5)
            assert mine.token_scores == pytest.approx(theirs.token_scores, abs=1e-4)


def both(
    model: OFAPlus, lengths: list[int], requests: list[SearchRequest], joining: Sequence[Any] = ()
) -> tuple[GraphUse, int]:
    """Asserts that graphs give what steps without them do; how they were used, and the steps."""
    found = []
    for on in (False, True):
        session = SearchSession(model, cuda_graphs=on)
        session.add(memory_of(model, lengths), requests)
        found.append(finished(session, joining))
    assert_alike(found[1][0], found[0][0])
    assert found[1][2] == found[0][2]
    return found[1][1:]


@pytest.mark.parametrize("name", CONFIGS)
def test_answers_of_other_lengths_that_end_one_after_the_other(model: OFAPlus, name: str) -> None:
    """Two searches of one kind: the second finds the graphs of the first, whose rows all went."""
    own = [SearchRequest(GenerationConfig(**CONFIGS[name], max_new_tokens=most)) for most in (4, 12, 7)]
    use, steps = both(model, [5, 9, 3], own)
    assert steps == 13 and use.replayed == 13 and not use.without and not use.chosen_after
    assert use.recorded <= 3  # of few rows, of all, and of few again where the caches have grown
    again, _ = both(model, [5, 9, 3], own)
    assert again.replayed == 13 and again.recorded <= 1
    third, _ = both(model, [3, 4, 5], own)
    assert third.recorded == 0


def test_prefixes_closed_sets_ranges_and_free_text_side_by_side(model: OFAPlus) -> None:
    beams = GenerationConfig(num_beams=3, max_new_tokens=6)
    requests = [
        SearchRequest(beams, prefix=(30, 31, 32)),
        SearchRequest(GenerationConfig(num_beams=2), target(ChoiceTokens(CLOSED))),
        SearchRequest(beams, target(RangeTokens(40, 60, 4), FreeTokens(4, 80)), prefix=(8,)),
        SearchRequest(GenerationConfig(do_sample=True, num_return_sequences=3, seed=5, max_new_tokens=5)),
        SearchRequest(beams),
    ]
    use, steps = both(model, [5, 9, 3, 20, 7], requests)
    assert use.replayed == steps and not use.chosen_after


@pytest.mark.parametrize("drawn", [False, True], ids=["beams", "drawn"])
@pytest.mark.parametrize("name", ["closed", "range"])
def test_logits_of_what_is_allowed_only(model: OFAPlus, name: str, drawn: bool) -> None:
    """A closed set chooses from all logits under its automaton, a range from its own."""
    automaton = target(ChoiceTokens(CLOSED) if name == "closed" else RangeTokens(40, 60, 5, renormalise=True))
    config = GenerationConfig(do_sample=True, seed=2) if drawn else GenerationConfig(num_beams=4)
    use, steps = both(model, [5, 9], [SearchRequest(config, automaton)] * 2)
    assert use.replayed == steps and not use.chosen_after


def test_requests_that_come_later(model: OFAPlus) -> None:
    config = GenerationConfig(num_beams=3, max_new_tokens=7)
    closed = SearchRequest(GenerationConfig(num_beams=2), target(ChoiceTokens(CLOSED)))
    joining = [(memory_of(model, [n]), [SearchRequest(config) if n % 2 else closed]) for n in (11, 4, 30, 6)]
    use, steps = both(model, [5, 9], [SearchRequest(config)] * 2, joining)
    assert use.replayed == steps and not use.without


def test_steps_that_choose_after_their_graph_say_why(model: OFAPlus) -> None:
    diverse = SearchRequest(GenerationConfig(num_beams=4, num_beam_groups=2, diversity_penalty=0.5, max_new_tokens=4))
    use, steps = both(model, [5, 9], [diverse] * 2)
    assert use.replayed == steps == use.chosen_after["groups of diverse beams choose one after the other"]
    leaving = SearchRequest(GenerationConfig(num_beams=2, max_new_tokens=6, compat="ofasys"), prefix=(30, 31))
    use, steps = both(model, [5, 9], [leaving] * 2)
    assert use.chosen_after == {"beams in a forced prefix that they may leave choose on the CPU": 2}
    assert use.replayed == steps


def test_states_of_several_models_have_a_graph_each(model: OFAPlus) -> None:
    config = GenerationConfig(num_beams=2, max_new_tokens=4)
    codes = SegmentWriter(model, "image_vqgan", 2)
    found = []
    for on in (False, True):
        session = SearchSession(model, cuda_graphs=on)
        session.add(memory_of(model, [5]), [SearchRequest(config)])
        session.add(memory_of(model, [7]), [SearchRequest(config)], codes)
        found.append(finished(session))
    assert_alike(found[1][0], found[0][0])
    use, steps = found[1][1:]
    assert use.replayed == 2 * steps and use.chosen_after["the states of several models run beside each other"] == steps


def test_generate_takes_the_option(model: OFAPlus) -> None:
    config = GenerationConfig(num_beams=2, max_new_tokens=3)
    have, want = (generate(model, memory_of(model, [5, 6]), 2, config, cuda_graphs=on) for on in (True, False))
    assert_alike(dict(enumerate(have)), dict(enumerate(want)))


def test_nothing_is_read_while_a_step_is_recorded(model: OFAPlus, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in sees a read in the midst of a step; so the tests above would."""
    finish = model.decoder.finish

    def reading(x: torch.Tensor) -> torch.Tensor:
        assert float(x.sum()) != 0
        return finish(x)

    monkeypatch.setattr(model.decoder, "finish", reading)
    session = SearchSession(model, cuda_graphs=True)
    session.add(memory_of(model, [5] * 30), [SearchRequest(GenerationConfig(max_new_tokens=4))] * 30)
    with pytest.raises(OfakernRuntimeError, match="a decode step must leave its values on the device"):
        session.step()
