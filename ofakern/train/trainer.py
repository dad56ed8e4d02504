"""Training one model on several tasks at once: every update takes micro-batches of every task."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ofakern.data.example import Split
from ofakern.errors import OfakernTypeError, OfakernValueError
from ofakern.tasks import Task
from ofakern.train.config import TrainConfig
from ofakern.train.evaluate import Evaluable, evaluate
from ofakern.train.run import Run, TrainResult
from ofakern.train.signals import graceful_stop
from ofakern.train.step import Trainable


class Trainer:
    """Trains and evaluates as a `TrainConfig` says, which lists all settings with their units.

    Keyword arguments stand for single settings: `Trainer(max_updates=100, bf16=True)`.
    Raises OfakernTypeError for an unknown setting, OfakernValueError for one out of range.
    """

    def __init__(self, config: TrainConfig | None = None, **kwargs: Any) -> None:
        if config is not None and not isinstance(config, TrainConfig):
            raise OfakernTypeError(f"Trainer: config must be a TrainConfig, got {type(config).__name__}")
        self.config = (config or TrainConfig()).replace(**kwargs)

    def fit(self, *, model: Trainable, tasks: Task | Sequence[Task], resume: bool | str | Path = False) -> TrainResult:
        """Train `model` on `tasks` and leave it in eval mode.

        Every update takes `update_freq` micro-batches of every task; the gradient is that of the weighted sum of all
        their losses over the number of all their target tokens. Started by torchrun, each rank takes its own share.

        Args:
            model: a `GeneralistModel`; it learns the tasks' plans, and without a vocabulary gets one here.
            tasks: one or several, each with training rows and a name of its own.
            resume: True goes on from the newest checkpoint in output_dir, a path from that one. The run then gives the
                same bits as one that was never interrupted.

        Returns:
            TrainResult: updates done, seconds, history (one dict for each logged update), the last evaluation,
            broken samples by task, the last checkpoint, and whether a signal stopped the run.

        Raises:
            OfakernValueError: no task, two of one name, or one without training rows.
            DataError: too many broken samples. OfakernRuntimeError: a loss or gradient that is not finite.
            CheckpointError: nothing to resume from, or another run's checkpoint.
        """
        chosen = [tasks] if isinstance(tasks, Task) else list(tasks)
        _check_tasks(chosen)
        model.prepare(chosen)
        run = Run(self.config, model, chosen)
        try:
            if resume:
                run.resume(None if resume is True else Path(resume))
            with torch.random.fork_rng(), graceful_stop() as stop:
                return run.loop(stop)
        finally:
            run.close()

    def evaluate(
        self, *, model: Evaluable, tasks: Task | Sequence[Task], split: Split = "test"
    ) -> dict[str, dict[str, float]]:
        """Task -> {"nll", metrics...} on a split; tasks without rows for it are left out.

        nll: mean per target token, in nats; the metrics are the task's own, on generated answers. "broken" counts rows
        that could not be read, where there are any.
        The model must know the tasks (`fit`, `GeneralistModel.for_tasks` or a saved model).
        """
        chosen = [tasks] if isinstance(tasks, Task) else list(tasks)
        return evaluate(model, chosen, split, seed=self.config.seed, bf16=self.config.bf16)


def _check_tasks(tasks: Sequence[Task]) -> None:
    if not tasks:
        raise OfakernValueError("Trainer.fit: tasks must hold at least one task, got none")
    names = [task.name for task in tasks]
    if len(set(names)) != len(names):
        raise OfakernValueError(f"Trainer.fit: tasks must have different names, got {names}")
    for task in tasks:
        if task.rows("train") is None:
            raise OfakernValueError(
                f"Trainer.fit: task {task.name!r} must have training rows, got none"
                '\nTry: task.add_dataset(rows, "train")'
            )
