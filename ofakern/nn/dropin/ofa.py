"""OFA's multihead attention: the HF port's `OFAAttention` and fairseq's / OFASys's `MultiheadAttention`."""

from __future__ import annotations

import math
import uuid
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ofakern.errors import OfakernTypeError, OfakernValueError
from ofakern.nn.dropin.base import DropIn, attend, check_width, refuse_arguments, split_heads, width_refusal
from ofakern.nn.dropin.layouts import padded_layout
from ofakern.nn.dropin.masks import Mask
from ofakern.nn.dropin.positions import PositionBias


def _attend(
    where: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: PositionBias | None,
    masks: Sequence[Mask],
    *,
    scale: float,
    head_scale: Tensor | None,
    dropout_p: float,
    backend: str,
    front: int = 0,
) -> Tensor:
    """q `[B,T,H,K]`, k and v `[B,S,H,K]` to `[B,T,H*K]`."""
    bias = PositionBias() if bias is None else bias
    if front and (bias.q_pos is not None or bias.tables):
        raise OfakernValueError(f"{where}: attn_bias must be absent beside add_bias_kv or add_zero_attn, got one")
    layout = padded_layout(
        q.shape[0], q.shape[1], k.shape[1], q.device, masks=masks, front=front, term=bias.given if bias.tables else None
    )
    return attend(
        q,
        k,
        v,
        layout,
        q_pos=bias.q_pos,
        k_pos=bias.k_pos,
        tables=bias.tables,
        head_scale=head_scale,
        scale=scale,
        dropout_p=dropout_p,
        backend=backend,
    )


def _position_bias(where: str, bias: Any) -> PositionBias | None:
    if bias is None or isinstance(bias, PositionBias):
        return bias
    shape = list(bias.shape) if isinstance(bias, Tensor) else type(bias).__name__
    raise OfakernTypeError(
        f"{where}: attn_bias must be a PositionBias, got a dense {shape}\n"
        "Try: ofakern.nn.PositionBias from the position projections and OFAPositions; dense biases are never read."
    )


class OFAAttention(DropIn):
    """OFAAttention of OFA's Hugging Face port: keys `k_proj v_proj q_proj out_proj c_attn`.

    Scores are scaled by (2 * head width)^-0.5, heads weighted by `c_attn`. `attn_bias` is a `PositionBias` in place of
    the dense `[B*H,T,S]`; masks must be runs of keys; output_attentions raises.
    """

    replaced_names = ("OFAAttention",)
    needed = ("num_heads", "head_dim", "scaling", "is_decoder", "k_proj", "v_proj", "q_proj", "out_proj", "c_attn")

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        is_decoder: bool = False,
        bias: bool = True,
        scale_heads: bool = True,
    ) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.dropout = dropout
        self.head_dim = _head_width("OFAAttention", embed_dim, num_heads)
        self.scaling = float(self.head_dim * 2) ** -0.5
        self.is_decoder = is_decoder
        self.k_proj = nn.Linear(embed_dim, embed_dim, bias=bias)
        self.v_proj = nn.Linear(embed_dim, embed_dim, bias=bias)
        self.q_proj = nn.Linear(embed_dim, embed_dim, bias=bias)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias)
        self.attn_dropout = nn.Dropout(p=dropout)
        self.c_attn = nn.Parameter(torch.ones(num_heads)) if scale_heads else None

    @classmethod
    def refusal(cls, module: Any) -> str | None:
        return width_refusal(module.head_dim)

    def forward(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        past_key_value: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        output_attentions: bool = False,
        attn_bias: PositionBias | None = None,
    ) -> tuple[Tensor, None, tuple[Tensor, Tensor] | None]:
        """hidden_states `[B,T,D]`, attention_mask `[B,1,T,S]` additive; past_key_value: k and v `[B,H,S,K]`.

        Returns (`[B,T,D]`, None, k and v of a decoder's cache or what was given).
        """
        where = "OFAAttention"
        refuse_arguments(where, {"output_attentions": output_attentions}, ["output_attentions"])
        if key_value_states is not None and past_key_value is not None:
            key, value = past_key_value
        else:
            source = hidden_states if key_value_states is None else key_value_states
            key = split_heads(self.k_proj(source), self.num_heads).transpose(1, 2)
            value = split_heads(self.v_proj(source), self.num_heads).transpose(1, 2)
            if past_key_value is not None:
                key = torch.cat([past_key_value[0], key], dim=2)
                value = torch.cat([past_key_value[1], value], dim=2)
        out = _attend(
            where,
            split_heads(self.q_proj(hidden_states), self.num_heads),
            key.transpose(1, 2),
            value.transpose(1, 2),
            _position_bias(where, attn_bias),
            [] if attention_mask is None else [Mask(attention_mask, where=where)],
            scale=self.scaling,
            head_scale=self.c_attn,
            dropout_p=self.attn_dropout.p if self.training else 0.0,
            backend=self.backend,
        )
        return self.out_proj(out), None, (key, value) if self.is_decoder else past_key_value


