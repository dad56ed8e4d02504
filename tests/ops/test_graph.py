"""Recorded steps, by the CPU's stand-in for CUDA graphs; and that the stand-in finds what a GPU would break."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from replay import Replayer, stand_in
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ofakern.errors import OfakernRuntimeError, OfakernValueError
from ofakern.ops.attention import AttentionLayout, attention, intervals
from ofakern.ops.cross_entropy import cross_entropy
from ofakern.ops.graph import RECORDERS, StepGraph, recorder_for
from ofakern.ops.layer_norm import add_layer_norm

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def graphs() -> Iterator[None]:
    with stand_in():
        yield


def record(function: Callable[[], object], warmups: int = 0) -> StepGraph[object]:
    return StepGraph(function, recorder_for(CPU), warmups=warmups)


def test_a_replay_computes_from_what_its_inputs_hold_now() -> None:
    x, weight = torch.ones(3, 4), torch.full((4, 2), 2.0)
    step = StepGraph(lambda: (x @ weight).relu().t().sum(1), recorder_for(CPU), warmups=1)
    assert step.result.isnan().all()  # recording computes nothing
    assert torch.equal(step.replay(), torch.full((2,), 24.0))
    x.fill_(-1.0)
    x[0] = 3.0
    assert torch.equal(step.replay(), torch.full((2,), 24.0))
    weight.mul_(2)
    assert torch.equal(step.replay(), torch.full((2,), 48.0)) and step.replay() is step.result


def test_recording_changes_no_tensor_and_draws_no_number() -> None:
    x, norm = torch.zeros(2, 3), nn.BatchNorm1d(3)
    state = torch.get_rng_state()

    def step() -> Tensor:
        x.add_(torch.rand_like(x))
        return norm(x)  # changes its running statistics behind the schema's back

    recorded = StepGraph(step, recorder_for(CPU), warmups=0)
    assert not x.any() and torch.equal(torch.get_rng_state(), state)
    assert not norm.running_mean.any() and norm.num_batches_tracked == 0
    recorded.replay()
    recorded.replay()
    replayed, mean = x.clone(), norm.running_mean.clone()
    torch.set_rng_state(state)
    x.zero_()
    norm.reset_running_stats()
    step()
    step()
    assert torch.equal(x, replayed) and torch.equal(norm.running_mean, mean) and norm.num_batches_tracked == 2


def test_forward_and_backward_of_our_ops() -> None:
    """One graph of kernels, dropout and gradients gives the bits of the same calls, whatever the inputs."""
    layout = AttentionLayout.build(intervals.causal([3, 5]), [3, 5], [3, 5])
    weight, bias = nn.Parameter(torch.randn(16)), nn.Parameter(torch.randn(16))
    head, x = nn.Parameter(torch.randn(11, 16)), torch.randn(8, 16)
    labels = torch.tensor([1, 2, -100, 4, 5, 6, 7, 8])
    parameters = [weight, bias, head]

    def step() -> tuple[Tensor, ...]:
        q = (x * weight).view(8, 2, 8)
        y = attention(q, q, q, layout, dropout_p=0.3).flatten(1)
        y, _ = add_layer_norm(y, x, weight, bias, dropout_p=0.2)
        loss = cross_entropy(y, head, labels, epsilon=0.1).loss * 0.25
        return loss.detach(), *torch.autograd.grad(loss, parameters)

    recorded = StepGraph(step, recorder_for(CPU), warmups=1)
    for seed in range(3):
        x.copy_(torch.randn(8, 16))
        labels[1:3] = torch.tensor([seed, -100])
        torch.manual_seed(seed)
        expected = [tensor.clone() for tensor in step()]
        torch.manual_seed(seed)
        for tensor, eager in zip(recorded.replay(), expected, strict=True):
            assert torch.equal(tensor, eager)


def test_the_optimizer_steps() -> None:
    parameter = nn.Parameter(torch.ones(3))
    parameter.grad = torch.zeros(3)
    optimizer = torch.optim.AdamW([parameter], lr=torch.tensor(0.1), fused=True, capturable=True)
    twin = nn.Parameter(torch.ones(3))
    eager = torch.optim.AdamW([twin], lr=0.1, fused=True)
    optimizer.step()  # makes its state
    with torch.no_grad():
        parameter.fill_(1.0)
    optimizer.state[parameter]["step"].zero_()
    recorded = StepGraph(optimizer.step, recorder_for(CPU), warmups=0)
    assert torch.equal(parameter, torch.ones(3)) and optimizer.state[parameter]["step"] == 0
    for rate in (0.1, 0.3):
        parameter.grad.copy_(torch.tensor([1.0, -2.0, rate]))
        optimizer.param_groups[0]["lr"].fill_(rate)
        recorded.replay()
        twin.grad = parameter.grad.clone()
        eager.param_groups[0]["lr"] = rate
        eager.step()
        torch.testing.assert_close(parameter, twin)


def test_results_do_not_outlive_a_replay_of_another_graph() -> None:
    recorder, x = recorder_for(CPU), torch.ones(2)
    first, second = (StepGraph(lambda n=n: x + n, recorder, warmups=0) for n in (1, 2))
    kept = first.replay()
    assert torch.equal(kept, torch.full((2,), 2.0))
    second.replay()
    assert kept.isnan().all()


def test_inference_mode() -> None:
    x = torch.ones(3)

    @torch.inference_mode()
    def step() -> Tensor:
        return x.cumsum(0).add_(1)

    assert torch.equal(StepGraph(step, recorder_for(CPU)).replay(), torch.tensor([2.0, 3.0, 4.0]))


X = torch.tensor([1.0, 0.0, 2.0])
INDEX = torch.tensor([1, 0, 2])
FAULTS: dict[str, Callable[[], object]] = {
    "item": lambda: (X + 1).sum().item(),
    "float": lambda: float(X[0]),
    "if": lambda: X.sum() and 1,
    "tolist": lambda: (X + 1).tolist(),
    "numpy": lambda: (X + 1).numpy(),
    "__array__": lambda: np.asarray(X + 1),
    "cpu": lambda: (X + 1).cpu(),
    "tensor": lambda: X + torch.tensor([1.0, 2.0, 3.0]),
    "from_numpy": lambda: X + torch.from_numpy(np.ones(3, np.float32)),
    "arange": lambda: X + torch.arange(3),
    "nonzero": lambda: X.nonzero(),
    "mask": lambda: X[X > 0],
    "masked_select": lambda: X.masked_select(X > 0),
    "unique": lambda: X.unique(),
    "repeat_interleave": lambda: X.repeat_interleave(INDEX),
    "equal": lambda: torch.equal(X, X + 1),
    "generator's state": lambda: checkpoint(torch.square, X, use_reentrant=False),
    "generator": lambda: torch.rand(3, generator=torch.Generator(), device="cpu"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_a_gpu_would_not_record_is_found(name: str) -> None:
    FAULTS[name]()  # it runs where nothing records
    with pytest.raises(OfakernRuntimeError, match="decode must leave its values on the device .*, got: operation"):
        StepGraph(FAULTS[name], recorder_for(CPU), warmups=0, name="decode")
    assert torch.equal(record(lambda: X + 1).replay(), X + 1)  # nothing is left behind


def test_a_read_that_nothing_sees_is_frozen_and_shows_in_the_results() -> None:
    x = torch.ones(3)

    def step() -> Tensor:
        return x * ctypes.c_float.from_address(x.data_ptr()).value

    recorded = StepGraph(step, recorder_for(CPU), warmups=0)
    assert torch.equal(recorded.replay(), step())
    x.fill_(3.0)
    assert not torch.equal(recorded.replay(), step())


class Cuda:
    """What `CudaRecorder` uses of torch.cuda: the current stream, and graphs as torch 2.13 ends their recording."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.current, self.calls = "main", list[str]()
        for name in ("Stream", "current_stream", "graph_pool_handle", "stream", "CUDAGraph", "graph"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))

    def Stream(self, device: torch.device) -> Any:  # noqa: N802
        return SimpleNamespace(name="side", wait_stream=lambda other: self.calls.append(f"side waits {other.name}"))

    def current_stream(self, device: torch.device) -> Any:
        own = self.current
        return SimpleNamespace(name=own, wait_stream=lambda other: self.calls.append(f"{own} waits {other.name}"))

    def graph_pool_handle(self) -> str:
        return "pool"

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        before, self.current = self.current, stream.name
        try:
            yield
        finally:
            self.current = before

    def CUDAGraph(self) -> Any:  # noqa: N802
        return SimpleNamespace(replay=lambda: self.calls.append("replay"))

    @contextmanager
    def graph(self, graph: Any, pool: str, stream: Any) -> Iterator[None]:
        self.current, before = stream.name, self.current
        self.calls.append(f"record in {pool}")
        try:
            yield
        except RuntimeError:
            raise RuntimeError("capture invalidated") from None  # and the stream stays
        self.current = before


