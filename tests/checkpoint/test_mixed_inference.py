"""Instructions of all kinds in one batch: each row's answer is its own, streamed or not, searched or drawn."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from replay import stand_in
from scenes import COLOURS, scenes, small_model, tasks

from ofakern.checkpoint import GeneralistModel, StreamPiece
from ofakern.errors import OfakernValueError
from ofakern.generate import Finished, SearchSession
from ofakern.modality.output import Output

ROWS = scenes()
SLOTS = "[IMAGE:img] -> [BOX:where] colour [TEXT:what,closed_set] block"
GROUP = "[IMAGE:img] objects? -> ([BOX:b] [TEXT:t])*"
REQUESTS: list[Any] = [
    ("caption", ROWS[0]),
    ("vqa", ROWS[1]),
    ("grounding", ROWS[2], {"num_beams": 2, "num_return_sequences": 2}),
    ("[IMAGE:img] what is it? -> a red [TEXT:cap]", ROWS[3], {"max_new_tokens": 6}),
    (GROUP, ROWS[4], {"max_new_tokens": 14, "num_beams": 3}),
    ("caption", ROWS[5], {"do_sample": True, "num_return_sequences": 3, "top_k": 40, "seed": 9}),
    (
        "[TEXT:q] in other words -> [TEXT:answer]",
        {"q": "which colour is it?"},
        {"num_beams": 1, "early_stopping": False},
    ),
    ("caption", ROWS[1], {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5}),
    ("[IMAGE:img] -> [TEXT:name,no_loss] is [TEXT:cap]", ROWS[2], {"compat": "ofasys", "max_new_tokens": 5}),
]
SETTINGS: dict[str, Any] = {"max_new_tokens": 9}


@pytest.fixture(scope="module")
def model() -> GeneralistModel:
    """Not trained, but with weights that make up their mind."""
    made = small_model(init_std=0.3)
    made.prepare(tasks())
    return made


def alone(model: GeneralistModel, request: Any) -> Any:
    own = request[2] if len(request) == 3 else {}
    return model.inference(request[0], request[1], **{**SETTINGS, **own})


def same(found: Any, expected: Any) -> bool:
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(same, found, expected))
    close = pytest.approx(expected.token_log_probs, abs=1e-4) == found.token_log_probs
    return close and (found.tokens, found.values, found.text) == (expected.tokens, expected.values, expected.text)


@pytest.mark.parametrize("batch_size", [3, 20])
def test_each_row_of_a_mixed_batch_gets_its_own_answer(model: GeneralistModel, batch_size: int) -> None:
    found = model.inference(REQUESTS, batch_size=batch_size, **SETTINGS)
    for request, answer in zip(REQUESTS, found, strict=True):
        assert same(answer, alone(model, request)), request[0]
    assert isinstance(found[2], list) and len(found[5]) == 3 and found[1].text in COLOURS
    assert found[3].tokens[:2] == model.tokenizer.encode("a red")[:2]
    assert len(found[0].token_log_probs) == len(found[0].tokens)
    total = sum(found[0].token_log_probs) / len(found[0].tokens)
    assert found[0].score == pytest.approx(total, abs=1e-5)


def test_steps_as_cuda_graphs_give_the_same(model: GeneralistModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the CPU's stand-in, all kinds of requests together: codes and boxes, streams of rows that end and join."""
    sessions: list[SearchSession] = []
    began = GeneralistModel.search_session

    def begin(self: GeneralistModel) -> SearchSession:
        sessions.append(began(self))
        return sessions[-1]

    expected = model.inference(REQUESTS, batch_size=4, **SETTINGS)
    monkeypatch.setattr(model, "cuda_graphs", True)
    monkeypatch.setattr(GeneralistModel, "search_session", begin)
    with stand_in():
        found = model.inference(REQUESTS, batch_size=4, **SETTINGS)
    assert all(map(same, found, expected)), [(f, e) for f, e in zip(found, expected, strict=True) if not same(f, e)]
    use = sessions[0].graph_use
    assert (
        use.replayed > 10
        and not use.without
        and set(use.chosen_after)
        == {
            "groups of diverse beams choose one after the other",
            "beams in a forced prefix that they may leave choose on the CPU",
        }
    )


