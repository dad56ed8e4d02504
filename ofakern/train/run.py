"""One run of the trainer: the loop over updates, its reports, evaluations and checkpoints."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ofakern.data.batch import IGNORE_LABEL
from ofakern.data.dataset import TaskDataset
from ofakern.errors import CheckpointError, OfakernRuntimeError, OfakernValueError
from ofakern.tasks import Task
from ofakern.train.checkpoints import latest_checkpoint, load_checkpoint, save_checkpoint
from ofakern.train.config import TrainConfig
from ofakern.train.distributed import Ranks
from ofakern.train.evaluate import evaluate
from ofakern.train.feed import Feed
from ofakern.train.log import RunLog
from ofakern.train.optimizer import WeightAverage, optimizer_tensors, restore_optimizer
from ofakern.train.recorded import RecordedStep
from ofakern.train.schedule import learning_rate, warmup_share
from ofakern.train.step import Step, Trainable

_RAW = "weight|"


@dataclass
class TrainResult:
    """What `Trainer.fit` returns.

    Attributes:
        updates: optimizer updates done, those of resumed runs included.
        seconds: wall time of training, those of resumed runs included.
        history: the log's records of this process, in order.
        evaluation: task -> metric -> value of the last evaluation.
        broken: one line per task about samples that could not be used.
        checkpoint: the last checkpoint's folder, None without an output_dir.
        interrupted: whether SIGINT or SIGTERM ended the run.
        graphs: with `cuda_graphs` how this process ran its micro-batches: "replayed" and "eager", and how many graphs
            were "recorded" for them.
    """

    updates: int = 0
    seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)
    evaluation: dict[str, dict[str, float]] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)
    checkpoint: Path | None = None
    interrupted: bool = False
    graphs: dict[str, int] = field(default_factory=dict)


class Run:
    """One call of `fit`."""

    def __init__(self, config: TrainConfig, model: Trainable, tasks: Sequence[Task]) -> None:
        self.config, self.model, self.tasks = config, model, tasks
        self.device = torch.device(config.device) if config.device else next(model.network.parameters()).device
        model.network.to(self.device)
        self.ranks = Ranks(self.device)
        self.ranks.broadcast_module(model.network)
        self.folder = None if config.output_dir is None else Path(config.output_dir)
        self.feeds = [self._feed(index, task) for index, task in enumerate(tasks)]
        self.total_updates = config.max_updates or self._updates_of_epochs()
        self.warmup = warmup_share(config, self.total_updates)
        if config.cuda_graphs and self.ranks.world > 1:
            raise OfakernValueError(
                f"TrainConfig: cuda_graphs must be False with several ranks (WORLD_SIZE={self.ranks.world}), got True"
            )
        self.step = (RecordedStep if config.cuda_graphs else Step)(model, config, self.device)
        self.average = WeightAverage(model.network, config.ema_decay) if config.ema_decay else None
        self.result = TrainResult()
        self._saved_at = -1
        self._tokens = 0
        self._begin = time.monotonic()

    def _feed(self, index: int, task: Task) -> Feed:
        rows = task.rows("train")
        assert rows is not None  # _check_tasks
        encode = self.model.example_encoder(task, "train")
        seed = self.config.seed * 1_000 + index
        return Feed(
            TaskDataset(rows, encode, seed=seed, name=task.name),
            task.micro_batch_size,
            rank=self.ranks.rank,
            world=self.ranks.world,
            num_workers=self.config.num_workers,
            max_broken_share=self.config.max_broken_share,
            pad_to=self.config.pad_to,
        )

    def _draws(self, task: Task) -> int:
        return task.update_freq * self.config.gradient_accumulation

    def _updates_of_epochs(self) -> int:
        per_epoch = [
            len(feed.dataset) / (task.micro_batch_size * self._draws(task) * self.ranks.world)
            for feed, task in zip(self.feeds, self.tasks, strict=True)
        ]
        return max(1, -int(-(max(per_epoch) * self.config.epochs) // 1))

    def close(self) -> None:
        for feed in self.feeds:
            feed.close()
        self.ranks.close()

    # ------------------------------------------------------------------------------------------------- the loop

    def loop(self, stop: threading.Event) -> TrainResult:
        log = RunLog(
            self.folder if self.ranks.first else None,
            total=self.total_updates,
            start=self.result.updates,
            progress=self.config.progress and self.ranks.first,
            tensorboard=self.config.tensorboard,
        )
        self._begin = time.monotonic()
        earlier = self.result.seconds
        try:
            while self._goes_on(stop):
                self.model.network.train()
                record = self._update()
                self.result.seconds = earlier + time.monotonic() - self._begin
                self._report(log, record)
                self._at_intervals(log)
            if not self.result.interrupted:
                for feed in self.feeds:
                    feed.tally.require_usable()
                self._evaluate(log)
            self._save()
            if self.average is not None:
                self.average.swap(self.model.network)
            self.result.broken = [feed.tally.summary() for feed in self.feeds]
            for feed in self.feeds:
                if feed.tally.count:
                    log.say(feed.tally.summary())
        finally:
            log.close()
            self.model.network.eval()
        return self.result

    def _goes_on(self, stop: threading.Event) -> bool:
        out_of_time = self.config.max_seconds is not None and self.result.seconds >= self.config.max_seconds
        # Ranks must agree, or one waits for the others for ever.
        self.result.interrupted = self.ranks.any(stop.is_set(), self.device)
        out_of_time = self.ranks.any(out_of_time, self.device)
        return self.result.updates < self.total_updates and not self.result.interrupted and not out_of_time

    def _update(self) -> dict[str, Any]:
        update = self.result.updates + 1
        drawn = [
            (task, batch)
            for feed, task in zip(self.feeds, self.tasks, strict=True)
            for batch in (feed.draw() for _ in range(self._draws(task)))
            if batch is not None
        ]
        # Dropout and the like depend on the update alone, so a resumed run draws what an uninterrupted one draws.
        torch.manual_seed((self.config.seed * 1_000_003 + update) * 4_096 + self.ranks.rank)
        tokens = sum(int((batch.labels != IGNORE_LABEL).sum()) for _, batch in drawn)
        total = max(1.0, self.ranks.total(tokens, self.device))
        sums = [self.step.backward(task, batch, total) for task, batch in drawn]
        self.ranks.sum_gradients(self.model.network)
        rate = self._learning_rate()
        norm = self.step.optimize(rate)
        *values, norm_value = torch.cat([*sums, norm.to(self.device)]).tolist()  # the one time an update waits
        losses = _losses([task for task, _ in drawn], values, update)
        if not math.isfinite(norm_value):
            raise OfakernRuntimeError(
                f"train: gradient must be finite, its norm got {norm_value} at update {update}\n"
                "Try: a lower learning_rate, a longer warm-up, or bf16=False"
            )
        self.ranks.broadcast_buffers(self.model.network)
        self.result.updates = update
        if self.average is not None:
            self.average.update(self.model.network, update)
        graphs = self.step.report()
        self.result.graphs = graphs.get("graphs", {})
        return {"update": update, "lr": rate, "grad_norm": norm_value, "tokens": int(total), **losses, **graphs}

    def _learning_rate(self) -> float:
        """Of the update about to be taken, at the middle of its share of the run, so none is taken with rate 0."""
        progress = (self.result.updates + 0.5) / self.total_updates
        if self.config.max_seconds is not None:
            progress = max(progress, self.result.seconds / self.config.max_seconds)
        return learning_rate(self.config, min(1.0, progress), self.warmup)

    # ------------------------------------------------------------------------------ reports, evaluation, checkpoints

    def _report(self, log: RunLog, record: dict[str, Any]) -> None:
        self._tokens += record["tokens"]
        speed = self._tokens / max(1e-9, time.monotonic() - self._begin)
        record |= {"tokens_per_second": round(speed, 1), "seconds": round(self.result.seconds, 3)}
        record["epochs"] = {feed.dataset.name: round(feed.epoch, 4) for feed in self.feeds}
        log.advance({"loss": f"{record['loss']:.3f}", "tokens/s": f"{speed:.0f}"})
        if record["update"] % self.config.log_every == 0 or record["update"] == self.total_updates:
            log.write(record)
            self.result.history.append(record)

    def _at_intervals(self, log: RunLog) -> None:
        done, config = self.result.updates, self.config
        if done == self.total_updates:
            return  # the end of the loop does both
        if config.evaluate_every and done % config.evaluate_every == 0:
            self._evaluate(log)
        if config.save_every and done % config.save_every == 0:
            self._save()

    def _evaluate(self, log: RunLog) -> None:
        if self.ranks.first and any(task.rows("valid") is not None for task in self.tasks):
            if self.average is not None:
                self.average.swap(self.model.network)
            found = evaluate(self.model, self.tasks, "valid", seed=self.config.seed, bf16=self.config.bf16)
            if self.average is not None:
                self.average.swap(self.model.network)
            record = {"update": self.result.updates, "valid": found}
            log.write(record)
            log.say(f"update {self.result.updates}: " + _shown(found))
            self.result.history.append(record)
            self.result.evaluation = found
        self.ranks.barrier()

    def _save(self) -> None:
        """Write a checkpoint: the averaged weights are the model, the raw ones go beside the optimizer's state."""
        if self.folder is None or self._saved_at == self.result.updates:
            return
        if self.ranks.first:
            network = self.model.network
            tensors = optimizer_tensors(network, self.step.optimizer)
            state = {
                "update": self.result.updates,
                "seconds": self.result.seconds,
                "total_updates": self.total_updates,
                "seed": self.config.seed,
                "tasks": {f.dataset.name: f.state_dict() for f in self.feeds},
            }
            if self.average is not None:
                tensors |= {_RAW + name: p.detach().clone() for name, p in network.named_parameters()}
                self.average.swap(network)
            try:
                self.result.checkpoint = save_checkpoint(self.folder, self.model, tensors, state, self.config.keep_last)
            finally:
                if self.average is not None:
                    self.average.swap(network)
        self._saved_at = self.result.updates
        self.ranks.barrier()

    def resume(self, path: Path | None) -> None:
        """Go on from a checkpoint, by default the newest in output_dir."""
        if path is None and self.folder is None:
            raise CheckpointError("resume: output_dir must be given, got None\nTry: resume=<path of a checkpoint>")
        path = path or latest_checkpoint(self.folder or "")
        tensors, state = load_checkpoint(path)
        names = [feed.dataset.name for feed in self.feeds]
        if sorted(state["tasks"]) != sorted(names) or state["seed"] != self.config.seed:
            raise CheckpointError(
                f"resume: tasks and seed must be those of {str(path)!r} ({sorted(state['tasks'])}, {state['seed']}), "
                f"got {sorted(names)}, {self.config.seed}"
            )
        self.model.load_weights(path)
        self._restore_average(tensors)
        restore_optimizer(self.model.network, self.step.optimizer, tensors)
        for feed in self.feeds:
            feed.load_state_dict(state["tasks"][feed.dataset.name])
        self.result.updates = self._saved_at = int(state["update"])
        self.result.seconds = float(state["seconds"])
        self.result.checkpoint = path

    @torch.no_grad()
    def _restore_average(self, tensors: dict[str, Tensor]) -> None:
        """Take the raw weights out of `tensors`; what the model has loaded are the averaged ones."""
        raw = {name: tensors.pop(name) for name in list(tensors) if name.startswith(_RAW)}
        if bool(raw) != (self.average is not None):
            raise CheckpointError("resume: ema_decay must be on or off as in the checkpoint's run, got the other")
        if self.average is not None:
            self.average.shadow = {n: p.detach().clone().float() for n, p in self.model.network.named_parameters()}
            for name, parameter in self.model.network.named_parameters():
                parameter.copy_(raw[_RAW + name])


