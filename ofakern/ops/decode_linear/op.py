"""The registered op `ofakern::decode_linear_fwd`, and the packing that precedes it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ofakern.ops import native
from ofakern.ops.library import define, kernel_ready, ops_of
from ofakern.ops.memory import large_empty
from ofakern.ops.selection import Backends

BACKENDS = Backends("decode_linear", "decode_linear_forward")


def pack(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The packed form (uint8) of `[N,K]`, of `dtype` or int8, for rows of `dtype`. For this process's CPU only."""
    module, like = native.kernels, torch.empty(0, dtype=dtype)
    ready = kernel_ready(weight)
    bits = ready.view(torch.uint8) if ready.dtype == torch.int8 else ready  # the binding knows no int8
    packed = large_empty((module.decode_linear_packed_bytes(bits, like),), torch.uint8)
    module.decode_linear_pack(packed, bits, like, torch.get_num_threads())
    return packed


def _forward_cpu(x: Tensor, packed: Tensor, width: int, scale: Tensor | None, bias: Tensor | None) -> Any:
    return native.kernels.decode_linear(x, packed, scale, bias, width, torch.get_num_threads())


def _forward_fake(x: Tensor, packed: Tensor, width: int, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[0], width))


define(
    "decode_linear_fwd",
    "(Tensor x, Tensor packed, int width, Tensor? scale, Tensor? bias) -> Tensor",
    cpu=_forward_cpu,
    fake=_forward_fake,
)
FORWARD = ops_of("decode_linear_fwd")
