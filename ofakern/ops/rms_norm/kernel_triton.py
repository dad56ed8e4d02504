"""The root-mean-square norm on GPUs in Triton: launches, and the calls that op.py registers.

It has not run on a GPU yet: `auto` does not take it. Partition and order of sums come from shapes alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ofakern.ops.rms_norm.triton_kernels import rows
from ofakern.ops.triton_rows import Call, over_rows, over_runs


def forward_call(x: Tensor, weight: Tensor, eps: float) -> Call:
    """out, rstd."""
    width = x.shape[-1]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rstd = torch.empty(x.numel() // width, dtype=torch.float32, device=x.device)
    arguments: dict[str, Any] = {"out": out, "rstds": rstd, "x": x, "weight": weight}
    arguments |= {"rows": rstd.shape[0], "eps": eps}
    return Call([over_rows(rows.rms_norm_forward, arguments, width)], (out, rstd))


def backward_call(dout: Tensor, x: Tensor, rstd: Tensor, weight: Tensor) -> Call:
    """dx; one sum, dweight."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    arguments: dict[str, Any] = {"dx": dx, "dout": dout, "x": x, "rstds": rstd, "weight": weight}
    arguments |= {"rows": rstd.shape[0]}
    launch, parts = over_runs(rows.rms_norm_backward, arguments, weight, sums=1)
    return Call([launch], (dx,), parts)


def forward(*arguments: Any) -> tuple[Tensor, ...]:
    return forward_call(*arguments).run("rms_norm")


def backward(*arguments: Any) -> tuple[Tensor, ...]:
    call = backward_call(*arguments)
    return (*call.run("rms_norm"), *call.sums())
