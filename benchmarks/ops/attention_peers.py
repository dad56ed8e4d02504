"""The peers of attention: other ways to compute the same case, on padded `[B,H,T,K]` tensors made before timing.

sdpa_plain    torch's SDPA on q, k, v alone: no bias, no padding mask. Not the same function; the floor of the hardware.
sdpa_mask     SDPA with the dense bias built inside the timed region, gradients to q_pos, k_pos, table and head scale.
sdpa_concat   SDPA on the concatenated (q, q_pos) and (k, k_pos), v padded to that width; the table as a mask.
flex          compiled FlexAttention: concatenated widths, the table read in score_mod. Forward only on CPU.
ofasys        OFASys' formula: bmm, a clone of the bias per layer with a slot's table added, float32 softmax, einsum.
flash         flash-attn 2 where it is installed, on a GPU, without relative terms: packed, nothing padded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.core import Contender, Unavailable

_DENSE_COPIES = 8  # [B,H,T,S] buffers alive at once in the backward of a dense peer (ofasys keeps float32 beside bf16)


@dataclass
class Padded:
    """A problem as its peers take it. rows: the table row of every pair of a sample, `table.shape[1]` for none. q_pos,
    k_pos: `[1,H,T,P]` where samples share their positions; a peer whose formula can does the same."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_pos: Tensor | None
    k_pos: Tensor | None
    table: Tensor | None
    rows: Tensor | None
    blocks: tuple[tuple[int, int], ...]
    head_scale: Tensor | None
    dout: Tensor
    real: Tensor | None
    causal: bool
    scale: float
    lengths: tuple[int, ...]

    def leaves(self, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        return (self.q, self.k, self.v, *(x for x in tensors if x is not None))

    def packed(self, out: Tensor) -> Tensor:
        """`[B,H,T,V]` back to `[N,H,V]`."""
        return torch.cat([out[b, :, :n].transpose(0, 1) for b, n in enumerate(self.lengths)])

    def scaled(self, out: Tensor) -> Tensor:
        return out if self.head_scale is None else out * self.head_scale.to(out.dtype)[:, None, None]

    def mask(self) -> Tensor | None:
        """bool `[B,1,1,S]` of the real keys, where samples differ in length."""
        return None if self.real is None else self.real[:, None, None]


def _padded(problem: Any) -> Padded:
    spec = problem.spec

    def pad(x: Tensor | None, lengths: tuple[int, ...]) -> Tensor | None:
        if x is None:
            return None
        samples = torch.split(x.detach(), list(lengths))
        longest = max(lengths)
        dense: Tensor = torch.stack([F.pad(sample, (0, 0, 0, 0, 0, longest - len(sample))) for sample in samples])
        dense = dense.transpose(1, 2).contiguous()
        return dense.requires_grad_() if x.requires_grad else dense

    def must(x: Tensor | None) -> Tensor:
        if x is None:
            raise Unavailable("the case lacks an input")
        return x

    real = None
    if len(set(spec.keys)) > 1:
        real = torch.arange(max(spec.keys)) < torch.tensor(spec.keys)[:, None]
    table = problem.tables[0].detach().requires_grad_() if problem.tables else None
    scale = None if problem.head_scale is None else problem.head_scale.detach().requires_grad_()
    length = spec.lengths[0]
    blocks = tuple((lo, hi) for lo, hi in ((0, spec.image), (spec.image, length)) if hi > lo)
    return Padded(
        must(pad(problem.q, spec.lengths)),
        must(pad(problem.k, spec.keys)),
        must(pad(problem.v, spec.keys)),
        pad(problem.q_pos, spec.lengths[: spec.position_sets]),
        pad(problem.k_pos, spec.keys[: spec.position_sets]),
        table,
        None,
        blocks if spec.table else (),
        scale,
        must(pad(problem.dout, spec.lengths)),
        real,
        spec.causal,
        problem.scale,
        spec.lengths,
    )


def _rows(problem: Any) -> Tensor | None:
    """int64 `[T,T]`: samples of a case share their positions, so one matrix serves the batch."""
    if not problem.layout.terms:
        return None
    term, length = problem.layout.terms[0], problem.spec.lengths[0]
    j = torch.arange(length)
    same = (term.same[:length, :1] <= j) & (j < term.same[:length, 1:])
    difference: Tensor = term.q_coord[:length, None].long() - term.k_coord[:length].long()
    return difference.masked_fill(~same, term.rows)


def _dense(problem: Any) -> Padded:
    """The padded problem of a peer that holds [B,H,T,S] matrices; refused where they would not fit."""
    spec = problem.spec
    matrix = len(spec.lengths) * spec.heads * max(spec.lengths) * max(spec.keys) * problem.dtype.itemsize
    free = torch.cuda.mem_get_info()[0] if problem.q.is_cuda else psutil.virtual_memory().available
    if _DENSE_COPIES * matrix > 0.7 * free:
        raise Unavailable(
            f"its dense [B,H,T,S] matrices take about {_DENSE_COPIES * matrix / 2**30:.0f} GiB, "
            f"this machine has {free / 2**30:.0f} GiB free"
        )
    padded = _padded(problem)
    padded.rows = _rows(problem)
    return padded


def sdpa_plain(problem: Any) -> Contender:
    x = _padded(problem)
    exact = x.q_pos is None and x.table is None and x.real is None

    def forward() -> Tensor:
        return F.scaled_dot_product_attention(x.q, x.k, x.v, is_causal=x.causal, scale=x.scale)

    return Contender("sdpa_plain", forward, x.leaves(), x.dout, x.packed, exact=exact)


def _relative(x: Padded, dtype: torch.dtype) -> Tensor | None:
    """`[H,T,T]`, 0 where no block applies. gather has the fastest backward of torch's indexing functions here."""
    if x.table is None or x.rows is None:
        return None
    heads, length = x.table.shape[0], x.rows.shape[0]
    table = F.pad(x.table.to(dtype), (0, 1))
    return table.gather(1, x.rows.flatten().expand(heads, -1)).view(heads, length, length)


def _dense_bias(x: Padded, q_pos: Tensor, k_pos: Tensor) -> Tensor:
    bias = (q_pos * x.scale) @ k_pos.transpose(-1, -2)
    if torch.is_grad_enabled():
        relative = _relative(x, bias.dtype)  # out of place: in-place slices cost more in the backward
        return bias if relative is None else bias + relative
    for lo, hi in x.blocks:
        if x.table is not None and x.rows is not None:
            rows = x.rows[lo:hi, lo:hi].flatten()
            block = x.table.to(bias.dtype).index_select(1, rows).view(-1, hi - lo, hi - lo)
            bias[:, :, lo:hi, lo:hi] += block
    return bias


def sdpa_mask(problem: Any) -> Contender:
    if problem.q_pos is None and len(set(problem.spec.keys)) == 1:
        raise Unavailable("the case has neither a bias nor a padding mask: it would be sdpa_plain")
    x = _dense(problem)

    def forward() -> Tensor:
        if x.q_pos is not None and x.k_pos is not None:
            mask: Tensor | None = _dense_bias(x, x.q_pos, x.k_pos)
        else:
            mask = x.mask()
        return x.scaled(F.scaled_dot_product_attention(x.q, x.k, x.v, attn_mask=mask, scale=x.scale))

    leaves = x.leaves(x.q_pos, x.k_pos, x.table, x.head_scale)
    return Contender("sdpa_mask", forward, leaves, x.dout, x.packed)


def _beside(x: Tensor, positions: Tensor) -> Tensor:
    return torch.cat([x, positions.expand(x.shape[0], -1, -1, -1)], -1)


def sdpa_concat(problem: Any) -> Contender:
    if problem.q_pos is None:
        raise Unavailable("the case has no factored term to concatenate")
    x = _dense(problem)
    width = problem.spec.width

    def forward() -> Tensor:
        assert x.q_pos is not None and x.k_pos is not None
        q, k = _beside(x.q, x.q_pos), _beside(x.k, x.k_pos)
        v = F.pad(x.v, (0, q.shape[-1] - width))
        relative = _relative(x, q.dtype)
        mask = None if relative is None else relative.expand(q.shape[0], -1, -1, -1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=x.scale)
        return x.scaled(out[..., :width])

    leaves = x.leaves(x.q_pos, x.k_pos, x.table, x.head_scale)
    return Contender("sdpa_concat", forward, leaves, x.dout, x.packed)


def ofasys(problem: Any) -> Contender:
    x = _dense(problem)
    triangle = torch.full((max(x.lengths),) * 2, -torch.inf, dtype=problem.dtype).triu(1) if x.causal else None

    def forward() -> Tensor:
        bias = None
        if x.q_pos is not None and x.k_pos is not None:
            bias = torch.matmul(x.q_pos * x.scale, x.k_pos.transpose(2, 3))
            bias = bias.expand(x.q.shape[0], -1, -1, -1).clone()  # it has positions of every sample
            for lo, hi in x.blocks:
                assert x.table is not None and x.rows is not None
                block = F.embedding(x.rows[lo:hi, lo:hi], x.table.t()).permute(2, 0, 1).to(bias.dtype)
                bias[:, :, lo:hi, lo:hi] += block.expand(bias.shape[0], -1, -1, -1)
        heads = (-1, *x.q.shape[2:])
        scores = torch.bmm((x.q * x.scale).reshape(heads), x.k.flatten(0, 1).transpose(1, 2))
        scores = scores.view(*x.q.shape[:2], *scores.shape[1:])
        if bias is not None:
            scores = scores + bias
        if triangle is not None:
            scores = scores + triangle
        if x.real is not None:
            scores = scores.masked_fill(~x.real[:, None, None], -torch.inf)
        probs = torch.softmax(scores, -1, dtype=torch.float32).type_as(scores)
        out = torch.bmm(probs.flatten(0, 1), x.v.flatten(0, 1)).view(x.q.shape)
        return out if x.head_scale is None else torch.einsum("bhtd,h->bhtd", out, x.head_scale.to(out.dtype))

    leaves = x.leaves(x.q_pos, x.k_pos, x.table, x.head_scale)
    return Contender("ofasys", forward, leaves, x.dout, x.packed)


def _flex_score(problem: Any, x: Padded) -> Callable[..., Tensor] | None:
    if x.table is None:
        return None
    term, length, table = problem.layout.terms[0], problem.spec.lengths[0], _flex_leaf(x.table)
    q_coord, k_coord = term.q_coord[:length].long(), term.k_coord[:length].long()
    block = (torch.arange(length) >= problem.spec.image).long()

    def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        same = block[i] == block[j]
        bias = table[h, torch.where(same, q_coord[i] - k_coord[j], 0)]
        return score + torch.where(same, bias, 0.0)

    return score_mod


def _flex_leaf(tensor: Tensor) -> Tensor:
    """FlexAttention has a backward on GPUs only, and refuses inputs that ask for one elsewhere."""
    return tensor if tensor.is_cuda else tensor.detach()


def flex(problem: Any) -> Contender:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.reset()  # else the cases of one run exceed dynamo's limit of recompilations
    compiled = torch.compile(flex_attention, dynamic=False)
    x = _padded(problem)
    score_mod, block_mask = _flex_score(problem, x), None
    if x.causal:
        longest = max(x.lengths)
        block_mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, longest, longest, device=x.q.device)
    elif x.real is not None:
        ends = torch.tensor(problem.spec.keys)
        longest = max(x.lengths)
        block_mask = create_block_mask(
            lambda b, h, i, j: j < ends[b], len(x.lengths), None, longest, longest, device=x.q.device
        )

    def forward() -> Tensor:
        q, k = _flex_leaf(x.q), _flex_leaf(x.k)
        if x.q_pos is not None and x.k_pos is not None:
            q, k = _beside(q, _flex_leaf(x.q_pos)), _beside(k, _flex_leaf(x.k_pos))
        v = F.pad(_flex_leaf(x.v), (0, q.shape[-1] - x.v.shape[-1]))
        out: Tensor = compiled(q, k, v, score_mod=score_mod, block_mask=block_mask, scale=x.scale)
        return x.scaled(out[..., : x.v.shape[-1]])

    try:
        with torch.no_grad():
            forward()
    except Exception as error:  # torch's compiler raises many kinds; its reason stands in the results
        raise Unavailable(f"does not compile: {str(error).strip().splitlines()[0]}") from error
    if x.q.is_cuda:
        leaves = x.leaves(x.q_pos, x.k_pos, x.table, x.head_scale)
        return Contender("flex", forward, leaves, x.dout, x.packed, compiled=True)
    reason = "FlexAttention has no backward on CPU"
    return Contender("flex", forward, (), x.dout, x.packed, compiled=True, forward_only=reason)


def flash(problem: Any) -> Contender:
    """flash-attn on the packed problem, its factored term as wider queries and keys; deterministic backward."""
    if problem.tables:
        raise Unavailable("flash-attn has no relative terms")
    if not problem.q.is_cuda or find_spec("flash_attn") is None:
        raise Unavailable("flash-attn is not installed here, or there is no GPU")
    return Contender("flash", partial(problem.run, backend="flash"), problem.leaves, problem.dout)


PEERS: dict[str, Callable[[Any], Contender]] = {
    "sdpa_plain": sdpa_plain,
    "sdpa_mask": sdpa_mask,
    "sdpa_concat": sdpa_concat,
    "flex": flex,
    "ofasys": ofasys,
    "flash": flash,
}
