"""Encoder and decoder layers of OFA: pre- or post-norm with the NormFormer extras, on packed tokens `[N, D]`.

Parameter names are those of the published checkpoints (`attn_ln`, `ffn_layernorm`, `w_resid`, ...).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ofakern.errors import OfakernValueError
from ofakern.nn.attention import MultiheadAttention, Positions, gelu_or_relu
from ofakern.nn.experts import Routing
from ofakern.nn.light import Bottleneck
from ofakern.nn.linear import Linear
from ofakern.nn.norm import add_norm, gelu_norm
from ofakern.nn.recompute import recomputed


@dataclass(frozen=True)
class LayerConfig:
    """What one layer needs to know. Rates are probabilities; `drop_path` is this layer's own; `experts`: feed-forward
    experts (0: none); `adapter_dim`: width of a bottleneck after the feed-forward part (0: none)."""

    dim: int
    ffn_dim: int
    heads: int
    activation: str = "gelu"
    normalize_before: bool = True
    dropout: float = 0.0
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    drop_path: float = 0.0
    attn_scale_factor: float = 2.0
    scale_attn: bool = True
    scale_fc: bool = True
    scale_heads: bool = True
    scale_resids: bool = False
    experts: int = 0
    adapter_dim: int = 0

    def attention(self) -> MultiheadAttention:
        return MultiheadAttention(
            self.dim,
            self.heads,
            attn_scale_factor=self.attn_scale_factor,
            scale_heads=self.scale_heads,
            dropout=self.attention_dropout,
        )

    def norm(self, width: int, present: bool = True) -> nn.LayerNorm | None:
        return nn.LayerNorm(width) if present else None


def drop_path(x: Tensor, rate: float, sample_id: Tensor, samples: int) -> Tensor:
    """Drops a residual branch `[N, D]` for whole samples; kept ones grow by 1 / (1 - rate). sample_id: int `[N]`."""
    keep = torch.empty(samples, dtype=x.dtype, device=x.device).bernoulli_(1.0 - rate).div_(1.0 - rate)
    return x * keep.index_select(0, sample_id)[:, None]


@dataclass(frozen=True)
class Samples:
    """Which sample a packed token is of: sample_id int `[N]`, count B. Needed by drop path only."""

    sample_id: Tensor
    count: int


class _Layer(nn.Module):
    """The feed-forward half and the residual rules that both kinds of layer share."""

    def __init__(self, config: LayerConfig) -> None:
        super().__init__()
        self.config = config
        self.fc1 = Linear(config.dim, config.ffn_dim)
        self.fc2 = Linear(config.ffn_dim, config.dim)
        self.ffn_layernorm = config.norm(config.ffn_dim, config.scale_fc)
        self.final_layer_norm = nn.LayerNorm(config.dim)
        self.w_resid = nn.Parameter(torch.ones(config.dim)) if config.scale_resids else None
        self.adapter = Bottleneck(config.dim, config.adapter_dim) if config.adapter_dim else None
        # With experts the published layers keep fc1 and fc2, unused; so do we, for their checkpoints.
        self.experts_fc1 = _experts(config.experts, config.dim, config.ffn_dim)
        self.experts_fc2 = _experts(config.experts, config.ffn_dim, config.dim)

    def join(
        self,
        y: Tensor,
        x: Tensor,
        own_norm: nn.LayerNorm,
        next_norm: nn.LayerNorm,
        samples: Samples | None,
        extra_norm: nn.LayerNorm | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Adds a sub-layer's output y to the residual x, both `[N, D]`.

        Returns the new residual and what the next sub-layer's projections see of it: its norm's result, the residual
        itself in a post-norm layer (where own_norm has been applied).
        """
        y, dropout = self._branch(y, extra_norm, samples)
        if self.config.normalize_before:
            seen, total = add_norm(y, x, next_norm, dropout)
            return total, seen
        normed, _ = add_norm(y, x, own_norm, dropout)
        return normed, normed

    def before(self, x: Tensor, norm: nn.LayerNorm) -> Tensor:
        return norm(x) if self.config.normalize_before else x

    def feed_forward(
        self, x: Tensor, samples: Samples | None, routing: Routing | None, seen: Tensor | None = None
    ) -> Tensor:
        """The second half of a layer. x: the residual; seen: what `join` says fc1 sees of it (default: made here)."""
        y = self.before(x, self.final_layer_norm) if seen is None else seen
        if self.experts_fc1 is None or self.experts_fc2 is None:
            y = self._dense(self.fc1(y))
        elif routing is None:
            raise OfakernValueError("feed_forward: routing must be given to a layer with experts, got None")
        else:
            y = routing.leave(self.hidden(routing.enter(y, self.experts_fc1)), self.experts_fc2)
        return self.leave(y, x, samples)

    def _dense(self, y: Tensor) -> Tensor:
        """fc2 of what `hidden` makes of fc1's y. In float32 that is made again for fc2's gradient: an eighth of the
        layer's memory for less than a hundredth of its time; in 16 bits products are so fast that it would be more."""
        if y.dtype != torch.float32 or (self.training and self.config.activation_dropout > 0):
            out: Tensor = self.fc2(self.hidden(y))
            return out
        return recomputed(lambda y, first: self.fc2(self.hidden(y)), y)

    def leave(self, y: Tensor, x: Tensor, samples: Samples | None) -> Tensor:
        """Adds the feed-forward part's output y to the residual x, both `[N, D]`: the layer's result."""
        y, dropout = self._branch(y, None, samples, self.adapter)
        residual = x if self.w_resid is None else x * self.w_resid
        if self.config.normalize_before:  # the next norm is another layer's
            return residual + F.dropout(y, dropout)
        return add_norm(y, residual, self.final_layer_norm, dropout)[0]

    def _branch(
        self, y: Tensor, extra_norm: nn.LayerNorm | None, samples: Samples | None, adapter: Bottleneck | None = None
    ) -> tuple[Tensor, float]:
        """What a sub-layer's output goes through before it joins the residual, and the rate of the dropout that is left
        to the addition: all of it, unless something stands between the two."""
        if extra_norm is not None:
            y = extra_norm(y)
        dropout = self.config.dropout if self.training else 0.0
        drop_paths = self.training and self.config.drop_path > 0 and samples is not None
        if adapter is None and not drop_paths:
            return y, dropout
        y = F.dropout(y, dropout)
        if adapter is not None:
            y = adapter(y)
        if drop_paths and samples is not None:
            y = drop_path(y, self.config.drop_path, samples.sample_id, samples.count)
        return y, 0.0

    def hidden(self, y: Tensor) -> Tensor:
        """What stands between fc1 and fc2: activation and norm of `[N, F]`."""
        dropout = self.config.activation_dropout if self.training else 0.0
        if self.ffn_layernorm is not None and self.config.activation == "gelu" and dropout == 0.0:
            return gelu_norm(y, self.ffn_layernorm)
        y = F.dropout(gelu_or_relu(self.config.activation, y), dropout)
        return y if self.ffn_layernorm is None else self.ffn_layernorm(y)