def test_places_that_become_free_are_taken(model: GeneralistModel, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, add = [], SearchSession.add

    def noted(self: SearchSession, *arguments: Any) -> list[int]:
        ids = add(self, *arguments)
        sizes.append((len(ids), self.running))
        return ids

    monkeypatch.setattr(SearchSession, "add", noted)
    rows = [("caption", ROWS[n % 6], {"max_new_tokens": 2 + 5 * (n % 2), "num_beams": 1}) for n in range(10)]
    found = model.inference(rows, batch_size=4)
    assert sum(new for new, _ in sizes) == 10 and max(running for _, running in sizes) == 4
    assert any(new < running for new, running in sizes), "others join those that still run"
    assert all(same(one, alone(model, row)) for one, row in zip(found, rows, strict=True))
    sizes.clear()
    model.inference(rows, batch_size=4, compat="ofasys")
    assert [new for new, _ in sizes] == [4, 4, 2]


def test_two_lists_are_pairs(model: GeneralistModel) -> None:
    pairs = model.inference([("vqa", ROWS[0]), ("caption", ROWS[1])], **SETTINGS)
    lists = model.inference(["vqa", "caption"], [ROWS[0], ROWS[1]], **SETTINGS)
    assert all(map(same, pairs, lists))
    both = model.inference(["vqa", "caption"], ROWS[0], **SETTINGS)
    assert same(both[0], pairs[0]) and model.inference([], []) == [] and model.inference("vqa", []) == []


@pytest.mark.parametrize("request_", [("vqa",), ("vqa", ROWS[0], {}, 1), (3, ROWS[0]), 7])
def test_requests_of_another_form_are_named(model: GeneralistModel, request_: Any) -> None:
    with pytest.raises(OfakernValueError, match=r"request 1 must be \(instruction, row\)"):
        model.inference([("vqa", ROWS[0]), request_])


@pytest.mark.parametrize("settings", [{"num_beams": 1}, {"num_beams": 3}, {"do_sample": True, "seed": 4}])
def test_pieces_make_up_the_text(model: GeneralistModel, settings: Any) -> None:
    pieces: list[StreamPiece] = []
    rows = [("caption", ROWS[0]), ("caption", ROWS[1]), (GROUP, ROWS[2])]
    found = model.inference(rows, stream=pieces.append, **SETTINGS, **settings)
    for number, output in enumerate(found):
        own = [piece for piece in pieces if piece.row == number]
        assert [piece.token for piece in own] == output.tokens
        assert [piece.log_prob for piece in own] == pytest.approx(output.token_log_probs, abs=1e-5)
        assert own[-1].slot is None and own[-1].text == ""
        if number < 2:
            assert {piece.slot for piece in own[:-1]} <= {"cap"}
            assert "".join(piece.text for piece in own).rstrip("\ufffd") == output.text.rstrip("\ufffd")
        else:
            assert [piece.slot for piece in own[:4]] == ["b"] * 4
    with pytest.raises(KeyError, match="stop"):
        model.inference(rows, stream=lambda piece: {}["stop"], **SETTINGS)


def test_a_session_of_prepared_requests(model: GeneralistModel) -> None:
    prepared = [
        model.prepare_request(one[0], one[1], number=n, **{**SETTINGS, **(one[2] if len(one) == 3 else {})})
        for n, one in enumerate(REQUESTS[:6])
    ]
    session, found = model.search_session(), {}
    waiting = list(enumerate(prepared))
    ids: dict[int, int] = {}
    while waiting or session.running:
        if waiting:
            number, one = waiting.pop()
            (id,) = session.add(model.encode_requests([one]), [one.search], model.writer(one.writer_key))
            ids[id] = number
        for event in session.step():
            assert isinstance(event, Finished) and event.error is None
            found[ids[event.id]] = prepared[ids[event.id]].read(event.answers)
    for number, one in enumerate(prepared):
        assert same(found[number], alone(model, REQUESTS[number])) and same(model.run_request(one), found[number])
    assert model.plan_for("vqa").target[0].slots[0].name == "answer"


def test_what_follows_from_an_instruction_is_kept(model: GeneralistModel) -> None:
    first, again = (model.prepare_request("vqa", row) for row in ROWS[:2])
    assert first.recipe is again.recipe and first.search.automaton is again.search.automaton
    other = model.prepare_request("vqa", ROWS[0], closed_set=["red", "pink"])
    assert other.recipe is not first.recipe
    before = model.preprocess
    model.preprocess = replace(before, max_target_length=32)
    try:
        changed = model.prepare_request("vqa", ROWS[0])
        assert changed.recipe is not first.recipe and changed.search.max_positions == 32
    finally:
        model.preprocess = before
    bare = model.prepare_request("caption", ROWS[0], keep_images=False)
    output = model.run_request(bare)
    assert isinstance(output, Output) and output.image is None


def test_answers_do_not_depend_on_threads_or_torchs_generator(model: GeneralistModel) -> None:
    torch.manual_seed(1)
    first = model.inference("caption", ROWS[0], do_sample=True, seed=3, **SETTINGS)
    torch.manual_seed(2)
    again = model.inference("caption", ROWS[0], do_sample=True, seed=3, **SETTINGS)
    assert same(first, again)
