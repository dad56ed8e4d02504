"""The registered op `ofakern::decode_attention_fwd`, and the packing of source keys that precedes it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ofakern.ops import native
from ofakern.ops.decode_attention import kernel_cuda
from ofakern.ops.decode_linear import PackedWeight
from ofakern.ops.library import define, kernel_ready, ops_of
from ofakern.ops.memory import large_empty
from ofakern.ops.selection import Backends

BACKENDS = Backends("decode_attention", "decode_attention_forward", cuda="decode_attention")
BLOCK = 32  # keys of a block and columns of a panel: kBlock of decode_attention.h
MAX_WIDTH = 256


def depth_step(dtype: torch.dtype) -> int:
    """Elements of one key that stand together in a block: bf16 goes in pairs."""
    return 2 if dtype == torch.bfloat16 else 1


def padded_key_width(width: int, dtype: torch.dtype) -> int:
    """K as stored in a block: bf16 is padded to what a matrix tile takes."""
    return -(-width // 32) * 32 if dtype == torch.bfloat16 else width


def padded_value_width(width: int) -> int:
    """Kv as stored: whole panels."""
    return -(-width // BLOCK) * BLOCK


def pack(k: Tensor, v: Tensor, runs: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks of keys and panels of values (flat, k's dtype) of samples that follow one another in k and v."""
    keys, values = _storage(runs, k.shape[1], k.shape[2], v.shape[2], k.dtype)
    sources = [_bits(x if x.stride(-1) == 1 else x.contiguous()) for x in (k.resolve_neg(), v.resolve_neg())]
    native.kernels.decode_attention_pack(_bits(keys), _bits(values), *sources, runs, torch.get_num_threads())
    return keys, values


def project(states: Tensor, weight: PackedWeight, runs: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """`pack` of the projections k and v of states `[N,D]`, which are in memory at no time."""
    key_width, value_width = (width // heads for width in weight.widths)
    keys, values = _storage(runs, heads, key_width, value_width, states.dtype)
    ready = kernel_ready(states)
    native.kernels.decode_attention_project(
        keys,
        values,
        ready,
        weight.data,
        weight.bias,
        runs,
        heads,
        key_width,
        value_width,
        torch.get_num_threads(),
    )
    return keys, values


def _storage(runs: Tensor, heads: int, key_width: int, value_width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    room = int(((runs[:, 1] + BLOCK - 1) // BLOCK * BLOCK).sum())
    return (
        large_empty((room * heads * padded_key_width(key_width, dtype),), dtype),
        large_empty((room * heads * padded_value_width(value_width),), dtype),
    )


def _bits(x: Tensor) -> Tensor:
    """The binding knows no int8: it takes the bits."""
    return x.view(torch.uint8) if x.dtype == torch.int8 else x


def _forward_cpu(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
    row_offsets: Tensor,
    runs: Tensor | None,
    slots: Tensor | None,
    counts: Tensor | None,
    bias: Tensor | None,
    head_scale: Tensor | None,
    value_width: int,
    scale: float,
    longest: int = 0,
) -> Any:
    return native.kernels.decode_attention(
        q,
        _bits(keys),
        _bits(values),
        key_scales,
        value_scales,
        row_offsets,
        runs,
        slots,
        counts,
        bias,
        head_scale,
        value_width,
        scale,
        torch.get_num_threads(),
    )


def _forward_fake(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
    row_offsets: Tensor,
    runs: Tensor | None,
    slots: Tensor | None,
    counts: Tensor | None,
    bias: Tensor | None,
    head_scale: Tensor | None,
    value_width: int,
    scale: float,
    longest: int = 0,
) -> tuple[Tensor, Tensor]:
    rows, heads = q.shape[0], q.shape[1]
    return q.new_empty((rows, heads, value_width)), q.new_empty((rows, heads), dtype=torch.float32)


define(
    "decode_attention_fwd",
    "(Tensor q, Tensor keys, Tensor values, Tensor? key_scales, Tensor? value_scales, Tensor row_offsets, "
    "Tensor? runs, Tensor? slots, Tensor? counts, Tensor? bias, Tensor? head_scale, int value_width, float scale, "
    "int longest=0) -> (Tensor, Tensor)",
    cpu=_forward_cpu,
    cuda=kernel_cuda.forward,
    fake=_forward_fake,
)
# longest: at most so many keys has a sample of a source, for a GPU's launch; 0: not known.
FORWARD = ops_of("decode_attention_fwd")
