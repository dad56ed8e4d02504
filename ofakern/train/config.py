"""How a training run goes: one frozen dataclass."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ofakern.errors import OfakernTypeError, OfakernValueError

_WHERE = "TrainConfig"


@dataclass(frozen=True)
class TrainConfig:
    """Settings of `Trainer`.

    Attributes:
        max_updates: optimizer updates of the whole run; None: from `epochs`.
        epochs: passes over the largest task's training rows, where `max_updates` is None.
        max_seconds: stop (and save) after this wall time; the learning rate then follows whichever of time and
            updates is further on. None: no limit.
        learning_rate, end_learning_rate: peak and last learning rate.
        schedule: "linear" (OFA's polynomial of power 1), "polynomial" (see `power`), "cosine" or "constant".
        warmup_ratio, warmup_updates: linear warm-up, as a share of the run or in updates (which then counts).
        weight_decay: AdamW's, on matrices only: not on biases, norms and tables.
        betas, adam_epsilon: AdamW's.
        clip_norm: the gradient's norm is cut to it; 0 leaves it.
        label_smoothing: OFA's epsilon.
        bf16: matrix products in bfloat16 (autocast); parameters, optimizer and loss stay f32.
        ema_decay: keep a running average of the weights, evaluate and return it; 0 keeps none.
        gradient_accumulation: micro-batches every task contributes to an update, times the task's own `update_freq`.
        seed: of shuffling, dropout and noise.
        max_broken_share: the run stops when more than this share of a task's samples cannot be read.
        output_dir: where log and checkpoints go; None writes nothing.
        save_every, keep_last: updates between checkpoints (0: only the last one) and how many to keep (0: all).
        evaluate_every: updates between evaluations of the valid splits (0: only at the end).
        log_every: updates between lines of the log.
        cuda_graphs: on a GPU, record micro-batches whose shapes come again and the optimizer's step, and replay them:
            the host then does almost nothing. Losses that read or draw on the host (speech, motions) run as without.
        pad_to: fill the text tokens of every micro-batch, and its longest text, up to a multiple of this, so that
            shapes come again (a divisor of the longest text that the model takes, say 64); 0 adds nothing.
        num_workers: processes per task that prepare its samples; 0: this one does.
        progress: show a progress bar. tensorboard: write its events too; None: when it is installed.
        device: "cpu", "cuda", ...; None leaves the model where it is.
    """

    max_updates: int | None = None
    epochs: float = 1.0
    max_seconds: float | None = None
    learning_rate: float = 1e-4
    end_learning_rate: float = 0.0
    schedule: str = "linear"
    power: float = 1.0
    warmup_ratio: float = 0.06
    warmup_updates: int | None = None
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    adam_epsilon: float = 1e-8
    clip_norm: float = 1.0
    label_smoothing: float = 0.1
    bf16: bool = False
    ema_decay: float = 0.0
    gradient_accumulation: int = 1
    seed: int = 1
    max_broken_share: float = 0.1
    output_dir: str | Path | None = None
    save_every: int = 0
    keep_last: int = 2
    evaluate_every: int = 0
    log_every: int = 1
    cuda_graphs: bool = False
    pad_to: int = 0
    num_workers: int = 0
    progress: bool = True
    tensorboard: bool | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        for name in ("max_updates", "gradient_accumulation", "log_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise OfakernValueError(f"{_WHERE}: {name} must be at least 1, got {value!r}")
        for name in (
            "num_workers",
            "pad_to",
            "save_every",
            "keep_last",
            "evaluate_every",
            "warmup_ratio",
            "weight_decay",
            "clip_norm",
        ):
            if getattr(self, name) < 0:
                raise OfakernValueError(f"{_WHERE}: {name} must not be negative, got {getattr(self, name)!r}")
        for name in ("label_smoothing", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise OfakernValueError(f"{_WHERE}: {name} must be in [0, 1), got {getattr(self, name)!r}")
        for name in ("epochs", "learning_rate", "power"):
            if not getattr(self, name) > 0:
                raise OfakernValueError(f"{_WHERE}: {name} must be above 0, got {getattr(self, name)!r}")
        if self.schedule not in ("linear", "polynomial", "cosine", "constant"):
            raise OfakernValueError(
                f"{_WHERE}: schedule must be one of linear, polynomial, cosine, constant, got {self.schedule!r}"
            )
        if not 0 <= self.max_broken_share <= 1:
            raise OfakernValueError(f"{_WHERE}: max_broken_share must be in [0, 1], got {self.max_broken_share!r}")

    def replace(self, **kwargs: Any) -> TrainConfig:
        """A copy with `kwargs` in place; an unknown name raises OfakernTypeError."""
        known = [field.name for field in dataclasses.fields(self)]
        for name in kwargs:
            if name not in known:
                raise OfakernTypeError(f"{_WHERE}: argument must be one of {', '.join(known)}, got {name!r}")
        return dataclasses.replace(self, **kwargs)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """From a plain mapping, as a YAML overlay gives it."""
        return cls().replace(**{k: tuple(v) if k == "betas" else v for k, v in values.items()})
