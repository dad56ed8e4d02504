"""Saved models and their use: `GeneralistModel`, and loaders of other systems' recordings."""

from ofakern.checkpoint.generalist import GeneralistModel
from ofakern.checkpoint.image_tokenizer import load_image_tokenizer
from ofakern.checkpoint.known_task import KnownTask, TaskLike
from ofakern.checkpoint.requests import PreparedRequest, StreamPiece

__all__ = ["GeneralistModel", "KnownTask", "PreparedRequest", "StreamPiece", "TaskLike", "load_image_tokenizer"]
