"""T5's attention (T5, mT5, UMT5): relative buckets as a table of differences, never a `[1,H,T,S]` bias."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from ofakern.errors import OfakernValueError
from ofakern.nn.dropin.base import (
    DropIn,
    attend,
    check_width,
    refuse_arguments,
    split_heads,
    unfold_table,
    width_refusal,
)
from ofakern.nn.dropin.layouts import Shift, padded_layout
from ofakern.nn.dropin.masks import Mask
from ofakern.nn.relative import RelativeBlock

_UNSUPPORTED = ("output_attentions", "head_mask", "layer_head_mask", "cross_attn_layer_head_mask")
_BIAS = Shift()


def t5_bucket(difference: Tensor, bidirectional: bool, num_buckets: int, max_distance: int) -> Tensor:
    """T5's buckets. difference: int64, query minus key position; int64 rows in `[0, num_buckets)`.

    The logarithm is float32, as in the published code (Raffel et al., arXiv 1910.10683).
    """
    if bidirectional:
        num_buckets //= 2
        side = (difference < 0).to(torch.int64) * num_buckets
        distance = difference.abs()
    else:
        side = torch.zeros_like(difference)
        distance = difference.clamp(min=0)
    exact = num_buckets // 2
    ratio = torch.log(distance.float().clamp(min=1) / exact) / math.log(max_distance / exact)
    far = (exact + (ratio * (num_buckets - exact)).to(torch.int64)).clamp(max=num_buckets - 1)
    return side + torch.where(distance < exact, distance, far)


@lru_cache(maxsize=32)
def _bucket_line(bidirectional: bool, num_buckets: int, max_distance: int) -> tuple[int, ...]:
    """Buckets of the differences -max_distance .. max_distance; beyond them the outermost ones repeat."""
    line = torch.arange(-max_distance, max_distance + 1)
    return tuple(t5_bucket(line, bidirectional, num_buckets, max_distance).tolist())


def _index(line: Tensor, queries: int, keys: int, past: int | Tensor) -> Tensor:
    """Bucket of every table row: row r is the difference `r - (S - 1) + past`."""
    reach = line.shape[0] // 2
    difference = torch.arange(queries + keys, device=line.device) - (keys - 1) + past
    return line[difference.clamp(-reach, reach) + reach]


@lru_cache(maxsize=64)
def _block(line: tuple[int, ...], queries: int, keys: int, past: int, device: torch.device) -> RelativeBlock:
    return RelativeBlock.build(_index(torch.tensor(line), queries, keys, past), 0).to(device)


class _T5Base(DropIn):
    """Projections, cache and buckets that T5's and UMT5's attention share."""

    needed = (
        *("config", "is_decoder", "has_relative_attention_bias", "relative_attention_num_buckets"),
        *("relative_attention_max_distance", "key_value_proj_dim", "n_heads", "dropout", "q", "k", "v", "o"),
    )
    is_causal: bool

    def __init__(
        self,
        config: Any,
        has_relative_attention_bias: bool = False,
        layer_idx: int | None = None,
        is_causal: bool = False,
    ) -> None:
        """config: anything with transformers' T5Config attributes (d_model, d_kv, num_heads, dropout_rate, ...)."""
        super().__init__()
        self.config = config
        self.is_decoder = config.is_decoder
        self.is_causal = is_causal
        self.has_relative_attention_bias = has_relative_attention_bias
        self.relative_attention_num_buckets = config.relative_attention_num_buckets
        self.relative_attention_max_distance = config.relative_attention_max_distance
        self.d_model = config.d_model
        self.key_value_proj_dim = config.d_kv
        self.n_heads = config.num_heads
        self.dropout = config.dropout_rate
        self.inner_dim = self.n_heads * self.key_value_proj_dim
        self.scaling = 1.0
        self.layer_idx = layer_idx
        self.q = nn.Linear(self.d_model, self.inner_dim, bias=False)
        self.k = nn.Linear(self.d_model, self.inner_dim, bias=False)
        self.v = nn.Linear(self.d_model, self.inner_dim, bias=False)
        self.o = nn.Linear(self.inner_dim, self.d_model, bias=False)
        if has_relative_attention_bias:
            self.relative_attention_bias = nn.Embedding(self.relative_attention_num_buckets, self.n_heads)
        self.gradient_checkpointing = False
        check_width(type(self).__name__, self.key_value_proj_dim)
        reason = self._bucket_refusal(self)
        if reason is not None:
            raise OfakernValueError(f"{type(self).__name__}: {reason}")
        self.adopt()

    @classmethod
    def refusal(cls, module: Any) -> str | None:
        return width_refusal(module.key_value_proj_dim, "d_kv") or cls._bucket_refusal(module)

    @staticmethod
    def _bucket_refusal(module: Any) -> str | None:
        buckets = module.relative_attention_num_buckets // (1 if module.is_decoder else 2)
        if buckets < 2 or module.relative_attention_max_distance <= buckets // 2:
            return (
                "relative_attention_max_distance must exceed the exact buckets and buckets must be at least 2 a side, "
                f"got {module.relative_attention_max_distance} and {module.relative_attention_num_buckets}"
            )
        return None

    def adopt(self) -> None:
        self._line = _bucket_line(
            not self.is_decoder, self.relative_attention_num_buckets, self.relative_attention_max_distance
        )

    def compute_bias(
        self, query_length: int, key_length: int, device: Any = None, past_seen_tokens: int | Tensor = 0
    ) -> Tensor:
        """The replaced layer's dense bias `[1,H,T,S]`, for inspection; forward does not form it."""
        weight = self.relative_attention_bias.weight
        line = torch.tensor(self._line, device=weight.device if device is None else device)
        rows = _index(line, query_length, key_length, past_seen_tokens)
        query, key = (torch.arange(n, device=line.device) for n in (query_length, key_length))
        bias = weight[rows[query[:, None] - key + key_length - 1]]
        return bias.permute(2, 0, 1)[None]

    def table(self, queries: int, keys: int, past: int | Tensor) -> Tensor:
        """f32 `[H, T+S]`: the bias of query minus key position, row `i - j + S - 1`."""
        weight = self.relative_attention_bias.weight
        return unfold_table(
            weight,
            lambda device: _index(torch.tensor(self._line, device=device), queries, keys, past),
            lambda: _block(self._line, queries, keys, int(past), weight.device),
        )

    def _attend(
        self, hidden: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, table: Tensor | None, cross: bool
    ) -> Tensor:
        batch, queries = hidden.shape[:2]
        keys = key.shape[2]
        layout = padded_layout(
            batch,
            queries,
            keys,
            hidden.device,
            masks=[] if mask is None else [Mask(mask, where=type(self).__name__)],
            causal=mask is None and not cross and queries > 1 and self._causal_without_mask(),
            term=None if table is None else _BIAS,
        )
        out = attend(
            split_heads(self.q(hidden), self.n_heads),
            key.transpose(1, 2),
            value.transpose(1, 2),
            layout,
            tables=[] if table is None else [table],
            scale=float(self.scaling),
            dropout_p=self.dropout if self.training else 0.0,
            backend=self.backend,
        )
        result: Tensor = self.o(out)
        return result

    def _causal_without_mask(self) -> bool:
        # transformers leaves the mask out where its attention function reads `is_causal`; its eager function does not.
        implementation = getattr(self.config, "_attn_implementation", None)
        return bool(self.is_causal) and implementation not in (None, "eager")

    def _keys_values(self, hidden: Tensor, source: Tensor | None, cache: Any) -> tuple[Tensor, Tensor]:
        """k and v `[B,H,S,K]`: projected, or taken from and put into transformers' cache."""
        split = getattr(cache, "is_updated", None)  # EncoderDecoderCache: two caches and which layers' memory is kept
        own = cache
        if split is not None:
            own = cache.self_attention_cache if source is None else cache.cross_attention_cache
        if source is not None and split is not None and split.get(self.layer_idx):
            kept = own.layers[self.layer_idx]
            return kept.keys, kept.values
        states = hidden if source is None else source
        key = split_heads(self.k(states), self.n_heads).transpose(1, 2)
        value = split_heads(self.v(states), self.n_heads).transpose(1, 2)
        if cache is not None:
            key, value = own.update(key, value, self.layer_idx)
            if source is not None and split is not None:
                split[self.layer_idx] = True
        return key, value

    def _past(self, cache: Any) -> int | Tensor:
        if cache is None:
            return 0
        past = cache.get_seq_length(self.layer_idx)
        # A static cache hands out the tensor that its update then changes.
        return past.clone() if isinstance(past, Tensor) else int(past)


