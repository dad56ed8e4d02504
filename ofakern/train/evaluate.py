"""Loss and metrics of tasks on held-out rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from ofakern.data.batch import PackedBatch
from ofakern.data.dataset import BrokenTally, Encode, TaskDataset, load
from ofakern.data.example import Split
from ofakern.instruction import Modality
from ofakern.modality.box.preprocess import parse_box
from ofakern.modality.output import Output
from ofakern.nn.loss import LossSums
from ofakern.tasks import Task

# What a metric is given of an answer, by the last target slot; text elsewhere.
_ANSWERS = {
    Modality.BOX: "box",
    Modality.AUDIO: "speech",
    Modality.MOTION: "motion",
    Modality.IMAGE: "image",
}


class Evaluable(Protocol):
    """What an evaluation needs of a model."""

    @property
    def network(self) -> nn.Module: ...

    def example_encoder(self, task: Task, split: Split) -> Encode: ...

    def train_step_loss(self, batch: PackedBatch, label_smoothing: float) -> LossSums: ...

    def answers(self, task: Task, rows: Sequence[Mapping[str, Any]]) -> Sequence[Output]: ...


def evaluate(
    model: Evaluable, tasks: Sequence[Task], split: Split, *, seed: int = 1, bf16: bool = False
) -> dict[str, dict[str, float]]:
    """Task -> {"nll": per target token, metrics...}; tasks without rows for the split are left out.

    Of motions "nll" is the diffusion loss per frame, always at the same steps and noise.
    Of speech "nll" is the loss per step, and its parts l1, mse and stop stand beside it. Random draws (a pre-net's
    dropout is on here too) follow from the seed and leave the caller's alone. Rows that cannot be read are left out of
    the numbers and counted as "broken". The network is put into eval mode and back.
    """
    network = model.network
    training = network.training
    network.eval()
    try:
        found = {}
        for task in tasks:
            rows = task.rows(split)
            if rows is not None:
                device = next(network.parameters()).device
                with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                    torch.manual_seed(seed)
                    found[task.name] = _evaluate_task(model, task, split, seed, bf16)
        return found
    finally:
        network.train(training)


@torch.no_grad()
def _evaluate_task(model: Evaluable, task: Task, split: Split, seed: int, bf16: bool) -> dict[str, float]:
    rows = task.rows(split)
    assert rows is not None
    dataset = TaskDataset(rows, model.example_encoder(task, split), seed=seed, shuffle=False, name=task.name)
    tally = BrokenTally(1.0, name=f"{task.name}, {split}")
    device = next(model.network.parameters()).device
    nll, tokens = 0.0, 0
    parts: dict[str, float] = {}
    for loaded in load(dataset, task.micro_batch_size, stop=len(rows)):
        tally.update(loaded)
        if loaded.batch is not None:
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
                sums = model.train_step_loss(loaded.batch.to(device), 0.0)
            nll += float(sums.nll)
            tokens += int(sums.tokens)
            for name, part in sums.parts.items():
                parts[name] = parts.get(name, 0.0) + float(part)
    numbers = {name: value / max(1, tokens) for name, value in {"nll": nll, **parts}.items()}
    if tally.count:
        numbers["broken"] = float(tally.count)
    if task.metrics:
        usable = [task.prepared(rows[i]) for i in range(len(rows)) if i not in tally.broken]
        numbers |= _metrics(model, task, usable)
    return numbers


def _metrics(model: Evaluable, task: Task, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    if not rows:
        return {}
    modality = task.target_slots[-1].modality
    is_box = modality is Modality.BOX
    outputs = model.answers(task, rows)
    shown = _ANSWERS.get(modality, "text")
    predictions: list[Any] = [getattr(output, shown) for output in outputs]
    references = [row[task.target_field] for row in rows]
    if is_box:
        references = [parse_box(reference) for reference in references]
    numbers: dict[str, float] = {}
    for name, metric in task.metrics.items():
        value = metric(predictions, references)
        if isinstance(value, Mapping):
            numbers |= {f"{name}/{part}": float(score) for part, score in value.items()}
        else:
            numbers[name] = float(value)
    return numbers
