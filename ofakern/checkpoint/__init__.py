"""Saved models and their use: `GeneralistModel`, and loaders of other systems' recordings."""

from ofakern.checkpoint.generalist import GeneralistModel
from ofakern.checkpoint.known_task import KnownTask, TaskLike

__all__ = ["GeneralistModel", "KnownTask", "TaskLike"]
