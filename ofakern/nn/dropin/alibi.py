"""Attention with ALiBi (BLOOM's, MPT's): a bias of the key alone, one table row per key."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ofakern.errors import OfakernValueError
from ofakern.nn.dropin.base import DropIn, attend, check_width, refuse_arguments, split_heads, width_refusal
from ofakern.nn.dropin.layouts import KeyBias, padded_layout
from ofakern.nn.dropin.masks import Mask

_UNSUPPORTED = ("output_attentions", "head_mask")


class BloomAttention(DropIn):
    """transformers' BloomAttention (ALiBi: Press et al., arXiv 2108.12409): keys `query_key_value dense`.

    The `alibi` it is given (any bias of sample, head and key) is used as it is, with its gradient. Differences: the
    second output is None; a query that sees no key gives 0; masks must be runs of keys; output_attentions raises.
    """

    replaced_names = ("BloomAttention",)
    needed = ("num_heads", "head_dim", "inv_norm_factor", "beta", "query_key_value", "dense", "attention_dropout")

    def __init__(self, config: Any, layer_idx: int | None = None) -> None:
        """config: anything with transformers' BloomConfig attributes."""
        super().__init__()
        self.pretraining_tp = config.pretraining_tp
        self.slow_but_exact = config.slow_but_exact
        self.hidden_size = config.hidden_size
        self.num_heads = config.n_head
        self.head_dim = self.hidden_size // self.num_heads
        self.split_size = self.hidden_size
        self.hidden_dropout = config.hidden_dropout
        self.inv_norm_factor = 1.0 / math.sqrt(self.head_dim)
        self.beta = 1.0
        self.layer_idx = layer_idx
        if self.head_dim * self.num_heads != self.hidden_size:
            raise OfakernValueError(
                f"BloomAttention: hidden_size must be a multiple of n_head ({self.num_heads}), got {self.hidden_size}"
            )
        check_width("BloomAttention", self.head_dim)
        reason = self.refusal(self)
        if reason is not None:
            raise OfakernValueError(f"BloomAttention: {reason}")
        self.query_key_value = nn.Linear(self.hidden_size, 3 * self.hidden_size, bias=True)
        self.dense = nn.Linear(self.hidden_size, self.hidden_size)
        self.attention_dropout = nn.Dropout(config.attention_dropout)

    @classmethod
    def refusal(cls, module: Any) -> str | None:
        if module.pretraining_tp > 1 and module.slow_but_exact:
            return "slow_but_exact must be off with pretraining_tp above 1 (its sums have another order), got on"
        return width_refusal(module.head_dim)

    def forward(
        self,
        hidden_states: Tensor,
        residual: Tensor,
        alibi: Tensor,
        attention_mask: Tensor | None,
        layer_past: Any = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """hidden_states, residual `[B,T,D]`, alibi `[B*H,1,S]`, attention_mask `[B,1,T,S]` (bool: True is seen).

        Returns (`[B,T,D]` with the residual added, None). layer_past: transformers' cache.
        """
        where = "BloomAttention"
        refuse_arguments(where, {"output_attentions": output_attentions, **kwargs}, _UNSUPPORTED)
        batch, queries = hidden_states.shape[:2]
        fused = self.query_key_value(hidden_states).view(batch, queries, self.num_heads, 3, self.head_dim)
        q, k, v = fused.unbind(3)
        if layer_past is not None:
            k, v = (x.transpose(1, 2) for x in layer_past.update(k.transpose(1, 2), v.transpose(1, 2), self.layer_idx))
        keys = k.shape[1]
        if tuple(alibi.shape) != (batch * self.num_heads, 1, keys):
            raise OfakernValueError(
                f"{where}: alibi must be [B*H={batch * self.num_heads},1,S={keys}], got {list(alibi.shape)}"
            )
        bias = alibi if self.beta == 1.0 else alibi * self.beta
        out = attend(
            q,
            k,
            v,
            _layout(where, batch, queries, keys, hidden_states.device, attention_mask, KeyBias(per_sample=True), False),
            tables=[bias.view(batch, self.num_heads, keys).transpose(0, 1).reshape(self.num_heads, batch * keys)],
            scale=float(self.inv_norm_factor),
            dropout_p=self.attention_dropout.p if self.training else 0.0,
            backend=self.backend,
        )
        return residual + F.dropout(self.dense(out), self.hidden_dropout, self.training), None


class MptAttention(DropIn):
    """transformers' MptAttention: keys `Wqkv out_proj`; `position_bias` `[H,1,S or more]` (the last S entries count).

    Differences as `BloomAttention`'s; a position bias that depends on the query raises.
    """

    replaced_names = ("MptAttention",)
    needed = ("n_heads", "head_dim", "softmax_scale", "attn_dropout_p", "clip_qkv", "Wqkv", "out_proj")

    def __init__(self, config: Any, layer_idx: int | None = None) -> None:
        """config: anything with transformers' MptConfig attributes."""
        super().__init__()
        self.hidden_size = config.hidden_size
        self.n_heads = config.n_heads
        self.max_seq_length = config.max_seq_len
        self.head_dim = self.hidden_size // self.n_heads
        check_width("MptAttention", self.head_dim)
        scale = config.attn_config.softmax_scale
        self.softmax_scale = 1 / math.sqrt(self.hidden_size / self.n_heads) if scale is None else scale
        self.attn_dropout_p = config.attn_config.attn_pdrop
        self.clip_qkv = config.attn_config.clip_qkv
        self.Wqkv = nn.Linear(self.hidden_size, 3 * self.hidden_size, bias=False)
        self.out_proj = nn.Linear(self.hidden_size, self.hidden_size, bias=False)
        self.layer_idx = layer_idx

    @classmethod
    def refusal(cls, module: Any) -> str | None:
        return width_refusal(module.head_dim)

    def forward(
        self,
        hidden_states: Tensor,
        position_bias: Tensor | None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """hidden_states `[B,T,D]`; attention_mask `[B,1,T,S]` bool, True is left out. Returns (`[B,T,D]`, None)."""
        where = "MptAttention"
        refuse_arguments(where, kwargs, _UNSUPPORTED)
        batch, queries = hidden_states.shape[:2]
        mixed = self.Wqkv(hidden_states)
        if self.clip_qkv:
            mixed = mixed.clamp(min=-self.clip_qkv, max=self.clip_qkv)
        q, k, v = (split_heads(part, self.n_heads) for part in mixed.chunk(3, dim=2))
        if past_key_values is not None:
            cached = past_key_values.update(k.transpose(1, 2), v.transpose(1, 2), self.layer_idx)
            k, v = (x.transpose(1, 2) for x in cached)
        keys = k.shape[1]
        term, tables = None, []
        if position_bias is not None:
            if position_bias.dim() != 3 or position_bias.shape[1] != 1 or position_bias.shape[2] < keys:
                raise OfakernValueError(
                    f"{where}: position_bias must be [H={self.n_heads},1,at least {keys}], "
                    f"got {list(position_bias.shape)}"
                )
            term = KeyBias(per_sample=False)
            tables = [position_bias[:, 0, position_bias.shape[2] - keys :]]
        out = attend(
            q,
            k,
            v,
            _layout(where, batch, queries, keys, hidden_states.device, attention_mask, term, True),
            tables=tables,
            scale=float(self.softmax_scale),
            dropout_p=self.attn_dropout_p if self.training else 0.0,
            backend=self.backend,
        )
        return self.out_proj(out), None


def _layout(
    where: str,
    batch: int,
    queries: int,
    keys: int,
    device: torch.device,
    mask: Tensor | None,
    term: KeyBias | None,
    left_out: bool,
) -> Any:
    masks = [] if mask is None else [Mask(mask, left_out=left_out, where=where)]
    return padded_layout(batch, queries, keys, device, masks=masks, term=term)
