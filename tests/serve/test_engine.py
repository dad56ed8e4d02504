"""The engine alone, over a model that does what a script says."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future
from typing import Any

import pytest
from scripted import ScriptedModel

from ofakern.errors import DataError, OfakernRuntimeError, OfakernValueError
from ofakern.serve import Engine, Overloaded, Progress, Stopped

WAIT = 60.0


@pytest.fixture
def model() -> ScriptedModel:
    return ScriptedModel()


@pytest.fixture
def engine(model: ScriptedModel) -> Iterator[Engine]:
    with Engine(model, max_queue=8, max_running=4, encode_batch=3) as engine:
        yield engine
        if model.gate is not None:
            model.gate.release(1000)


def gated(model: ScriptedModel) -> threading.Semaphore:
    model.gate = threading.Semaphore(0)
    return model.gate


def until(condition: Any) -> None:
    end = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.002)


def texts(futures: list[Future[Any]]) -> list[str]:
    return [future.result(WAIT).text for future in futures]


def test_every_request_gets_its_own_answer(engine: Engine) -> None:
    scripts = [f"count {1 + i % 6}" for i in range(8)]
    assert texts([engine.submit(script) for script in scripts]) == scripts


def test_requests_join_between_steps_and_leave_when_they_are_done(model: ScriptedModel, engine: Engine) -> None:
    gate = gated(model)
    long = engine.submit("count 6")
    until(lambda: engine.running == 1)
    gate.release(2)
    until(lambda: len(model.batches) == 2)
    short = [engine.submit("count 1"), engine.submit("count 2")]
    until(lambda: engine.waiting == 2)
    gate.release(100)
    assert texts([long, *short]) == ["count 6", "count 1", "count 2"]
    assert model.batches[0] == model.batches[1] == ["count 6"]
    joined = model.batches.index(["count 6", "count 1", "count 2"])
    assert model.batches[joined + 1] == ["count 6", "count 2"] and model.batches[-1] == ["count 6"]
    assert len(model.batches) == 6  # nobody waited for anybody
    assert ["count 1", "count 2"] in model.encoded  # what arrives together is encoded together


def test_no_more_run_than_may(model: ScriptedModel, engine: Engine) -> None:
    gate = gated(model)
    futures = [engine.submit(f"count {3}") for _ in range(8)]
    gate.release(1000)
    texts(futures)
    assert max(map(len, model.batches)) == 4 and max(map(len, model.encoded)) <= 3


def test_kinds_of_targets_share_steps(model: ScriptedModel, engine: Engine) -> None:
    gate = gated(model)
    futures = [engine.submit("count 7"), engine.submit("count 3")]  # each has a writer of its own
    until(lambda: engine.running == 2)
    gate.release(1000)
    assert texts(futures) == ["count 7", "count 3"]
    assert ["count 7", "count 3"] in model.batches


def test_what_no_session_holds_runs_whole(engine: Engine) -> None:
    futures = [engine.submit(script) for script in ("count 2", "whole", "whole fails", "count 3")]
    assert texts([futures[0], futures[1], futures[3]]) == ["count 2", "whole", "count 3"]
    with pytest.raises(OfakernRuntimeError, match="speech"):
        futures[2].result(WAIT)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("encode fails", "an encoder failed"),
        ("step fails 2", "a kernel failed"),
        ("own error", "logits must be finite"),
        ("read fails", "script must work"),
    ],
)
def test_a_failure_touches_nobody_else(model: ScriptedModel, engine: Engine, script: str, message: str) -> None:
    gate = gated(model)
    seen: list[Progress] = []
    futures = [engine.submit("count 6", on_progress=seen.append), engine.submit(script), engine.submit("count 5")]
    gate.release(1000)
    with pytest.raises(Exception, match=message):
        futures[1].result(WAIT)
    assert texts([futures[0], futures[2]]) == ["count 6", "count 5"]
    assert [one.tokens for one in seen] == [1, 2, 3, 4, 5, 6]  # a search begun anew reports nothing twice
    assert texts([engine.submit("count 1")]) == ["count 1"]


def test_what_cannot_be_prepared_raises_at_once(engine: Engine) -> None:
    for _ in range(20):  # its place is free again
        with pytest.raises(DataError, match="img"):
            engine.submit("bad row")
    assert engine.waiting == 0


def test_tokens_are_reported_in_order(engine: Engine) -> None:
    seen: list[Progress] = []
    assert engine.submit("count 4", on_progress=seen.append).result(WAIT).text == "count 4"
    assert [one.text for one in seen] == ["0", "0 1", "0 1 2", "0 1 2 3"]


def test_a_callback_that_raises_ends_its_request_only(model: ScriptedModel, engine: Engine) -> None:
    gate = gated(model)

    def broken(progress: Progress) -> None:
        raise ConnectionError("nobody listens")

    futures = [engine.submit("count 6", on_progress=broken), engine.submit("count 6")]
    gate.release(1000)
    with pytest.raises(ConnectionError):
        futures[0].result(WAIT)
    assert texts(futures[1:]) == ["count 6"]
    assert model.cancelled == ["count 6"]


def test_the_queue_is_bounded(model: ScriptedModel, engine: Engine) -> None:
    gate = gated(model)
    first = [engine.submit("count 1") for _ in range(3)]
    until(lambda: engine.running == 3)
    waiting = [engine.submit("count 1") for _ in range(8)]
    with pytest.raises(Overloaded, match="at most 8"):
        engine.submit("count 1")
    place = waiting.pop().cancel()  # one that was given up holds no place
    assert place
    waiting.append(engine.submit("count 1"))
    gate.release(1000)
    assert len(texts(first + waiting)) == 11
    assert "ofakern_refused_total 1" in engine.metrics.text()
    assert 'ofakern_answers_total{outcome="cancelled"} 1' in engine.metrics.text()


def test_a_cancelled_request_leaves_its_search(model: ScriptedModel, engine: Engine) -> None:
    gate = gated(model)
    futures = [engine.submit("count 50"), engine.submit("count 6")]
    gate.release(2)
    until(lambda: len(model.batches) == 2)
    futures[0].cancel()
    gate.release(1000)
    assert texts(futures[1:]) == ["count 6"]
    assert model.cancelled == ["count 50"]
    until(lambda: engine.running == 0)
    assert 'ofakern_answers_total{outcome="cancelled"} 1' in engine.metrics.text()


def test_a_place_can_be_given_back(engine: Engine) -> None:
    with engine.reserve() as place:
        assert engine.waiting == 1
    place.release()
    assert engine.waiting == 0
    with pytest.raises(Stopped, match="released"):
        place.submit("count 1")
    assert engine.waiting == 0


def test_drain_answers_what_is_there_and_takes_nothing_new(model: ScriptedModel, engine: Engine) -> None:
    gate = gated(model)
    futures = [engine.submit("count 3") for _ in range(6)]
    assert not engine.drain(0.01)
    with pytest.raises(Stopped):
        engine.submit("count 1")
    gate.release(1000)
    assert engine.drain(WAIT)
    assert texts(futures) == ["count 3"] * 6


def test_stop_fails_what_is_left(model: ScriptedModel) -> None:
    gate = gated(model)
    engine = Engine(model, max_running=1)
    futures = [engine.submit("count 3") for _ in range(3)]
    until(lambda: engine.running == 1)
    gate.release(1)
    stopping = threading.Thread(target=engine.stop)
    stopping.start()
    until(lambda: not engine.accepting)
    gate.release(1000)
    stopping.join(WAIT)
    outcomes = [future.exception(WAIT) for future in futures]
    assert all(isinstance(outcome, Stopped) for outcome in outcomes) and engine.running == engine.waiting == 0
    engine.stop()


def test_a_future_given_up_says_so(model: ScriptedModel, engine: Engine) -> None:
    gate = gated(model)
    future = engine.submit("count 3")
    assert future.cancel()
    gate.release(1000)
    with pytest.raises(CancelledError):
        future.result(WAIT)


@pytest.mark.parametrize("name", ["max_queue", "max_running", "encode_batch"])
@pytest.mark.parametrize("value", [0, -1, True, 2.5])
def test_limits_must_be_counts(model: ScriptedModel, name: str, value: Any) -> None:
    with pytest.raises(OfakernValueError, match=name):
        Engine(model, **{name: value})
