"""Where the Triton cases run: on a GPU, or interpreted (TRITON_INTERPRET=1) on CPU tensors in float32 and float16.

Triton reads TRITON_INTERPRET when kernels are imported, so the cases run in processes of their own (`run_cases`).
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ofakern.ops.selection import TRITON_INTERPRETED as INTERPRETED

ROOT = Path(__file__).resolve().parents[2]
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = (torch.float32, torch.float16) if INTERPRETED else (torch.float32, torch.float16, torch.bfloat16)


def to_device(value: Any) -> Any:
    """Tensors, and containers of them, on the device of the cases."""
    if isinstance(value, dict):
        return {key: to_device(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
        return type(value)(to_device(item) for item in value)
    return value.to(DEVICE) if hasattr(value, "to") else value


def run_cases(file: str, *options: str, **environment: str) -> None:
    """pytest on a file beside this one, in another process; raises AssertionError with its output."""
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, f"tests/ops/{file}"],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def run_interpreted(file: str) -> None:
    run_cases(file, "-p", "no:xdist", TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")


def run_on_gpu(file: str) -> None:
    # Each case compiles its kernels: most of the time is spent in triton's compiler, on one core each.
    workers = max(1, min(8, (os.cpu_count() or 1) // 2))
    run_cases(file, *(["-n", str(workers)] if find_spec("xdist") else []))


if INTERPRETED:
    from triton.runtime import interpreter

    _patch_lang_tensor = interpreter._patch_lang_tensor

    def _patch_with_item(tensor: Any, scope: Any) -> None:
        # The interpreter of triton 3.6 calls int() on arrays of one element, which numpy 2.4 no longer converts.
        _patch_lang_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = _patch_with_item
