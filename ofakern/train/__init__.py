"""Training: several tasks, one model, exact resume."""

from ofakern.train.config import TrainConfig
from ofakern.train.evaluate import Evaluable, evaluate
from ofakern.train.log import read_log
from ofakern.train.loss import LossSums, allowed_mask, label_smoothed_cross_entropy, rows_with_loss
from ofakern.train.run import Trainable, TrainResult
from ofakern.train.trainer import Trainer

__all__ = [
    "Evaluable",
    "LossSums",
    "TrainConfig",
    "TrainResult",
    "Trainable",
    "Trainer",
    "allowed_mask",
    "evaluate",
    "label_smoothed_cross_entropy",
    "read_log",
    "rows_with_loss",
]
