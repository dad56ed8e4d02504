"""The oracle: root-mean-square norm in plain torch, differentiable any number of times."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension, computed in float32 (float64 for float64).

    Source: Zhang and Sennrich, Root Mean Square Layer Normalization, arXiv 1910.07467, equation 4.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    z = x.to(wide)
    rstd = torch.rsqrt(z.square().mean(-1, keepdim=True) + eps)
    return (z * rstd * weight.to(wide)).to(x.dtype)
