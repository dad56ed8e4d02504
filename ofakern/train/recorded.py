"""Updates by CUDA graphs: micro-batches whose shapes have come before and the optimizer's step are replayed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from dataclasses import asdict, dataclass
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from ofakern.data.batch import PackedBatch
from ofakern.errors import OfakernWarning
from ofakern.ops.graph import StepGraph, recorder_for
from ofakern.tasks import Task
from ofakern.train.config import TrainConfig
from ofakern.train.inputs import LengthsRead, owned, signature, tensors_of
from ofakern.train.optimizer import clipped_step
from ofakern.train.step import Step, Trainable, numbers

MOST_GRAPHS = 32

G = TypeVar("G")
_Used = frozenset[int]  # parameters that have a gradient, by their number


@dataclass
class GraphCounts:
    """recorded: graphs of micro-batches that there are; replayed, eager: micro-batches that ran so."""

    recorded: int = 0
    replayed: int = 0
    eager: int = 0


class Recurring(Generic[G]):
    """What was recorded for keys: at the second time that a key comes, of at most `most` of them."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._seen: set[int] = set()  # hashes only: most keys may never come again
        self._kept: dict[Hashable, G] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def find(self, key: Hashable, record: Callable[[], G]) -> G | None:
        """What there is for a key, recorded now if it is time; None: it is not, or there are too many."""
        again = hash(key) in self._seen
        self._seen.add(hash(key))
        if again and key not in self._kept and len(self) < self.most:
            self._kept[key] = record()
        return self._kept.get(key)


class _Loss(NamedTuple):
    """A recorded micro-batch. inputs: the batch's tensors, and what its loss is multiplied by."""

    inputs: list[Tensor]
    graph: StepGraph[tuple[Tensor, _Used]]


class RecordedStep(Step):
    """The step of a GPU that records what comes again.

    A micro-batch runs eagerly when its signature comes for the first time, which also does what is done lazily. All
    gradients are added into the same tensors, which stay; a parameter that no micro-batch of an update used gets no
    step, as without graphs.

    Attributes:
        counts: how micro-batches ran so far.
    """

    def __init__(self, model: Trainable, config: TrainConfig, device: torch.device) -> None:
        self._recorder = recorder_for(device, "TrainConfig: cuda_graphs")
        super().__init__(model, config, device)
        self._parameters = [p for p in model.network.parameters() if p.requires_grad]
        self._gradients = [torch.zeros_like(p) for p in self._parameters]
        self._losses: Recurring[_Loss] = Recurring(MOST_GRAPHS)
        self._steps: Recurring[StepGraph[Tensor]] = Recurring(MOST_GRAPHS)
        self._used: _Used = frozenset()
        self._unrecorded: set[str] = set()  # tasks
        self._full = False
        self.counts = GraphCounts()

    def backward(self, task: Task, batch: PackedBatch, total: float) -> Tensor:
        recorded = self._recorded(task, batch)
        if recorded is None:
            self.counts.eager += 1
            weight = torch.full((), task.weight / total, device=self._device)
            found, used = self._add_gradients(task, batch.to(self._device), weight)
        else:
            self.counts.replayed += 1
            *tensors, weight = recorded.inputs
            weight.fill_(task.weight / total)
            for tensor, new in zip(tensors, tensors_of(batch), strict=True):
                tensor.copy_(new, non_blocking=True)
            found, used = recorded.graph.replay()
        self._used |= used
        return found.clone()  # another graph may write over it

    def optimize(self, rate: float) -> Tensor:
        for group in self.optimizer.param_groups:
            group["lr"].fill_(rate)
        used, self._used = self._used, frozenset()
        for number, parameter in enumerate(self._parameters):
            parameter.grad = self._gradients[number] if number in used else None
        graph = self._steps.find(used, lambda: self._graph(lambda: self._change_weights(used), "the optimizer's step"))
        return self._change_weights(used) if graph is None else graph.replay().clone()

    def report(self) -> dict[str, dict[str, int]]:
        return {"graphs": asdict(self.counts)}

    def _recorded(self, task: Task, batch: PackedBatch) -> _Loss | None:
        """The graph for a micro-batch, if there is one."""
        if task.name in self._unrecorded:
            return None
        if not self._model.prepare_batch(batch):
            self._leave_out(task, "their loss reads or draws on the host")
            return None
        try:
            key = signature(batch), self._smoothing(task)
            found = self._losses.find(key, lambda: self._record(task, batch))
        except LengthsRead as error:
            self._leave_out(task, str(error))
            return None
        if found is None and len(self._losses) == MOST_GRAPHS and not self._full:
            self._full = True
            _tell(f"there are {MOST_GRAPHS} graphs, so micro-batches of other shapes run eagerly\nTry: a larger pad_to")
        self.counts.recorded = len(self._losses)
        return found

    def _leave_out(self, task: Task, reason: str) -> None:
        self._unrecorded.add(task.name)
        _tell(f"micro-batches of task {task.name!r} run eagerly: {reason}")

    def _record(self, task: Task, batch: PackedBatch) -> _Loss:
        own, weight = owned(batch, self._device), torch.ones((), device=self._device)
        graph = self._graph(lambda: self._add_gradients(task, own, weight), f"the loss of task {task.name!r}")
        return _Loss([*tensors_of(own), weight], graph)

    def _graph(self, function: Callable[[], G], name: str) -> StepGraph[G]:
        return StepGraph(function, self._recorder, warmups=0, name=name)

    def _add_gradients(self, task: Task, batch: PackedBatch, weight: Tensor) -> tuple[Tensor, _Used]:
        sums = self._sums(task, batch)
        # Not backward(): a node that accumulates would wait for the stream on which it was made.
        found = torch.autograd.grad(sums.loss * weight, self._parameters, allow_unused=True)
        used = [number for number, gradient in enumerate(found) if gradient is not None]
        torch._foreach_add_([self._gradients[n] for n in used], [found[n] for n in used])
        return numbers(sums), frozenset(used)

    def _change_weights(self, used: _Used) -> Tensor:
        norm = clipped_step(self.optimizer, self._config.clip_norm)
        if used:
            torch._foreach_zero_([self._gradients[n] for n in used])
        return norm


def _tell(text: str) -> None:
    warnings.warn(f"cuda_graphs: {text}", OfakernWarning, stacklevel=2)
