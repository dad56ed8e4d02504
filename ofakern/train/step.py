"""What an update does on the device: gradients of micro-batches, the clip, the optimizer. Nothing here waits for it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ofakern.data.batch import PackedBatch
from ofakern.nn.loss import LossSums
from ofakern.tasks import Task
from ofakern.train.config import TrainConfig
from ofakern.train.evaluate import Evaluable
from ofakern.train.optimizer import build_optimizer, clipped_step


class Trainable(Evaluable, Protocol):
    """What the trainer needs of a model."""

    def prepare(self, tasks: Sequence[Task]) -> None: ...

    def prepare_batch(self, batch: PackedBatch) -> bool:
        """Makes on the host what a loss that is recorded needs of a batch (kept in its sides' caches).

        Batches of equal shapes should get things of equal shapes. False: the loss itself reads or draws on the host.
        """

    def save_pretrained(self, directory: str | Path) -> None: ...

    def load_weights(self, directory: str | Path) -> None: ...


class Step:
    """The eager one.

    Attributes:
        optimizer: AdamW as the config says.
    """

    def __init__(self, model: Trainable, config: TrainConfig, device: torch.device) -> None:
        self.optimizer = build_optimizer(model.network, config)
        self._model, self._config, self._device = model, config, device

    def backward(self, task: Task, batch: PackedBatch, total: float) -> Tensor:
        """Adds the gradient of a micro-batch's loss, times `task.weight / total`.

        Returns its loss, nll and tokens, f64 `[3]` on the device.
        """
        sums = self._sums(task, batch.to(self._device))
        (sums.loss * (task.weight / total)).backward()  # type: ignore[no-untyped-call]
        return numbers(sums)

    def optimize(self, rate: float) -> Tensor:
        """Changes the weights by the gradients, at this learning rate; returns their norm, f64 `[1]` on the device.

        A norm that is not finite changes nothing. The gradients are gone then.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        norm = clipped_step(self.optimizer, self._config.clip_norm)
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def report(self) -> dict[str, dict[str, int]]:
        """What a line of the log says of how the steps ran."""
        return {}

    def _smoothing(self, task: Task) -> float:
        return self._config.label_smoothing if task.label_smoothing is None else task.label_smoothing

    def _sums(self, task: Task, batch: PackedBatch) -> LossSums:
        with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self._config.bf16):
            return self._model.train_step_loss(batch, self._smoothing(task))


def numbers(sums: LossSums) -> Tensor:
    """loss, nll and tokens as one detached tensor, f64 `[3]`."""
    return torch.stack((sums.loss.detach().double(), sums.nll.double(), sums.tokens.double()))
