"""Training: several tasks, one model, exact resume."""

from ofakern.train.config import TrainConfig
from ofakern.train.evaluate import Evaluable, evaluate
from ofakern.train.log import read_log
from ofakern.train.run import TrainResult
from ofakern.train.step import Trainable
from ofakern.train.trainer import Trainer

__all__ = [
    "Evaluable",
    "TrainConfig",
    "TrainResult",
    "Trainable",
    "Trainer",
    "evaluate",
    "read_log",
]