class FairseqMultiheadAttention(DropIn):
    """fairseq's, OFA's and OFASys's MultiheadAttention, `[T,B,D]`: keys `k_proj v_proj q_proj out_proj c_attn bias_k
    bias_v`; OFASys's constructor.

    `attn_bias` is a `PositionBias` (or False: none). As published: with attn_bias None, outside of incremental decoding
    and static_kv, the scale is (head width)^-0.5 and `c_attn` is not applied. Differences: need_weights and
    need_head_weights raise (the second output is None); a query that sees no key gives out_proj's bias; masks must be
    runs of keys; add_bias_kv and add_zero_attn take no bias and no incremental state. `use_fused` is accepted, unused.
    """

    replaced_names = ("MultiheadAttention",)
    needed = (
        *("embed_dim", "num_heads", "head_dim", "scaling", "self_attention", "encoder_decoder_attention"),
        *("k_proj", "v_proj", "q_proj", "out_proj", "dropout_module", "bias_k", "add_zero_attn"),
    )

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        kdim: int | None = None,
        vdim: int | None = None,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        self_attention: bool = False,
        encoder_decoder_attention: bool = False,
        scale_factor: float = 2,
        scale_heads: bool = False,
        use_fused: bool = True,
    ) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.kdim = embed_dim if kdim is None else kdim
        self.vdim = embed_dim if vdim is None else vdim
        self.qkv_same_dim = self.kdim == embed_dim and self.vdim == embed_dim
        if self_attention and not self.qkv_same_dim:
            raise OfakernValueError(
                f"FairseqMultiheadAttention: kdim and vdim must be embed_dim ({embed_dim}) in self-attention, "
                f"got {self.kdim} and {self.vdim}"
            )
        self.num_heads = num_heads
        self.dropout_module = nn.Dropout(dropout)
        self.head_dim = _head_width("FairseqMultiheadAttention", embed_dim, num_heads)
        self.scaling = float(self.head_dim * scale_factor) ** -0.5
        self.self_attention = self_attention
        self.encoder_decoder_attention = encoder_decoder_attention
        self.c_attn = nn.Parameter(torch.ones(num_heads)) if scale_heads else None
        self.k_proj = nn.Linear(self.kdim, embed_dim, bias=bias)
        self.v_proj = nn.Linear(self.vdim, embed_dim, bias=bias)
        self.q_proj = nn.Linear(embed_dim, embed_dim, bias=bias)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias)
        self.bias_k = nn.Parameter(torch.empty(1, 1, embed_dim)) if add_bias_kv else None
        self.bias_v = nn.Parameter(torch.empty(1, 1, embed_dim)) if add_bias_kv else None
        self.add_zero_attn = add_zero_attn
        self.reset_parameters()
        self.adopt()

    def reset_parameters(self) -> None:
        gain = 1 / math.sqrt(2) if self.qkv_same_dim else 1.0
        for layer in (self.k_proj, self.v_proj, self.q_proj):
            nn.init.xavier_uniform_(layer.weight, gain=gain)
        nn.init.xavier_uniform_(self.out_proj.weight)
        if self.out_proj.bias is not None:
            nn.init.constant_(self.out_proj.bias, 0.0)
        for extra in (self.bias_k, self.bias_v):
            if extra is not None:
                nn.init.xavier_normal_(extra)

    @classmethod
    def refusal(cls, module: Any) -> str | None:
        return width_refusal(module.head_dim)

    def adopt(self) -> None:
        """The name of this layer's entry in an incremental state: fairseq's, or a new one."""
        if not hasattr(self, "_incremental_state_id"):
            self._incremental_state_id = str(uuid.uuid4())

    def forward(
        self,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        key_padding_mask: Tensor | None = None,
        incremental_state: dict[str, dict[str, Tensor | None]] | None = None,
        need_weights: bool = True,
        static_kv: bool = False,
        attn_mask: Tensor | None = None,
        need_head_weights: bool = False,
        attn_bias: PositionBias | bool | None = None,
    ) -> tuple[Tensor, None]:
        """query `[T,B,D]`, key and value `[S,B,D]`; key_padding_mask `[B,S]` (nonzero: pad); attn_mask `[T,S]` additive
        or bool (True: left out); incremental_state as in fairseq. Returns (`[T,B,D]`, None)."""
        where = "FairseqMultiheadAttention"
        if need_weights or need_head_weights:
            raise OfakernValueError(f"{where}: need_weights must be False, got True\nTry: need_weights=False")
        plain = attn_bias is None and incremental_state is None and not static_kv
        bias = None if attn_bias is False else _position_bias(where, attn_bias)
        q = split_heads(self.q_proj(query).transpose(0, 1), self.num_heads)
        k, v, padding = self._keys_values(query, key, value, key_padding_mask, incremental_state, static_kv)
        k, v, front = self._prepend(k, v)
        if front and incremental_state is not None:
            raise OfakernValueError(f"{where}: incremental_state must be None beside add_bias_kv or add_zero_attn")
        masks = []
        if padding is not None:
            padding = padding if padding.dtype == torch.bool else padding.to(torch.bool)
            masks.append(Mask(padding, "keys", left_out=True, where=where))
        if attn_mask is not None:
            masks.append(Mask(attn_mask, "pairs", left_out=True, where=where))
        dropout = self.dropout_module
        active = self.training or getattr(dropout, "apply_during_inference", False)
        out = _attend(
            where,
            q,
            k,
            v,
            bias,
            masks,
            scale=self.head_dim**-0.5 if plain else self.scaling,
            head_scale=None if plain else getattr(self, "c_attn", None),
            dropout_p=float(dropout.p) if active else 0.0,
            backend=self.backend,
            front=front,
        )
        return self.out_proj(out).transpose(0, 1), None

    def _keys_values(
        self,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        padding: Tensor | None,
        state: dict[str, dict[str, Tensor | None]] | None,
        static_kv: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """k and v `[B,S,H,K]` and the padding of their keys; the state keeps k and v as `[B,H,S,K]`."""
        saved = None if state is None else self._get_input_buffer(state)
        old_k, old_v = (None, None) if saved is None else (saved.get("prev_key"), saved.get("prev_value"))
        if static_kv and old_k is not None and old_v is not None and saved is not None:
            return old_k.transpose(1, 2), old_v.transpose(1, 2), saved.get("prev_key_padding_mask")
        if self.self_attention:
            key = value = query
        elif self.encoder_decoder_attention:
            value = key
        if key is None or value is None:
            raise OfakernValueError("FairseqMultiheadAttention: key and value must be given, got None")
        k = split_heads(self.k_proj(key).transpose(0, 1), self.num_heads)
        v = split_heads(self.v_proj(value).transpose(0, 1), self.num_heads)
        if state is None or saved is None:
            return k, v, padding
        if old_k is not None and old_v is not None:
            padding = _joined_padding(padding, saved.get("prev_key_padding_mask"), old_k.shape[2], k)
            k = torch.cat([old_k.transpose(1, 2), k], dim=1)
            v = torch.cat([old_v.transpose(1, 2), v], dim=1)
        buffer = {
            "prev_key": k.transpose(1, 2),
            "prev_value": v.transpose(1, 2),
            "prev_key_padding_mask": padding,
        }
        self._set_input_buffer(state, buffer)
        return k, v, padding

    def _prepend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, int]:
        keys, values = [k], [v]
        shape = (k.shape[0], 1, self.num_heads, self.head_dim)
        if self.bias_k is not None and self.bias_v is not None:
            keys.insert(0, self.bias_k.to(k.dtype).view(1, 1, self.num_heads, self.head_dim).expand(shape))
            values.insert(0, self.bias_v.to(v.dtype).view(1, 1, self.num_heads, self.head_dim).expand(shape))
        if self.add_zero_attn:
            keys.insert(0, k.new_zeros(shape))
            values.insert(0, v.new_zeros(shape))
        front = len(keys) - 1
        return (torch.cat(keys, 1), torch.cat(values, 1), front) if front else (k, v, 0)

    def reorder_incremental_state(
        self, incremental_state: dict[str, dict[str, Tensor | None]], new_order: Tensor
    ) -> dict[str, dict[str, Tensor | None]]:
        """Takes the samples `new_order` of the kept keys and values, as a beam search does."""
        buffer = self._get_input_buffer(incremental_state)
        for name, kept in buffer.items():
            if kept is None:
                continue
            if self.encoder_decoder_attention and kept.shape[0] == new_order.shape[0]:
                break  # a memory that every beam of a sample shares
            buffer[name] = kept.index_select(0, new_order)
        self._set_input_buffer(incremental_state, buffer)
        return incremental_state

    def _get_input_buffer(self, state: dict[str, dict[str, Tensor | None]] | None) -> dict[str, Tensor | None]:
        return {} if state is None else state.get(f"{self._incremental_state_id}.attn_state") or {}

    def _set_input_buffer(
        self, state: dict[str, dict[str, Tensor | None]], buffer: dict[str, Tensor | None]
    ) -> dict[str, dict[str, Tensor | None]]:
        state[f"{self._incremental_state_id}.attn_state"] = buffer
        return state


def _joined_padding(new: Tensor | None, old: Tensor | None, kept: int, k: Tensor) -> Tensor | None:
    """Padding of kept and new keys; where one half has none, its keys are real."""
    if new is None and old is None:
        return None
    batch, fresh = k.shape[:2]
    if new is not None and new.shape[1] == kept + fresh:
        return new
    first = torch.zeros(batch, kept, dtype=torch.bool, device=k.device) if old is None else old.to(torch.bool)
    second = torch.zeros(batch, fresh, dtype=torch.bool, device=k.device) if new is None else new.to(torch.bool)
    return torch.cat([first, second], dim=1)


def _head_width(where: str, dim: int, heads: int) -> int:
    if heads < 1 or dim % heads:
        raise OfakernValueError(f"{where}: embed_dim must be a multiple of num_heads ({heads}), got {dim}")
    check_width(where, dim // heads)
    return dim // heads
