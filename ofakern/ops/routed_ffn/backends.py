"""Which backend runs a call of `routed_linear`: the kernel on a CPU, plain torch elsewhere."""

from __future__ import annotations

from torch import Tensor

from ofakern.ops.selection import Backends


class _RoutedBackends(Backends):
    def automatic(self, tensor: Tensor) -> str:
        """As for every op, but a GPU's tensors go to plain torch, whose products are as good there."""
        return super().automatic(tensor) if tensor.device.type == "cpu" else "reference"


BACKENDS = _RoutedBackends("routed_ffn", "routed_linear_forward")
