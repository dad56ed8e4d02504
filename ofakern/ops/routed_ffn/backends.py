"""Which backend runs a call of `routed_linear`: a static table of what was measured."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ofakern.ops.selection import Backends

# Tokens of the largest expert up to which f32's kernel is faster than torch's products; below the fewest per expert its
# backward pass is not.
_MOST, _FEWEST = 96, 4


class _RoutedBackends(Backends):
    def of_counts(self, backend: str, tensor: Tensor, counts: Sequence[int]) -> str:
        """`backend`, but "cpu" for "auto" where f32's tokens are few. tensor: x; counts: tokens of each expert."""
        if backend != "auto" or tensor.dtype != torch.float32 or tensor.device.type != "cpu":
            return backend
        few = max(counts) <= _MOST and (sum(counts) >= _FEWEST * len(counts) or not torch.is_grad_enabled())
        return "cpu" if few and self.unavailable["cpu"] is None else backend

    def automatic(self, tensor: Tensor) -> str:
        """The kernel for a CPU's bf16 and f16; torch's products for f32, where they are faster (see `of_counts`)."""
        if tensor.device.type == "cpu" and tensor.dtype == torch.float32:
            return "reference"
        return super().automatic(tensor)


BACKENDS = _RoutedBackends("routed_ffn", "routed_linear_forward", triton=True)
