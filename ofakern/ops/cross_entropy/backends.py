"""Which backend runs a call of `cross_entropy`: the kernel on a CPU, plain torch elsewhere."""

from __future__ import annotations

from torch import Tensor

from ofakern.ops.selection import Backends


class _CrossEntropyBackends(Backends):
    def automatic(self, tensor: Tensor) -> str:
        """As for every op, but a GPU's tensors go to plain torch: a loss must not keep a model from training there."""
        return super().automatic(tensor) if tensor.device.type == "cpu" else "reference"


BACKENDS = _CrossEntropyBackends("cross_entropy", "cross_entropy_forward", triton=True)
