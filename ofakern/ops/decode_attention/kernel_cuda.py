"""The CUDA C++ kernels of decode_attention (csrc/ops/decode_attention/decode_attention_cuda.cu)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ofakern.ops import native


def forward(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
    row_offsets: Tensor,
    runs: Tensor | None,
    slots: Tensor | None,
    counts: Tensor | None,
    bias: Tensor | None,
    head_scale: Tensor | None,
    value_width: int,
    scale: float,
    longest: int = 0,
) -> Any:
    """The op on a GPU's tensors; tables that are on the CPU are copied there first."""
    return native.cuda_kernels.decode_attention(
        q,
        _bits(keys),
        _bits(values),
        key_scales,
        value_scales,
        *(
            None if table is None else table.to(q.device, non_blocking=True)
            for table in (row_offsets, runs, slots, counts)
        ),
        bias,
        head_scale,
        value_width,
        scale,
        longest,
    )


def _bits(x: Tensor) -> Tensor:
    """The binding knows no int8: it takes the bits."""
    return x.view(torch.uint8) if x.dtype == torch.int8 else x
