"""Multi-head attention with structured position bias on packed tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ofakern.errors import OfakernValueError
from ofakern.nn.light import merge
from ofakern.nn.linear import Linear
from ofakern.ops.attention import AttentionLayout, attention


@dataclass(frozen=True)
class Positions:
    """What a stack's layers share: a layout and the factored position term.

    layout: of this attention. q_pos `[Nq, H, P]`, k_pos `[Nk, H, P]` (with rows as `layout.shared` counts them, where
    samples share positions): both or neither. backend: of the op.
    prefix_layout: of the learned keys that all queries see, where there are any.
    """

    layout: AttentionLayout
    q_pos: Tensor | None = None
    k_pos: Tensor | None = None
    backend: str = "auto"
    prefix_layout: AttentionLayout | None = None


class MultiheadAttention(nn.Module):
    """OFA's attention: scores scaled by (head width * attn_scale_factor)^-0.5, heads weighted by `c_attn`.

    dim: model width D; heads: H (divides D; D / H a multiple of 8); dropout: of the probabilities, in training.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        attn_scale_factor: float = 2.0,
        scale_heads: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if dim % heads or (dim // heads) % 8:
            raise OfakernValueError(f"MultiheadAttention: dim must be heads ({heads}) times a multiple of 8, got {dim}")
        self.heads = heads
        self.width = dim // heads
        self.scale = (self.width * attn_scale_factor) ** -0.5
        self.dropout = dropout
        self.use_head_scale = scale_heads
        self.q_proj = Linear(dim, dim)
        self.k_proj = Linear(dim, dim)
        self.v_proj = Linear(dim, dim)
        self.out_proj = Linear(dim, dim)
        self.c_attn = nn.Parameter(torch.ones(heads)) if scale_heads else None

    def split(self, x: Tensor) -> Tensor:
        """`[N, D]` to `[N, H, K]`, a view."""
        return split_heads(x, self.heads)

    def keys_values(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """k and v `[Nk, H, K]` of the tokens `[Nk, D]` that will be attended to."""
        return self.split(self.k_proj(source)), self.split(self.v_proj(source))

    def source_keys_values(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """`keys_values` for tokens that are all that is attended to, without a gradient: a bias of k adds the same to
        all scores of a query and is left out; torch's product is a third slower with one."""
        k, v = F.linear(source, self.k_proj.weight), F.linear(source, self.v_proj.weight)
        return self.split(k), self.split(v.add_(self.v_proj.bias))

    def forward(
        self,
        x: Tensor,
        positions: Positions,
        tables: Sequence[Tensor] = (),
        keys_values: tuple[Tensor, Tensor] | None = None,
        prefix: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """x `[Nq, D]`; keys_values: of other tokens (default: of x itself); prefix: learned k and v `[P, H, K]`, seen
        by all (without position terms). Returns `[Nq, D]`."""
        k, v = self.keys_values(x) if keys_values is None else keys_values
        q = self.split(self.q_proj(x))
        call = partial(
            attention,
            head_scale=self.c_attn if self.use_head_scale else None,
            scale=self.scale,
            dropout_p=self.dropout if self.training else 0.0,
            backend=positions.backend,
        )
        own = partial(call, q, k, v, positions.layout, q_pos=positions.q_pos, k_pos=positions.k_pos, tables=tables)
        if prefix is None:
            out = own()
        else:
            if positions.prefix_layout is None:
                raise OfakernValueError("MultiheadAttention: positions must have a prefix_layout, got None")
            shared = [part.to(q.dtype).contiguous() for part in prefix]
            parts = (own(return_lse=True), call(q, *shared, positions.prefix_layout, return_lse=True))
            out = merge(*parts[0], *parts[1])
        y: Tensor = self.out_proj(out.flatten(-2))
        return y


def dense_probabilities(
    attention_layer: MultiheadAttention,
    x: Tensor,
    positions: Positions,
    keys: Tensor,
    q_lengths: Sequence[int],
    k_lengths: Sequence[int],
) -> list[Tensor]:
    """What each sample's queries give to its keys, f32 `[H, Tq, Tk]`, where every query sees all keys of its sample.

    In plain torch and with a gradient: for looking at one layer of cross attention, or a loss on it. x `[Nq, D]`: what
    the layer is given; keys `[Nk, H, K]`: of `keys_values`. Lengths: tokens per sample.
    """
    q = attention_layer.split(attention_layer.q_proj(x)).float()
    k = keys.float()
    if positions.q_pos is not None and positions.k_pos is not None:
        q_pos, k_pos, shared = positions.q_pos, positions.k_pos, positions.layout.shared
        if shared is not None:
            q_pos, k_pos = shared.spelled_out(q_pos, k_pos)
        q, k = torch.cat([q, q_pos.float()], 2), torch.cat([k, k_pos.float()], 2)
    found = []
    for own_q, own_k in zip(torch.split(q, list(q_lengths)), torch.split(k, list(k_lengths)), strict=True):
        scores = torch.einsum("ihp,jhp->hij", own_q, own_k) * attention_layer.scale
        found.append(scores.softmax(2))
    return found


def split_heads(x: Tensor, heads: int) -> Tensor:
    """`[N, H * K]` to `[N, H, K]`, a view."""
    return x.view(x.shape[0], heads, x.shape[1] // heads)


def gelu_or_relu(name: str, x: Tensor) -> Tensor:
    """The activation by its name; gelu is the exact one."""
    if name == "gelu":
        return F.gelu(x)
    if name == "relu":
        return F.relu(x)
    raise OfakernValueError(f"activation: name must be 'gelu' or 'relu', got {name!r}")
