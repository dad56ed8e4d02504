"""The registered op `ofakern::gathered_linear_fwd`; how many values there are depends on the states."""

from __future__ import annotations

import torch
from torch import Tensor

from ofakern.errors import BackendError
from ofakern.ops import native
from ofakern.ops.library import define, kernel_ready
from ofakern.ops.selection import Backends

BACKENDS = Backends("gathered_linear", "gathered_linear_forward")


def _with_rows_contiguous(x: Tensor) -> Tensor:
    x = x.resolve_neg()
    return x if x.stride(-1) == 1 else x.contiguous()


def _forward_cpu(
    hidden: Tensor, weight: Tensor, states: Tensor, first: Tensor, tokens: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    module = native.cpu
    if module is None:
        raise BackendError(f"gathered_linear: backend 'cpu' cannot run this call: {BACKENDS.unavailable['cpu']}")
    states, first, tokens = kernel_ready(states), kernel_ready(first), kernel_ready(tokens)
    inputs = (_with_rows_contiguous(hidden), _with_rows_contiguous(weight), states, first, tokens)
    count = module.gathered_linear_count(states, first)
    values = torch.empty(count, dtype=torch.float32)
    row_first = torch.empty(states.shape[0] + 1, dtype=torch.int32)
    row_tokens = torch.empty(count, dtype=torch.int32)
    workspace = torch.empty(module.gathered_linear_workspace(*inputs), dtype=torch.uint8)
    module.gathered_linear_forward(values, row_first, row_tokens, workspace, *inputs, torch.get_num_threads())
    return values, row_first, row_tokens


def _forward_fake(
    hidden: Tensor, weight: Tensor, states: Tensor, first: Tensor, tokens: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    count = torch.library.get_ctx().new_dynamic_size()
    return (
        hidden.new_empty(count, dtype=torch.float32),
        states.new_empty(states.shape[0] + 1, dtype=torch.int32),
        states.new_empty(count, dtype=torch.int32),
    )


forward = define(
    "gathered_linear_fwd",
    "(Tensor hidden, Tensor weight, Tensor states, Tensor first, Tensor tokens) -> (Tensor, Tensor, Tensor)",
    cpu=_forward_cpu,
    fake=_forward_fake,
)
