"""The registered op `ofakern::gathered_linear_fwd`; how many values there are depends on the states."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ofakern.ops import native
from ofakern.ops.library import define, ops_of
from ofakern.ops.selection import Backends

BACKENDS = Backends("gathered_linear", "gathered_linear_forward")


def _forward_cpu(hidden: Tensor, weight: Tensor, states: Tensor, first: Tensor, tokens: Tensor) -> Any:
    return native.kernels.gathered_linear(hidden, weight, states, first, tokens, torch.get_num_threads())


def _forward_fake(
    hidden: Tensor, weight: Tensor, states: Tensor, first: Tensor, tokens: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    count = torch.library.get_ctx().new_dynamic_size()
    return (
        hidden.new_empty(count, dtype=torch.float32),
        states.new_empty(states.shape[0] + 1, dtype=torch.int32),
        states.new_empty(count, dtype=torch.int32),
    )


define(
    "gathered_linear_fwd",
    "(Tensor hidden, Tensor weight, Tensor states, Tensor first, Tensor tokens) -> (Tensor, Tensor, Tensor)",
    cpu=_forward_cpu,
    fake=_forward_fake,
)
FORWARD = ops_of("gathered_linear_fwd")
