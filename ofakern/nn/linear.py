"""torch's linear layer with this library's gradient."""

from __future__ import annotations

from torch import Tensor, nn

from ofakern.nn.dropin.base import DropIn
from ofakern.ops.linear import linear


class Linear(DropIn, nn.Linear):
    """torch.nn.Linear: the same constructor, parameters and output.

    The gradient of weight and bias comes from `ofakern.ops.linear` where its kernel is faster than torch's product
    (bfloat16 on a CPU with AMX). `backend` is that op's.
    """

    replaced_names = ("Linear",)

    def forward(self, input: Tensor) -> Tensor:
        """`[..., I]` to `[..., O]`."""
        return linear(input, self.weight, self.bias, self.backend)
