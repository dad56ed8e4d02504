"""LayerNorm with what stands before it: one kernel where there is one for the tensors, torch's own ops elsewhere."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ofakern.ops.layer_norm import add_layer_norm, embed_layer_norm, gelu_layer_norm
from ofakern.ops.layer_norm.api import BACKENDS
from ofakern.ops.selection import KERNEL_DTYPES

# Elements up to which, without a gradient, the fused addition's call costs more than torch's two ops: a decoding step.
_FEW = 2**15

_READY = all(backends.unavailable["cpu"] is None for backends in BACKENDS.values())


def has_kernel(x: Tensor, norm: nn.Module) -> bool:
    """Whether the fused kernels take x and this norm. GPUs keep torch's ops, float64 too, and so does a norm that is
    more (or less) than a LayerNorm over the last dimension with weight and bias."""
    return (
        _READY
        and x.device.type == "cpu"
        and x.dtype in KERNEL_DTYPES
        and type(norm) is nn.LayerNorm
        and len(norm.normalized_shape) == 1
        and norm.weight is not None
        and norm.bias is not None
    )


def add_norm(branch: Tensor, residual: Tensor, norm: nn.LayerNorm, dropout: float = 0.0) -> tuple[Tensor, Tensor]:
    """(norm(total), total) of `total = residual + dropout(branch)`, `[..., D]` each.

    The masks come from torch's default generator either way, but differ between the kernel and torch's own ops.
    """
    few = branch.numel() <= _FEW and dropout == 0.0 and not torch.is_grad_enabled()
    if not few and has_kernel(branch, norm) and has_kernel(residual, norm):
        return add_layer_norm(branch, residual, norm.weight, norm.bias, norm.eps, dropout)
    total = residual + F.dropout(branch, dropout)
    return norm(total), total


def gelu_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    """norm(gelu(x)), the exact GELU."""
    if has_kernel(x, norm):
        return gelu_layer_norm(x, norm.weight, norm.bias, norm.eps)
    y: Tensor = norm(F.gelu(x))
    return y


def embed_norm(
    tokens: Tensor, table: Tensor, norm: nn.LayerNorm, type_row: Tensor | None = None, scale: float = 1.0
) -> Tensor:
    """norm(scale * table[tokens] + type_row): int64 `[...]`, `[V, D]` and `[1, D]` to `[..., D]`."""
    if has_kernel(table, norm) and tokens.dtype == torch.int64 and tokens.device.type == "cpu":
        return embed_layer_norm(tokens, table, norm.weight, norm.bias, type_row, scale=scale, eps=norm.eps)
    embed = F.embedding(tokens, table) * scale
    y: Tensor = norm(embed if type_row is None else embed + type_row)
    return y
