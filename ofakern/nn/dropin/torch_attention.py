"""torch.nn.MultiheadAttention on the fused kernel."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ofakern.errors import OfakernValueError
from ofakern.nn.dropin.base import DropIn, attend, check_width, split_heads, width_refusal
from ofakern.nn.dropin.layouts import padded_layout
from ofakern.nn.dropin.masks import Mask

_WHERE = "MultiheadAttention"


class MultiheadAttention(DropIn, nn.MultiheadAttention):
    """torch.nn.MultiheadAttention: the same constructor, parameters, initialisation and arguments (it is a subclass).

    Differences: `need_weights` must be False; a query that sees no key gives `out_proj.bias` (torch: NaN); masks must
    leave each query one run of keys (padding at either end, causal, windows). With `add_bias_kv` or `add_zero_attn`
    padding must be at the end. Nested tensors raise. `nn.TransformerEncoderLayer` in eval mode without gradients takes
    torch's own fast path and does not call its attention.
    """

    replaced_names = ("MultiheadAttention",)
    needed = ("embed_dim", "num_heads", "in_proj_bias", "add_zero_attn", "batch_first", "out_proj")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_width(_WHERE, self.head_dim)

    @classmethod
    def refusal(cls, module: Any) -> str | None:
        if type(module) is not nn.MultiheadAttention:
            return f"module must be torch.nn.MultiheadAttention itself, got {type(module).__module__}'s"
        return width_refusal(module.head_dim, "embed_dim / num_heads")

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """query `[T,B,D]` (`[B,T,D]` with batch_first, `[T,D]` without a batch), key and value alike; `(out, None)`.

        key_padding_mask `[B,S]`, attn_mask `[T,S]` or `[B*H,T,S]`: bool (True: left out) or 0 and -inf. is_causal is a
        hint about attn_mask, which is read instead. Raises OfakernValueError for need_weights=True and masks that are
        not runs of keys, OfakernTypeError for masks of another dtype.
        """
        if need_weights:
            raise OfakernValueError(f"{_WHERE}: need_weights must be False, got True\nTry: need_weights=False")
        if is_causal and attn_mask is None:
            raise OfakernValueError(f"{_WHERE}: attn_mask must be given with is_causal, got None")
        if query.dim() not in (2, 3) or not query.dim() == key.dim() == value.dim():
            raise OfakernValueError(
                f"{_WHERE}: query, key and value must all have 2 or 3 dimensions, got {query.dim()}, {key.dim()}, "
                f"{value.dim()}"
            )
        # Sameness is read before the transposes make new tensors: one product instead of three.
        same = (query is key and key is value, key is value)
        batched = query.dim() == 3
        query, key, value = (self._batch_first(x) for x in (query, key, value))
        q, k, v = self._project(query, key, value, *same)
        if key_padding_mask is not None and key_padding_mask.dim() == 1:
            key_padding_mask = key_padding_mask[None]
        k, v, front = self._prepend(k, v)
        masks = []
        if key_padding_mask is not None:
            masks.append(Mask(key_padding_mask, "keys", left_out=True, where=_WHERE))
        if attn_mask is not None:
            masks.append(Mask(attn_mask, "pairs" if attn_mask.dim() == 2 else "heads", left_out=True, where=_WHERE))
        layout = padded_layout(q.shape[0], q.shape[1], k.shape[1], q.device, masks=masks, front=front)
        out = attend(
            split_heads(q, self.num_heads),
            split_heads(k, self.num_heads),
            split_heads(v, self.num_heads),
            layout,
            scale=self.head_dim**-0.5,
            dropout_p=self.dropout if self.training else 0.0,
            backend=self.backend,
        )
        out = self.out_proj(out)
        if not batched:
            return out[0], None
        return out if self.batch_first else out.transpose(0, 1), None

    def _batch_first(self, x: Tensor) -> Tensor:
        if x.dim() == 2:
            return x[None]
        return x if self.batch_first else x.transpose(0, 1)

    def _project(
        self, query: Tensor, key: Tensor, value: Tensor, all_same: bool, source_same: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        width, bias = self.embed_dim, self.in_proj_bias
        if not self._qkv_same_embed_dim:
            weights: tuple[Tensor, ...] = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        elif all_same:
            q, k, v = F.linear(query, self.in_proj_weight, bias).chunk(3, dim=-1)
            return q, k, v
        elif source_same:
            q = F.linear(query, self.in_proj_weight[:width], None if bias is None else bias[:width])
            k, v = F.linear(key, self.in_proj_weight[width:], None if bias is None else bias[width:]).chunk(2, dim=-1)
            return q, k, v
        else:
            weights = self.in_proj_weight.chunk(3)
        biases = [None] * 3 if bias is None else bias.chunk(3)
        q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))
        return q, k, v

    def _prepend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, int]:
        """The learned and the zero key stand before the others, so that padding behind them stays one run."""
        batch = k.shape[0]
        keys, values = [k], [v]
        if self.bias_k is not None and self.bias_v is not None:
            keys.insert(0, self.bias_k.to(k.dtype).expand(batch, 1, -1))
            values.insert(0, self.bias_v.to(v.dtype).expand(batch, 1, -1))
        if self.add_zero_attn:
            keys.insert(0, k.new_zeros(batch, 1, k.shape[2]))
            values.insert(0, v.new_zeros(batch, 1, v.shape[2]))
        front = len(keys) - 1
        return (torch.cat(keys, 1), torch.cat(values, 1), front) if front else (k, v, 0)
