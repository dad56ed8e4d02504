"""A step's GPU work, recorded once and replayed: CUDA graphs behind a seam that tests can stand in for.

A replay runs the recorded kernels on the recorded addresses with the recorded numbers. So a step's inputs are tensors
that are written before each replay, everything Python knows while it is recorded stays as it was, and nothing in it may
wait for the device. Not yet run on a GPU: tests/replay.py holds steps to these rules on the CPU.

Source: PyTorch's notes on CUDA graphs (docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

import torch

from ofakern.errors import OfakernError, OfakernRuntimeError, OfakernValueError

__all__ = ["RECORDERS", "CudaRecorder", "Recorder", "StepGraph", "recorder_for"]

T = TypeVar("T")


class Recorder(Protocol):
    """What records steps. Graphs of one recorder share their memory: see `StepGraph`."""

    def warm_up(self, function: Callable[[], object], times: int) -> None:
        """Call `function` so often, as it will be recorded and for real."""

    def record(self, function: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        """Its result, not yet computed, and what computes it. RuntimeError: something in it cannot be recorded."""


class CudaRecorder:
    """torch.cuda.CUDAGraph. All graphs are recorded on one side stream, into one pool of memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, function: Callable[[], object], times: int) -> None:
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            for _ in range(times):
                function()
        current.wait_stream(self._stream)

    def record(self, function: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        graph = torch.cuda.CUDAGraph()
        # A recording that breaks leaves its stream the current one; the outer context takes it back.
        current = torch.cuda.stream(torch.cuda.current_stream(self._device))
        with current, torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            result = function()
        return result, graph.replay


# By the type of a device. Tests put a stand-in at "cpu".
RECORDERS: dict[str, Callable[[torch.device], Recorder]] = {"cuda": CudaRecorder}


def recorder_for(device: torch.device, where: str = "StepGraph") -> Recorder:
    """A recorder of its own memory. OfakernValueError (in the words of `where`): nothing records on this device."""
    if device.type not in RECORDERS:
        raise OfakernValueError(f"{where}: device must be a GPU, got {device}\nTry: without CUDA graphs")
    return RECORDERS[device.type](device)


class StepGraph(Generic[T]):
    """A recorded step.

    function: reads and writes tensors that live as long as the graph (it is kept, and so is what it refers to), and
    returns tensors (in any structure). It is called `warmups` times for real (lazy initialisation, compilation) and
    once more to be recorded, which changes no tensor and draws no random number. recorder: of `recorder_for`; name: of
    the step, for errors.

    Attributes:
        result: what `function` returned when it was recorded; every replay writes it. Until the first one it holds
            nothing, and a replay of another graph of the same recorder may overwrite it: copy what must stay.

    Raises:
        OfakernRuntimeError: something in the step waits for the host or brings data from it, which cannot be recorded.
    """

    def __init__(self, function: Callable[[], T], recorder: Recorder, *, warmups: int = 2, name: str = "step") -> None:
        self._function = function
        recorder.warm_up(function, warmups)
        try:
            self.result, self._replay = recorder.record(function)
        except OfakernError:
            raise
        except RuntimeError as error:
            # The end of a recording that broke raises again, of the recording itself.
            cause = error.__context__ or error
            raise OfakernRuntimeError(
                f"StepGraph: {name} must leave its values on the device while it is recorded, got: {cause}"
            ) from error

    def replay(self) -> T:
        """Run the step again, on the current stream; returns `result`."""
        self._replay()
        return self.result