def _experts(count: int, width: int, out: int) -> nn.ModuleList | None:
    return nn.ModuleList(Linear(width, out) for _ in range(count)) if count else None


class EncoderLayer(_Layer):
    """Self-attention and feed-forward. x `[N, D]` to `[N, D]`."""

    def __init__(self, config: LayerConfig) -> None:
        super().__init__(config)
        self.self_attn = config.attention()
        self.attn_ln = config.norm(config.dim, config.scale_attn)
        self.self_attn_layer_norm = nn.LayerNorm(config.dim)

    def forward(
        self,
        x: Tensor,
        positions: Positions,
        tables: Sequence[Tensor] = (),
        samples: Samples | None = None,
        routing: Routing | None = None,
        prefix: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        y = self.self_attn(self.before(x, self.self_attn_layer_norm), positions, tables, prefix=prefix)
        x, seen = self.join(y, x, self.self_attn_layer_norm, self.final_layer_norm, samples, self.attn_ln)
        return self.feed_forward(x, samples, routing, seen)


class DecoderLayer(_Layer):
    """Self-attention, cross attention to the encoder's tokens, feed-forward. x `[Nt, D]` to `[Nt, D]`."""

    def __init__(self, config: LayerConfig) -> None:
        super().__init__(config)
        self.self_attn = config.attention()
        self.self_attn_ln = config.norm(config.dim, config.scale_attn)
        self.self_attn_layer_norm = nn.LayerNorm(config.dim)
        self.encoder_attn = config.attention()
        self.cross_attn_ln = config.norm(config.dim, config.scale_attn)
        self.encoder_attn_layer_norm = nn.LayerNorm(config.dim)

    def forward(
        self,
        x: Tensor,
        positions: Positions,
        cross: Positions,
        source_keys_values: tuple[Tensor, Tensor],
        tables: Sequence[Tensor] = (),
        samples: Samples | None = None,
        routing: Routing | None = None,
        prefix: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """source_keys_values: `encoder_attn.keys_values` of the encoder."""
        y = self.self_attn(self.before(x, self.self_attn_layer_norm), positions, tables, prefix=prefix)
        x, seen = self.join(y, x, self.self_attn_layer_norm, self.encoder_attn_layer_norm, samples, self.self_attn_ln)
        y = self.encoder_attn(seen, cross, keys_values=source_keys_values)
        x, seen = self.join(y, x, self.encoder_attn_layer_norm, self.final_layer_norm, samples, self.cross_attn_ln)
        return self.feed_forward(x, samples, routing, seen)
