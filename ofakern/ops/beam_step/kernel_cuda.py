"""The CUDA C++ kernels of a search's step (csrc/ops/beam_step/beam_step_cuda.cu, sample_step_cuda.cu)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ofakern.ops import native

_arrived: dict[tuple[torch.device, int], Tensor] = {}


def beam(*arguments: Any) -> Any:
    """`op.BEAM` on a GPU's tensors; rules that are on the CPU are copied there first."""
    ready = _on(arguments[0].device, arguments)
    row_offsets = ready[-2]
    key, arrived = _counters(row_offsets.device, row_offsets.shape[0])
    try:
        return native.cuda_kernels.beam_step(*ready, arrived)
    except BaseException:
        _arrived.pop(key, None)  # what the counters hold now is not known
        raise


def sample(*arguments: Any) -> Any:
    """`op.SAMPLE` on a GPU's tensors."""
    return native.cuda_kernels.sample_step(*_on(arguments[0].device, arguments))


def _on(device: torch.device, arguments: tuple[Any, ...]) -> list[Any]:
    return [x.to(device, non_blocking=True) if isinstance(x, Tensor) else x for x in arguments]


def _counters(device: torch.device, samples: int) -> tuple[tuple[torch.device, int], Tensor]:
    """Zeros, int32, at least one per sample: a call leaves them as it found them, so calls of a stream share them.

    A graph has its own: it may run beside the stream in which it was captured.
    """
    stream = 0
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return (device, -1), torch.zeros(samples, dtype=torch.int32, device=device)
        stream = torch.cuda.current_stream(device).cuda_stream
    key = (device, stream)
    kept = _arrived.get(key)
    if kept is None or kept.shape[0] < samples:
        kept = _arrived[key] = torch.zeros(max(samples, 256), dtype=torch.int32, device=device)
    return key, kept
