"""What stands in for `attention` and for the loss in the peers of a training step: dense torch code on one model.

Samples of the case have equal lengths, so packed `[B * T, H, K]` is `[B, T, H, K]`. What all layers of a stack share
(the factored position term, row numbers of a table, the causal triangle) is made once per step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ofakern.ops.attention import AttentionLayout

EPSILON = 0.1


class DenseAttention:
    """`attention` by a dense bias and SDPA (`ofasys=False`), or by OFASys' formula. `begin` starts a step."""

    def __init__(self, ofasys: bool) -> None:
        self._compute = _ofasys if ofasys else _sdpa
        self._clone = ofasys
        # By the id of a q_pos (within a step) and of a layout, which stand beside so that no other gets their ids.
        self._shared: dict[int, tuple[Tensor, Tensor]] = {}
        self._rows: dict[int, tuple[AttentionLayout, Tensor, Tensor | None]] = {}

    def begin(self) -> None:
        self._shared.clear()

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: AttentionLayout,
        q_pos: Tensor | None = None,
        k_pos: Tensor | None = None,
        tables: Sequence[Tensor] = (),
        head_scale: Tensor | None = None,
        scale: float = 1.0,
        dropout_p: float = 0.0,
        backend: str = "auto",
    ) -> Tensor:
        batch = layout.samples
        rows, hidden = self._places(layout)
        bias = None if q_pos is None or k_pos is None else self._position_term(q_pos, k_pos, layout, scale)
        if tables:
            bias = _with_table(bias, tables[0], rows, self._clone)
        if hidden is not None:
            bias = hidden.to(q.dtype) if bias is None else bias + hidden.to(bias.dtype)
        out = self._compute(_heads(q, batch), _heads(k, batch), _heads(v, batch), bias, scale)
        if head_scale is not None:
            out = torch.einsum("bhtd,h->bhtd", out, head_scale.to(out.dtype))
        return out.transpose(1, 2).reshape(q.shape[0], q.shape[1], v.shape[2])

    def _position_term(self, q_pos: Tensor, k_pos: Tensor, layout: AttentionLayout, scale: float) -> Tensor:
        if id(q_pos) not in self._shared:
            rows = (q_pos, k_pos) if layout.shared is None else layout.shared.spelled_out(q_pos, k_pos)
            queries, keys = (_heads(x, layout.samples) for x in rows)
            term = (queries * scale) @ keys.transpose(2, 3)
            self._shared[id(q_pos)] = (q_pos, term)
        return self._shared[id(q_pos)][1]

    def _places(self, layout: AttentionLayout) -> tuple[Tensor, Tensor | None]:
        if id(layout) not in self._rows:
            self._rows[id(layout)] = (layout, *_places(layout))
        return self._rows[id(layout)][1:]


def _places(layout: AttentionLayout) -> tuple[Tensor, Tensor | None]:
    """Of one sample: the table row of every pair, -1 where none applies; -inf where a query may not see a key."""
    queries, keys = layout.queries // layout.samples, layout.keys // layout.samples
    j = torch.arange(keys)
    visible = (layout.visible[:queries, :1] <= j) & (j < layout.visible[:queries, 1:])
    hidden = None if bool(visible.all()) else torch.zeros(queries, keys).masked_fill(~visible, -torch.inf)
    if not layout.terms:
        return torch.full((queries, keys), -1), hidden
    term = layout.terms[0]
    same = visible & (term.same[:queries, :1] <= j) & (j < term.same[:queries, 1:])
    rows = term.q_coord[:queries, None].long() - term.k_coord[:keys].long()
    return rows.masked_fill(~same, -1), hidden


def _with_table(bias: Tensor | None, table: Tensor, rows: Tensor, clone: bool) -> Tensor:
    """The bias with a table's `[H, R]` entries; a row of zeros stands for -1. clone: as OFASys copies it per layer."""
    heads = table.shape[0]
    padded = F.pad(table if bias is None else table.to(bias.dtype), (0, 1))
    index = rows.where(rows >= 0, table.shape[1]).flatten()
    relative = padded.gather(1, index.expand(heads, -1)).view(heads, *rows.shape)
    if bias is None:
        return relative[None]
    return bias.clone() + relative if clone else bias + relative


def _heads(x: Tensor, batch: int) -> Tensor:
    """`[B * T, H, K]` to `[B, H, T, K]`."""
    return x.view(batch, -1, *x.shape[1:]).transpose(1, 2)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)


def _ofasys(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    scores = torch.bmm((q * scale).flatten(0, 1), k.flatten(0, 1).transpose(1, 2)).view(*q.shape[:3], k.shape[2])
    if bias is not None:
        scores = scores + bias
    probabilities = torch.softmax(scores, -1, dtype=torch.float32).type_as(scores)
    return torch.bmm(probabilities.flatten(0, 1), v.flatten(0, 1)).view(*q.shape[:3], v.shape[3])


def plain_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Label-smoothed cross entropy over all logits at once, as OFASys' criterion has it; every token has a label."""
    log_p = F.log_softmax(F.linear(hidden, weight), -1, dtype=torch.float32)
    each = EPSILON / (weight.shape[0] - 1)
    nll = -log_p.gather(1, labels[:, None]).sum()
    return (1.0 - EPSILON - each) * nll - each * log_p.sum()


ATTENTION: dict[str, Callable[[], Any]] = {
    "sdpa_mask": lambda: DenseAttention(ofasys=False),
    "ofasys": lambda: DenseAttention(ofasys=True),
}
