"""The CUDA C++ kernel of log_mel (csrc/ops/log_mel/log_mel_cuda.cu)."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ofakern.ops import native

# Of a convention's tables, which are on the CPU: a copy per device, as long as the table lives.
_copies: Any = WeakIdKeyDictionary()


def forward(wave: Tensor, *inputs: Any) -> Tensor:
    """The registered op log_mel_fwd."""
    *tables, lengths, frames = inputs[:7]
    bounds = torch.tensor([[0, *accumulate(lengths)], [0, *accumulate(frames)]])
    ready = (_on(table, wave.device) for table in tables)
    out: Tensor = native.cuda_kernels.log_mel(wave.resolve_neg().contiguous(), bounds, *ready, *inputs[7:])
    return out


def _on(table: Tensor, device: torch.device) -> Tensor:
    if table.device == device:
        return table
    copies = _copies.setdefault(table, {})
    if device not in copies:
        copies[device] = table.to(device)
    return copies[device]  # type: ignore[no-any-return]
