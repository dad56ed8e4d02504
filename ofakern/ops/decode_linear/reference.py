"""The oracle of `decode_linear`: a linear layer, and int8 weights with one scale per output."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 `[N,K]` and float32 `[N]` with weight ~ int8 * scale: the largest magnitude of a row becomes 127."""
    largest = weight.abs().amax(dim=1).float()
    scale = torch.where(largest > 0, largest / 127, 1.0)
    return torch.round(weight.float() / scale[:, None]).clamp_(-127, 127).to(torch.int8), scale


def decode_linear_reference(
    x: Tensor, weight: Tensor, scale: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """`[M,N]` of x `[M,K]`; weight `[N,K]` in x's dtype, or int8 with its scale `[N]`."""
    if scale is not None:
        weight = weight.to(torch.promote_types(x.dtype, torch.float32)) * scale[:, None]
    out = F.linear(x.to(weight.dtype), weight).to(torch.promote_types(x.dtype, torch.float32))
    return (out if bias is None else out + bias).to(x.dtype)
