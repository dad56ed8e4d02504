"""Fast structured-bias attention and the generalist multimodal models built on it.

Names are loaded on first use, so ``import ofakern`` costs neither a model nor a kernel.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# Public name -> the module that defines it.
_EXPORTS = {
    "AttentionLayout": "ofakern.ops.attention",
    "RelativeTerm": "ofakern.ops.attention",
    "attention": "ofakern.ops.attention",
    "scaled_dot_product_attention": "ofakern.ops.attention",
    "explain": "ofakern.ops",
    "log_mel": "ofakern.ops.log_mel",
    "parse": "ofakern.instruction",
    "build_plan": "ofakern.plan",
    "patch": "ofakern.patching",
    "GeneralistModel": "ofakern.checkpoint",
    "load_image_tokenizer": "ofakern.checkpoint",
    "Task": "ofakern.tasks",
    "Trainer": "ofakern.train",
}

__all__ = [
    "AttentionLayout",
    "GeneralistModel",
    "RelativeTerm",
    "Task",
    "Trainer",
    "attention",
    "build_plan",
    "explain",
    "log_mel",
    "load_image_tokenizer",
    "parse",
    "patch",
    "scaled_dot_product_attention",
]

if TYPE_CHECKING:
    from ofakern.checkpoint import GeneralistModel, load_image_tokenizer
    from ofakern.instruction import parse
    from ofakern.ops import explain
    from ofakern.ops.attention import AttentionLayout, RelativeTerm, attention, scaled_dot_product_attention
    from ofakern.ops.log_mel import log_mel
    from ofakern.patching import patch
    from ofakern.plan import build_plan
    from ofakern.tasks import Task
    from ofakern.train import Trainer


def __getattr__(name: str) -> object:
    module = _EXPORTS.get(name)
    if module is None:
        raise AttributeError(f"module 'ofakern' has no attribute {name!r}")
    value: object = getattr(import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
