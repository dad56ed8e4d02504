"""The oracle: torch's own linear layer, differentiable any number of times."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`[..., I]` to `[..., O]`: x @ weight^T + bias; see `api.linear`."""
    return F.linear(x, weight, bias)
