"""Problems and test cases on another device: they are made on the CPU from fixed seeds, whatever runs them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any

from torch import Tensor

from ofakern.ops.attention import AttentionLayout

Run = Callable[[Any], dict[str, Tensor]]


def moved(value: Any, device: str) -> Any:
    """Tensors, layouts, and dataclasses and containers of them; leaves stay leaves that ask for a gradient."""
    if isinstance(value, Tensor):
        return value.detach().to(device).requires_grad_(value.requires_grad)
    if isinstance(value, AttentionLayout):
        return value.to(device)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: moved(getattr(value, f.name), device) for f in fields(value) if f.init})
    if isinstance(value, dict):
        return {key: moved(item, device) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [moved(item, device) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def runner(backend: str, run: Run) -> Run:
    """`run` for cases on the CPU: a GPU's backend gets them moved there, and its results come back."""
    if backend == "cpu":
        return run
    return lambda case: {name: result.cpu() for name, result in run(moved(case, "cuda")).items()}
