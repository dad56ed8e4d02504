"""T5's norm (T5, mT5, UMT5), in one pass: transformers' keeps three arrays of every call for the gradient, we one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ofakern.nn.dropin.base import DropIn
from ofakern.ops.rms_norm import rms_norm


class T5LayerNorm(DropIn):
    """transformers' T5LayerNorm, MT5LayerNorm and UMT5LayerNorm: a root-mean-square norm with a scale and no shift.

    Constructor `(hidden_size, eps=1e-6)`, state-dict key `weight`. Computed in float32 and rounded once, where the
    original rounds before and after the scale. The result has the weight's dtype where that is a half, and is float32
    otherwise, as the original's.
    """

    replaced_names = ("T5LayerNorm", "MT5LayerNorm", "UMT5LayerNorm")
    needed = ("weight", "variance_epsilon")

    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[..., D]` to `[..., D]`."""
        weight = self.weight
        wide = torch.promote_types(hidden_states.dtype, weight.dtype)
        out = rms_norm(hidden_states.to(wide), weight, self.variance_epsilon, self.backend)
        return out.to(weight.dtype) if weight.dtype in (torch.float16, torch.bfloat16) else out