def _losses(tasks: Sequence[Task], values: Sequence[float], update: int) -> dict[str, Any]:
    """Loss and nll per target token, of everything and of each task, on this rank.

    values: loss, nll and tokens of each micro-batch, one after the other; tasks: of each.
    """
    by_task: dict[str, list[float]] = {}
    for number, task in enumerate(tasks):
        sums = values[3 * number : 3 * number + 3]
        if not math.isfinite(sums[0]):
            raise OfakernRuntimeError(
                f"train: loss must be finite, got {sums[0]} in task {task.name!r} at update {update}\n"
                "Try: a lower learning_rate, a longer warm-up, or bf16=False; the last checkpoint is untouched"
            )
        entry = by_task.setdefault(task.name, [0.0, 0.0, 0.0])
        for place, value in enumerate(sums):
            entry[place] += value
    whole = [sum(column) for column in zip(*by_task.values(), strict=True)] or [0.0, 0.0, 0.0]
    return {
        "loss": whole[0] / max(1.0, whole[2]),
        "nll": whole[1] / max(1.0, whole[2]),
        "tasks": {
            name: {"loss": loss / max(1.0, count), "nll": nll / max(1.0, count), "tokens": int(count)}
            for name, (loss, nll, count) in by_task.items()
        },
    }


def _shown(found: Mapping[str, Mapping[str, float]]) -> str:
    return "; ".join(
        f"{task} " + ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        for task, values in found.items()
    )
