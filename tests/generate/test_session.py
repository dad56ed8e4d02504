"""Requests of all kinds at once: each gets what it gets alone, comes, streams, ends and leaves when it should."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from toy_decoder import HiddenDecoder, JoiningDecoder, ToyDecoder

from ofakern.errors import OfakernRuntimeError, OfakernValueError
from ofakern.generate import (
    ChoiceTokens,
    Finished,
    FixedTokens,
    FreeTokens,
    GenerationConfig,
    Hypothesis,
    RangeTokens,
    RepeatTokens,
    SearchRequest,
    SearchSession,
    TokenEvent,
    compile_target,
    generate,
)
from ofakern.generate.search.random import uniforms

EOS = 2
V = 40


def automaton(*elements: Any) -> Any:
    return compile_target(elements, eos=EOS, vocabulary_size=V)


CLOSED = automaton(ChoiceTokens(((5, 6), (5, 7, 8), (9,), (9, 10, 11, 12))))
OTHER = automaton(ChoiceTokens(((20,), (21, 22), (21, 23), (24, 25, 26))))
BOX = automaton(RangeTokens(30, 38, 4))
GROUP = automaton(FixedTokens((8, 9)), RepeatTokens((RangeTokens(30, 38, 4), FreeTokens(4, 30))))


def requests() -> list[SearchRequest]:
    """One of each kind."""
    sampled = GenerationConfig(do_sample=True, max_new_tokens=9, seed=5)
    return [
        SearchRequest(GenerationConfig(num_beams=1, max_new_tokens=7)),
        SearchRequest(GenerationConfig(num_beams=4, max_new_tokens=12, num_return_sequences=2)),
        SearchRequest(GenerationConfig(num_beams=3), CLOSED),
        SearchRequest(replace(sampled, num_return_sequences=3, top_k=7, top_p=0.8)),
        SearchRequest(GenerationConfig(num_beams=2), BOX, prefix=(20, 21, 22)),
        SearchRequest(GenerationConfig(num_beams=3, early_stopping=False, length_penalty=2.0, max_new_tokens=9)),
        SearchRequest(replace(sampled, typical_p=0.6, temperature=1.7, min_new_tokens=4), prefix=(7,)),
        SearchRequest(GenerationConfig(num_beams=3, max_new_tokens=18), GROUP),
        SearchRequest(
            GenerationConfig(
                num_beams=6, num_beam_groups=3, diversity_penalty=0.8, num_return_sequences=4, max_new_tokens=8
            )
        ),
        SearchRequest(GenerationConfig(), CLOSED, max_positions=20),
        SearchRequest(replace(sampled, min_p=0.2, repetition_penalty=1.8, num_return_sequences=2)),
        SearchRequest(
            GenerationConfig(num_beams=2, max_new_tokens=8, suppress_tokens=(5, 6, 7), bad_words_ids=[[8], [9, 10]])
        ),
        SearchRequest(GenerationConfig(num_beams=2, max_new_tokens=6, compat="ofasys", temperature=0.7), prefix=(3, 4)),
        SearchRequest(replace(sampled, seed=6), BOX),
    ]


def run(session: SearchSession) -> dict[int, list[Hypothesis]]:
    found = {}
    while session.running:
        for event in session.step():
            assert isinstance(event, Finished) and event.error is None
            found[event.id] = event.answers
    return found


def alone(model: ToyDecoder, sample: int, request: SearchRequest) -> list[Hypothesis]:
    session = SearchSession(model)
    (id,) = session.add([sample], [request])
    return run(session)[id]


def same(found: list[Hypothesis], expected: list[Hypothesis]) -> bool:
    scores = [answer.score for answer in found], [answer.score for answer in expected]
    return [answer.tokens for answer in found] == [answer.tokens for answer in expected] and scores[0] == pytest.approx(
        scores[1], abs=1e-5
    )


@pytest.fixture(scope="module", params=[ToyDecoder, JoiningDecoder])
def model(request: pytest.FixtureRequest) -> ToyDecoder:
    made: ToyDecoder = request.param(vocabulary=V, scale=1.0)
    return made


def test_each_of_a_mixed_batch_gets_what_it_gets_alone(model: ToyDecoder) -> None:
    session = SearchSession(model)
    wanted = requests()
    ids = session.add(range(len(wanted)), wanted)
    assert session.running == len(wanted)
    found = run(session)
    for id, (sample, request) in zip(ids, enumerate(wanted), strict=True):
        assert same(found[id], alone(model, sample, request)), sample
        assert len(found[id]) >= 1


def test_requests_that_come_later(model: ToyDecoder) -> None:
    """One more at every step, in another order, while others leave; far beyond the columns that are kept."""
    session, found, ids = SearchSession(model), {}, {}
    wanted = list(enumerate(requests()))[::-1]
    for turn in range(400):
        if turn % 3 == 0 and turn < 330:
            sample, request = wanted[turn // 3 % len(wanted)]
            ids[session.add([sample], [request])[0]] = sample
        found |= {event.id: event.answers for event in session.step() if isinstance(event, Finished)}
    assert session.running == 0 and found.keys() == ids.keys()
    expected = {sample: alone(model, sample, request) for sample, request in wanted}
    assert all(same(found[id], expected[sample]) for id, sample in ids.items())
    assert session._table.tokens.shape[1] < 400, "columns are dropped"


def test_what_is_drawn_depends_on_seed_number_and_step_alone() -> None:
    model = ToyDecoder(vocabulary=V, scale=0.5)
    config = GenerationConfig(do_sample=True, num_return_sequences=4, max_new_tokens=6, seed=1)
    three, one = generate(model, 3, 3, config), generate(model, 1, 1, config)
    assert three[0] == one[0] and len({answer.tokens for answer in one[0]}) == 4
    more = generate(model, 1, 1, config.replace(num_return_sequences=6))[0]
    assert {answer.tokens for answer in one[0]} < {answer.tokens for answer in more}
    numbers = torch.cartesian_prod(torch.arange(8), torch.arange(16), torch.arange(64)).numpy()
    drawn = torch.from_numpy(uniforms(*numbers.T)).double()
    assert bool(((drawn >= 0) & (drawn < 1)).all()) and len(drawn.unique()) > 0.999 * len(drawn)
    counts = torch.histc(drawn, 64, 0, 1)
    assert float(((counts - 128) ** 2 / 128).sum()) < 120  # chi-square of 63 degrees: 1 in 10^5 is above
    shifted = torch.corrcoef(torch.stack((drawn[:-1], drawn[1:])))[0, 1]
    assert abs(float(shifted)) < 0.05


@pytest.mark.parametrize("drop", ["top_k", "top_p", "min_p", "typical_p"])
def test_filters_keep_what_their_definitions_keep(drop: str) -> None:
    model = ToyDecoder(vocabulary=12, scale=1.0)
    value: Any = {"top_k": 3, "top_p": 0.5, "min_p": 0.3, "typical_p": 0.5}[drop]
    config = GenerationConfig(do_sample=True, num_return_sequences=400, max_new_tokens=1).replace(**{drop: value})
    logits = model.logits_after(0, (0,)).double().clone()
    p = torch.softmax(logits, -1)
    p[1] = 0  # the padding token
    p /= p.sum()
    if drop == "top_k":
        kept = set(p.topk(3).indices.tolist())
    elif drop == "min_p":
        kept = set((p >= 0.3 * p.max()).nonzero()[:, 0].tolist())
    else:
        surprise = -p.log()
        entropy = -(p * p.log()).nansum()
        order = (p if drop == "top_p" else -(surprise - entropy).abs()).sort(descending=True).indices
        before = p[order].cumsum(0) - p[order]
        kept = set(order[before < 0.5].tolist())
    firsts = [answer.tokens[0] for answer in generate(model, 1, 1, config)[0]]
    assert set(firsts) == kept and 1 < len(kept) < 11
    for token in kept:
        share = float(p[token] / p[list(kept)].sum())
        assert firsts.count(token) / 400 == pytest.approx(share, abs=0.11)
    answer = generate(model, 1, 1, config)[0][0]
    assert answer.token_scores[0] == pytest.approx(float(torch.log_softmax(logits, -1)[answer.tokens[0]]), abs=1e-5)


@pytest.mark.parametrize("kind", ["greedy", "sampled", "beams"])
def test_streaming(kind: str) -> None:
    settings: dict[str, Any] = {
        "greedy": {"num_beams": 1},
        "sampled": {"do_sample": True, "num_return_sequences": 3, "seed": 2},
        "beams": {"num_beams": 3, "num_return_sequences": 2},
    }[kind]
    config = GenerationConfig(max_new_tokens=10, min_new_tokens=5, **settings)
    model = ToyDecoder(vocabulary=20, scale=3.0)
    told: list[TokenEvent] = []
    session = SearchSession(model)
    called, streamed = session.add(
        [4, 4],
        [SearchRequest(config, prefix=(9, 8), on_token=told.append), SearchRequest(config, prefix=(9, 8), stream=True)],
    )
    events: list[TokenEvent] = []
    when, steps, answers = [], 0, []
    while session.running:
        for event in session.step():
            if isinstance(event, Finished):
                answers = event.answers
            else:
                assert event.id == streamed
                events.append(event)
                when.append(steps)
        steps += 1
    assert [replace(event, id=called) for event in events] == told
    for sequence in {event.sequence for event in events}:
        own = [event for event in events if event.sequence == sequence]
        assert [event.step for event in own] == list(range(len(own)))
        (answer,) = [a for a in answers if a.tokens[2:] == tuple(event.token for event in own)]
        assert [event.log_prob for event in own] == pytest.approx(answer.token_scores[2:])
    assert {event.sequence for event in events} == (set(range(3)) if kind == "sampled" else {0})
    if kind == "beams":
        assert tuple(event.token for event in events) == answers[0].tokens[2:]
        assert when[0] < steps - 1, "what all beams agree on comes before the end"
    else:
        assert when == sorted(when) and [when[n] for n, e in enumerate(events) if e.sequence == 0] == list(
            range(2, 2 + sum(e.sequence == 0 for e in events))
        )


def test_cancelled_requests_leave_at_once() -> None:
    model = ToyDecoder(vocabulary=V, scale=1.0)
    wanted = requests()
    session = SearchSession(model)
    ids = session.add(range(len(wanted)), wanted)
    session.step()
    assert session.cancel(ids[1]) and not session.cancel(ids[1]) and not session.cancel(99)
    assert session.running == len(wanted) - 1
    found = run(session)
    assert ids[1] not in found
    assert all(same(found[id], alone(model, n, wanted[n])) for n, id in enumerate(ids) if id != ids[1])
    (last,) = session.add([3], [wanted[0]])
    session.cancel(last)
    assert session.running == 0 and session.step() == []
    before = model.rows_fed
    session.step()
    assert model.rows_fed == before


def test_a_callback_that_raises_ends_its_own_request() -> None:
    def refuse(event: TokenEvent) -> None:
        raise KeyError("no more")

    model = ToyDecoder(vocabulary=V, scale=1.0)
    session = SearchSession(model)
    config = GenerationConfig(num_beams=1, max_new_tokens=5)
    bad, good = session.add([0, 1], [SearchRequest(config, on_token=refuse), SearchRequest(config)])
    ended = {e.id: e for e in _all(session) if isinstance(e, Finished)}
    assert isinstance(ended[bad].error, KeyError) and ended[bad].answers == []
    assert same(ended[good].answers, alone(model, 1, SearchRequest(config)))


def test_a_callback_may_cancel() -> None:
    session = SearchSession(ToyDecoder(vocabulary=V, scale=1.0))
    config = GenerationConfig(num_beams=1, max_new_tokens=5, min_new_tokens=5)
    wanted = SearchRequest(config, on_token=lambda event: event.step == 2 and session.cancel(event.id))
    session.add([0], [wanted])
    assert _all(session) == []


def test_logits_that_are_no_numbers_end_their_request_alone() -> None:
    class Broken(ToyDecoder):
        def logits_after(self, sample: int, history: tuple[int, ...]) -> torch.Tensor:
            logits = super().logits_after(sample, history)
            return logits * torch.nan if sample in (1, 3) and len(history) == 3 else logits

    config = GenerationConfig(num_beams=2, max_new_tokens=6, min_new_tokens=6)
    wanted = [config, config, replace(config, do_sample=True), replace(config, do_sample=True)]
    model = Broken(vocabulary=V, scale=1.0)
    session = SearchSession(model)
    ids = session.add(range(4), [SearchRequest(one) for one in wanted])
    ended = {event.id: event for event in _all(session) if isinstance(event, Finished)}
    for sample, id in enumerate(ids):
        if sample in (1, 3):
            assert isinstance(ended[id].error, OfakernRuntimeError) and "NaN at step 2" in str(ended[id].error)
        else:
            assert same(ended[id].answers, alone(model, sample, SearchRequest(wanted[sample])))
    with pytest.raises(OfakernRuntimeError, match="NaN at step 2"):
        generate(model, 2, 2, config)


def test_tokens_and_words_that_are_not_wanted() -> None:
    model = ToyDecoder(vocabulary=10, scale=1.0)
    free = generate(model, 5, 5, GenerationConfig(num_beams=3, max_new_tokens=12, min_new_tokens=9))
    first = free[0][0].tokens[0]
    assert any(8 in answer.tokens for (answer,) in free)
    for base in (GenerationConfig(num_beams=3, max_new_tokens=12), GenerationConfig(do_sample=True, max_new_tokens=12)):
        for (answer,) in generate(model, 5, 5, base.replace(suppress_tokens=[4, 5])):
            assert not {4, 5} & set(answer.tokens)
        words = base.replace(bad_words_ids=[[6, 7], [8], [3, 4, 9]], begin_suppress_tokens=[first], min_new_tokens=9)
        for (answer,) in generate(model, 5, 5, words):
            text = "".join(map(str, answer.tokens))
            assert "67" not in text and "8" not in text and "349" not in text and answer.tokens[0] != first
    with pytest.raises(OfakernValueError, match=r"in the vocabulary \(10\), got 10"):
        generate(model, 1, 1, GenerationConfig(suppress_tokens=[10]))


def test_repetition_penalty_is_that_of_ctrl() -> None:
    model = ToyDecoder(vocabulary=9, scale=1.0)
    config = GenerationConfig(num_beams=1, max_new_tokens=8, min_new_tokens=8, repetition_penalty=3.0)
    (answer,) = generate(model, 1, 1, config)[0]
    history: tuple[int, ...] = (0,)
    for token in answer.tokens[:8]:
        logits = model.logits_after(0, history).clone()
        for seen in set(history[1:]):
            logits[seen] = logits[seen] / 3 if logits[seen] > 0 else logits[seen] * 3
        logits[[1, EOS]] = -torch.inf
        assert token == int(logits.argmax())
        history = (*history, token)


def test_closed_sets_take_the_logits_they_need_only() -> None:
    plain, hidden = ToyDecoder(vocabulary=V, scale=1.0), HiddenDecoder(V, 1.0)
    wanted = [
        SearchRequest(GenerationConfig(num_beams=3, num_return_sequences=3), CLOSED),
        SearchRequest(GenerationConfig(), CLOSED),
        SearchRequest(GenerationConfig(do_sample=True, num_return_sequences=5, top_p=0.9), OTHER),
        SearchRequest(GenerationConfig(num_beams=2, repetition_penalty=1.5, temperature=0.5), OTHER, prefix=(7, 8)),
        SearchRequest(
            GenerationConfig(num_beams=4, num_beam_groups=2, diversity_penalty=3.0, suppress_tokens=(9,)), CLOSED
        ),
    ]
    session = SearchSession(hidden)
    ids = session.add(range(len(wanted)), wanted)
    found = run(session)
    for sample, (id, request) in enumerate(zip(ids, wanted, strict=True)):
        assert same(found[id], alone(plain, sample, request)), sample
    assert hidden.whole_steps == 2, "only while a prefix is forced"
    codes = automaton(RangeTokens(20, 36, 6, renormalise=True))
    whole = codes.unnormalised()
    for config in (GenerationConfig(num_beams=3), GenerationConfig(do_sample=True, num_return_sequences=3, top_k=9)):
        before = hidden.whole_steps
        (id,) = session.add([5], [SearchRequest(config, codes)])
        drawn = run(session)[id]
        assert same(drawn, alone(plain, 5, SearchRequest(config, codes)))
        assert hidden.whole_steps == before + 1, "only for the end"
        if config.do_sample:  # the same draws as over the whole vocabulary, other log-probabilities
            assert {a.tokens for a in drawn} == {a.tokens for a in alone(plain, 5, SearchRequest(config, whole))}
            assert not same(drawn, alone(plain, 5, SearchRequest(config, whole)))
    session.add([0], [SearchRequest(GenerationConfig(suppress_tokens=(V,)), CLOSED)])
    (ended,) = _all(session)
    assert isinstance(ended, Finished) and "in the vocabulary (40), got 40" in str(ended.error)


def test_refused() -> None:
    session = SearchSession(ToyDecoder(vocabulary=V))
    with pytest.raises(OfakernValueError, match=r"positions \(4\), got 9"):
        session.add([0, 1], [SearchRequest(), SearchRequest(prefix=(5,) * 9, max_positions=5)])
    assert session.running == 0 and session.add([], []) == [] and session.step() == []


def _all(session: SearchSession) -> list[Finished | TokenEvent]:
    events = []
    while session.running:
        events += session.step()
    return events
