"""transformers' extension point: `attn_implementation="ofakern"` for every model that accepts a custom attention.

    from ofakern.integrations.transformers import register
    register()
    model = AutoModel.from_pretrained(..., attn_implementation="ofakern")    # or .set_attn_implementation("ofakern")

The model's masks must be intervals: each query sees one contiguous run of keys. Padding (on either side), causal,
sliding-window, chunked and packed masks are. A learned bias inside the mask (T5, BEiT, Swin) is not: those models are
what `ofakern.patch` is for.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from ofakern.errors import OfakernValueError
from ofakern.ops.attention import AttentionLayout, padded_layout, scaled_dot_product_attention

__all__ = ["NAME", "attention_forward", "register"]

NAME = "ofakern"
_WHERE = f"attn_implementation={NAME!r}"

# Arguments that change the scores, which this attention does not compute; None and False are absent.
_UNSUPPORTED = {
    "position_bias": "a bias added to the scores (ofakern.patch(model) computes it from positions)",
    "softcap": "scores bounded by a softcap",
    "s_aux": "attention sinks",
    "head_mask": "a head mask",
    "cache": "a paged cache",
    "output_attentions": "attention weights, which are never stored",
}

# The layers of a forward pass share one mask: its layout is built once. Valid as long as the mask was not written to.
_layouts: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def register() -> None:
    """Makes `"ofakern"` an attention implementation of transformers, in this process.

    Adds one entry each to `transformers.AttentionInterface` and `AttentionMaskInterface`, its public registries, and
    changes nothing else; a model uses it when it is asked to. Calling it again does no harm.
    """
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """The attention that transformers calls: query `[B,H,T,K]`, key `[B,Hk,S,K]`, value `[B,Hk,S,V]`.

    attention_mask: `[B,1,T,S]` (or broadcastable), bool or float of 0 and a large negative number; without one, causal
    when `is_causal` (default: the module's own) and T > 1. Returns `[B,T,H,V]`, and None for the weights. A query that
    sees no key gives 0.
    Raises OfakernValueError: a mask that is no interval or holds a bias, and arguments that would change the scores.
    """
    for name, meaning in _UNSUPPORTED.items():
        given = kwargs.get(name)
        if given is not None and given is not False:
            raise OfakernValueError(f"{_WHERE}: {name} must be absent: it asks for {meaning}")
    if attention_mask is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        causal = bool(causal) and query.shape[2] > 1  # one query is the last token: it sees all keys
        if causal:  # an empty static cache is longer than what is known: the rest of it is not seen
            key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
        layout = padded_layout(query.shape[0], query.shape[2], key.shape[2], is_causal=causal).to(query.device)
    else:
        layout = _layout_of(attention_mask, query.shape[0], query.shape[2], key.shape[2])
    out = scaled_dot_product_attention(
        query, key, value, scale=scaling, dropout_p=dropout, enable_gqa=True, layout=layout
    )
    return out.transpose(1, 2), None


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _layout_of(mask: Tensor, batch: int, queries: int, keys: int) -> AttentionLayout:
    sizes = (mask._version, batch, queries, keys)
    known = _layouts.get(mask)  # type: ignore[no-untyped-call]
    if known is None or known[0] != sizes:
        known = (sizes, padded_layout(batch, queries, keys, attn_mask=_allowed(mask)).to(mask.device))
        _layouts[mask] = known
    layout: AttentionLayout = known[1]
    return layout


def _allowed(mask: Tensor) -> Tensor:
    """A bool mask, from a float one of zeros and numbers so negative that nothing is left after the softmax."""
    if mask.dtype == torch.bool:
        return mask
    if not mask.dtype.is_floating_point:
        raise OfakernValueError(f"{_WHERE}: attention_mask must be bool or float, got {mask.dtype}")
    allowed = mask == 0
    if not bool((allowed | (mask <= torch.finfo(mask.dtype).min / 2)).all()):
        raise OfakernValueError(
            f"{_WHERE}: attention_mask must hold 0 and {torch.finfo(mask.dtype).min:.4g} only, got other numbers\n"
            "Try: ofakern.patch(model), which computes a learned bias from positions."
        )
    return allowed
