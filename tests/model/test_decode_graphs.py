"""Decode steps as CUDA graphs, by the CPU's stand-in: rows, kinds and positions of any kind, as without graphs."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from replay import stand_in
from torch import Tensor

from ofakern.errors import OfakernValueError
from ofakern.model import OFAPlus
from ofakern.model.decode import DecodeState, graphs, weights
from tests.model.test_decode_state import VARIANTS, build, close, memory_of, run


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Graphs, and layer by layer on weights that are not packed."""
    monkeypatch.setattr(weights, "can_pack", lambda weight: False)
    with stand_in():
        yield


def begin(model: OFAPlus, lengths: list[int], rows: int, most: int = 40, **segment: Any) -> list[DecodeState]:
    """The same state without graphs and with them."""
    memory = memory_of(model, lengths)
    return [model.begin_decode(memory, rows, most, cuda_graphs=on, **segment) for on in (False, True)]


def step(model: OFAPlus, states: list[DecodeState], tokens: Tensor) -> None:
    without, by_graph = (model.decode_step(state, tokens) for state in states)
    close(by_graph, without, by_graph.dtype)


@pytest.mark.parametrize("flags", VARIANTS, ids=lambda f: "-".join(f) or "default")
def test_rows_that_multiply_and_leave(flags: dict[str, Any]) -> None:
    """Past the first blocks of positions, with samples that leave; the most rows come early, so few graphs do."""
    model, generator = build(**flags), torch.Generator().manual_seed(3)
    states = begin(model, [5, 9, 3], 1)
    plans = {0: [0, 0, 0, 1, 1, 2, 2, 2], 3: [2, 0, 1, 3, 3, 3, 6, 5], 9: [0, 1, 2, 2, 7, 6], 18: [4, 5], 20: [1]}
    for number in range(36):
        step(model, states, torch.randint(4, 80, (states[0].rows,), generator=generator))
        for state in states if number in plans else ():
            state.reorder(torch.tensor(plans[number]))
    use = states[1].graph_use
    assert use.replayed == 36 and not use.without
    assert use.recorded == 3  # 4 rows, 8, and 2 once they are a quarter


def test_joined_states_of_several_kinds() -> None:
    model, generator = build(modal_ffn=True, target_slots=2), torch.Generator().manual_seed(5)
    first = begin(model, [6, 4], 2)
    second = begin(model, [11], 3, 17, adaptor="image_vqgan", modality=2)
    third = begin(model, [30], 1, target_slot=1)
    for number in range(18):
        step(model, first, torch.randint(4, 80, (first[0].rows,), generator=generator))
        if number == 3:
            for one, other in zip(first, second, strict=True):
                one.join(other)
        if number == 8:
            for one, other in zip(first, third, strict=True):
                one.reorder(torch.tensor([1, 0, 4, 5, 6]))  # the second sample leaves
                one.join(other)
    use = first[1].graph_use
    assert use.replayed == 18 and not use.without and use.recorded <= 6


def test_rewound_rows_and_dtypes() -> None:
    model = build(torch.bfloat16)
    states = begin(model, [5, 8], 1)
    for length in (20, 3, 1):
        for state in states:
            state.rewind(length)
        for token in range(4, 10):
            step(model, states, torch.tensor([token, 70 - token]))


def test_more_steps_than_the_table_is_wide() -> None:
    model = build()
    states = begin(model, [5], 2, 64)
    wide = graphs.LEAST_WIDTH
    graphs.LEAST_WIDTH = 16
    try:
        for number in range(40):
            step(model, states, torch.tensor([4 + number, 60 - number]))
    finally:
        graphs.LEAST_WIDTH = wide
    assert states[1].graph_use.recorded == 3  # 16, 32 and 64 wide


def test_the_next_state_takes_over_the_graphs() -> None:
    model = build()
    for recorded in (1, 0, 0):
        states = begin(model, [7, 9], 2)
        for number in range(20):  # with slots that are looked for again
            step(model, states, torch.tensor([4 + number, 5, 6, 7]))
        assert states[1].graph_use.recorded == recorded
        del states
        gc.collect()
    states = begin(model, [60, 9], 2)  # for which there is no room: its keys stand elsewhere
    step(model, states, torch.tensor([4, 5, 6, 7]))
    assert states[1].graph_use.recorded == 1 and len(states[1].weights.rooms) == 1


def test_what_goes_without_a_graph_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    model, memory = build(), memory_of(build(), [6])
    many = model.begin_decode(memory, 257, 4, cuda_graphs=True)
    model.decode_step(many, torch.full((257,), 5))
    assert many.graph_use.without == {"graphs have 1 to 256 rows, the step had 257": 1}
    monkeypatch.setattr(graphs, "_ROOMS", 1)
    states = [model.begin_decode(memory, 1, 4, cuda_graphs=True) for _ in range(2)]
    have = [run(model, state, [[5, 6]]) for state in states]
    assert torch.equal(torch.stack(have[0]), torch.stack(have[1]))
    assert states[0].graph_use.replayed == 2 and states[1].graph_use.replayed == 0
    assert "2 steps without a graph: 1 other states of the model" in str(states[1].graph_use)


def test_changed_weights_leave_their_graphs_behind() -> None:
    model = build()
    step(model, begin(model, [6], 1), torch.tensor([5]))
    with torch.no_grad():
        model.decoder.get_submodule("layers.0.fc1").weight.add_(0.05)
    states = begin(model, [6], 1)
    step(model, states, torch.tensor([5]))
    assert states[1].graph_use.recorded == 1


def test_the_cpu_has_no_graphs() -> None:
    model = build()
    from ofakern.ops.graph import RECORDERS

    recorder = RECORDERS.pop("cpu")
    try:
        with pytest.raises(OfakernValueError, match=r"begin_decode\(cuda_graphs=True\): device must be a GPU, got cpu"):
            model.begin_decode(memory_of(model, [6]), 1, 4, cuda_graphs=True)
    finally:
        RECORDERS["cpu"] = recorder
