"""Which backend runs a call of `routed_linear`: a static table of what was measured."""

from __future__ import annotations

import torch
from torch import Tensor

from ofakern.ops.selection import Backends


class _RoutedBackends(Backends):
    def automatic(self, tensor: Tensor) -> str:
        """The kernel for a CPU's bf16 and f16; torch's products for f32, where they are faster."""
        if tensor.device.type == "cpu" and tensor.dtype == torch.float32:
            return "reference"
        return super().automatic(tensor)


BACKENDS = _RoutedBackends("routed_ffn", "routed_linear_forward", triton=True)