class T5Attention(_T5Base):
    """transformers' T5Attention and MT5Attention (Raffel et al., arXiv 1910.10683), on the fused kernel.

    Constructor `(config, has_relative_attention_bias=False, layer_idx=None, is_causal=False)`, state-dict keys `q k v o
    relative_attention_bias`. Differences: `position_bias` is a compact `[1, H, 1, T + S]` that only layers of this
    class read (None where there is no bias; `compute_bias` gives the dense one), the third output is always None, a
    query that sees no key gives 0. Masks must be runs of keys; `output_attentions` and head masks raise.
    """

    replaced_names = ("T5Attention", "MT5Attention")

    def forward(
        self,
        hidden_states: Tensor,
        mask: Tensor | None = None,
        key_value_states: Tensor | None = None,
        position_bias: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, None]:
        """hidden_states `[B,T,D]`; mask `[B,1,T or 1,S]` bool (True: seen) or additive; key_value_states `[B,S,D]`.

        Returns (`[B,T,D]`, the position bias for the next layer, None). Raises OfakernValueError for masks that are not
        runs of keys, a dense position bias, and what is listed above.
        """
        where = type(self).__name__
        refuse_arguments(where, kwargs, _UNSUPPORTED)
        past = self._past(past_key_values)
        key, value = self._keys_values(hidden_states, key_value_states, past_key_values)
        queries, keys = hidden_states.shape[1], key.shape[2]
        if position_bias is None and self.has_relative_attention_bias:
            position_bias = self.table(queries, keys, past)[None, :, None]
        table = None
        if position_bias is not None:
            wanted = (1, self.n_heads, 1, queries + keys)
            if tuple(position_bias.shape) != wanted:
                raise OfakernValueError(
                    f"{where}: position_bias must be what this class's layers return, {list(wanted)}, "
                    f"got {list(position_bias.shape)}\n"
                    "Try: replace the layer that made the bias too; dense biases are never read."
                )
            table = position_bias[0, :, 0]
        out = self._attend(hidden_states, key, value, mask, table, key_value_states is not None)
        return out, position_bias, None


class UMT5Attention(_T5Base):
    """transformers' UMT5Attention: T5's, with a table in every layer. Differences as for `T5Attention`."""

    replaced_names = ("UMT5Attention",)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """hidden_states `[B,T,D]`; attention_mask as T5Attention's mask; returns (`[B,T,D]`, None)."""
        refuse_arguments(type(self).__name__, kwargs, _UNSUPPORTED)
        past = self._past(past_key_values)
        key, value = self._keys_values(hidden_states, encoder_hidden_states, past_key_values)
        table = self.table(hidden_states.shape[1], key.shape[2], past) if self.has_relative_attention_bias else None
        out = self._attend(hidden_states, key, value, attention_mask, table, encoder_hidden_states is not None)
        return out, None
