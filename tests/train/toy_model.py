"""A model with dropout and batch norm that the trainer can train in milliseconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ofakern.data.batch import Example, PackedBatch, Segment
from ofakern.errors import DataError
from ofakern.modality.output import Output
from ofakern.nn.loss import LossSums, label_smoothed_cross_entropy
from ofakern.tasks import Task

VOCABULARY = 24


class ToyNetwork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 16)
        self.norm = nn.BatchNorm1d(16)
        self.dropout = nn.Dropout(0.2)
        self.out = nn.Linear(16, VOCABULARY, bias=False)
        self.unused = nn.Linear(2, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden: Tensor = self.dropout(self.norm(self.embedding(tokens)))
        return hidden


class ToyModel:
    """Learns y = f(x) for rows {"x": int, "y": int}."""

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.network = ToyNetwork()
        self.prepared = 0
        self.batches: list[list[int]] = []

    def prepare(self, tasks: Sequence[Task]) -> None:
        self.prepared += 1

    def example_encoder(self, task: Task, split: str) -> Any:
        def encode(row: Mapping[str, Any], index: int, rng: np.random.Generator) -> Example:
            row = task.prepared(row)
            if row["x"] is None:
                raise DataError(f"row {index}: x must be a number, got None")
            x, y = torch.tensor([row["x"]]), torch.tensor([row["y"]])
            return Example([Segment(0, "text", 1, x)], [Segment(1, "text", 1, x)], y, columns={"x": row["x"]})

        return encode

    def prepare_batch(self, batch: PackedBatch) -> bool:
        return True

    def train_step_loss(self, batch: PackedBatch, label_smoothing: float) -> LossSums:
        if self.network.training:
            self.batches.append(batch.columns["x"])
        hidden = self.network(batch.source.segments[0].value)
        return label_smoothed_cross_entropy(hidden, self.network.out.weight, batch.labels, label_smoothing)

    def answers(self, task: Task, rows: Sequence[Mapping[str, Any]]) -> list[Output]:
        with torch.no_grad():
            best = self.network.out(self.network(torch.tensor([row["x"] for row in rows]))).argmax(-1)
        return [Output(text=str(int(y))) for y in best]

    def save_pretrained(self, directory: str | Path) -> None:
        Path(directory).mkdir(parents=True)
        save_file(self.network.state_dict(), Path(directory) / "model.safetensors")

    def load_weights(self, directory: str | Path) -> None:
        self.network.load_state_dict(load_file(Path(directory) / "model.safetensors"))


def rows(shift: int, count: int = 11) -> list[dict[str, Any]]:
    return [{"x": x, "y": (x + shift) % VOCABULARY, "answer": str((x + shift) % VOCABULARY)} for x in range(count)]


def task(name: str = "shift", shift: int = 1, **kwargs: Any) -> Task:
    made = Task(name, "[TEXT:x] -> [TEXT:y]", **{"micro_batch_size": 4, **kwargs})
    return made.add_dataset(rows(shift), "train")