def test_a_gpu_records_on_a_side_stream_and_gives_the_current_one_back(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda(monkeypatch)
    recorder, streams = recorder_for(torch.device("cuda:0")), list[str]()
    step = StepGraph(lambda: streams.append(cuda.current), recorder, warmups=2)
    step.replay()
    assert streams == ["side"] * 3 and cuda.current == "main"
    assert cuda.calls == ["side waits main", "main waits side", "record in pool", "replay"]

    def broken() -> None:
        raise RuntimeError("item in a capture")

    with pytest.raises(OfakernRuntimeError, match="got: item in a capture"):
        StepGraph(broken, recorder, warmups=0)
    assert cuda.current == "main"


def test_what_a_step_reads_lives_as_long_as_its_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    Cuda(monkeypatch)
    x = torch.ones(2)
    alive, step = weakref.ref(x), StepGraph(partial(torch.mul, x, 2), recorder_for(torch.device("cuda")), warmups=0)
    del x
    assert alive() is not None
    del step
    assert alive() is None


def test_our_errors_pass_unchanged() -> None:
    def refuse() -> None:
        raise OfakernValueError("mine: x must be 1, got 2")

    with pytest.raises(OfakernValueError, match="mine"):
        record(refuse)


def test_only_a_gpu_records() -> None:
    assert RECORDERS["cpu"] is Replayer
    del RECORDERS["cpu"]
    try:
        with pytest.raises(OfakernValueError, match="Mine: device must be a GPU, got cpu"):
            recorder_for(CPU, "Mine")
    finally:
        RECORDERS["cpu"] = Replayer
