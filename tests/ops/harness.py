"""How an attention backend is proved: cases, the float64 oracle, and a tolerance that is known to bite.

The rule: the error of every output and every gradient is at most twice that of plain torch in the same dtype plus one
rounding, in the maximum and in the relative L2 norm. "One rounding" is eps times the sum of the absolute values that a
result adds up (a sum that cancels to zero still carries the roundings of its summands).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import numpy as np
import torch
from poison import poisoned
from rule import assert_kept
from torch import Tensor

from ofakern.ops.attention import AttentionLayout, RelativeTerm, attention, intervals
from ofakern.ops.attention.reference import attention_reference, dropout_keep

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Run = Callable[["Case"], dict[str, Tensor]]
_WILD = 2**31 - 1  # a coordinate that no table could serve, for tokens whose coordinates are never used


@dataclass
class Case:
    """One call of attention with incoming gradients. `clean` is the same case with 0 where `q`, `k`, ... hold NaN."""

    layout: AttentionLayout
    q: Tensor
    k: Tensor
    v: Tensor
    q_pos: Tensor | None
    k_pos: Tensor | None
    tables: tuple[Tensor, ...]
    head_scale: Tensor | None
    dout: Tensor
    dlse: Tensor | None
    options: dict[str, Any] = field(default_factory=dict)

    def leaves(self) -> dict[str, Tensor]:
        named = {"q": self.q, "k": self.k, "v": self.v, "q_pos": self.q_pos, "k_pos": self.k_pos}
        named |= {f"table{t}": table for t, table in enumerate(self.tables)} | {"head_scale": self.head_scale}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def token_positions(self) -> tuple[Tensor | None, Tensor | None]:
        """q_pos and k_pos with a row for every token."""
        shared = self.layout.shared
        if shared is None or self.q_pos is None or self.k_pos is None:
            return self.q_pos, self.k_pos
        return self.q_pos[shared.q_index.long()], self.k_pos[shared.k_index.long()]

    def with_leaves(self, leaves: dict[str, Tensor], **changes: Any) -> Case:
        tables = tuple(leaves[f"table{t}"] for t in range(len(self.tables)))
        rest = {name: tensor for name, tensor in leaves.items() if not name.startswith("table")}
        return replace(self, tables=tables, **(rest | changes))

    def to(self, dtype: torch.dtype) -> Case:
        """Everything in dtype (tables and head_scale too), NaN replaced by 0."""
        leaves = {name: tensor.detach().nan_to_num(0.0).to(dtype) for name, tensor in self.leaves().items()}
        dlse = None if self.dlse is None else self.dlse.nan_to_num(0.0).to(torch.promote_types(dtype, torch.float32))
        return self.with_leaves(leaves, dout=self.dout.nan_to_num(0.0).to(dtype), dlse=dlse)


def make_case(
    seed: int = 0,
    q_lengths: tuple[int, ...] = (33, 65),
    k_lengths: tuple[int, ...] | None = None,
    *,
    heads: int = 2,
    key_heads: int | None = None,
    width: int = 16,
    value_width: int | None = None,
    pos_width: int | None = None,
    terms: int = 1,
    mask: str = "full",
    head_scale: bool = True,
    lse_gradient: bool = True,
    dropout_p: float = 0.0,
    empty_rows: bool = False,
    unread_nan: bool = True,
    strides: str = "contiguous",
    sets: tuple[tuple[int, ...], tuple[int, ...]] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Case:
    """A random case. mask: full, causal, window, prefix, random; strides: contiguous, fused, transposed; sets: of each
    sample the set of rows it takes of q_pos and of k_pos."""
    rng, gen = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    keys_of = q_lengths if k_lengths is None else k_lengths
    queries, keys = sum(q_lengths), sum(keys_of)
    visible = _visible(rng, mask, q_lengths, keys_of)
    if empty_rows:
        visible[torch.from_numpy(rng.random(queries) < 0.2)] = 0
    built = [_random_term(rng, visible, queries, keys, wild=unread_nan) for _ in range(terms)]
    q_sets, k_sets = (None, None) if sets is None else sets
    layout = AttentionLayout.build(visible, q_lengths, keys_of, built, q_sets, k_sets)
    q_rows, k_rows = (queries, keys) if layout.shared is None else (layout.shared.q_rows, layout.shared.k_rows)

    def normal(*shape: int) -> Tensor:
        return _strided(torch.randn(shape, generator=gen).to(dtype), strides)

    key_heads = heads if key_heads is None else key_heads
    value_width = width if value_width is None else value_width
    case = Case(
        layout=layout,
        q=normal(queries, heads, width),
        k=normal(keys, key_heads, width),
        v=normal(keys, key_heads, value_width),
        q_pos=None if pos_width is None else normal(q_rows, heads, pos_width),
        k_pos=None if pos_width is None else normal(k_rows, key_heads, pos_width),
        tables=tuple(torch.randn(heads, term.rows, generator=gen) for term in built),
        head_scale=1.0 + 0.5 * torch.randn(heads, generator=gen) if head_scale else None,
        dout=normal(queries, heads, value_width),
        dlse=torch.randn(queries, heads, generator=gen) if lse_gradient else None,
    )
    if dropout_p:
        case.options |= {"dropout_p": dropout_p, "dropout_seed": torch.tensor([seed + 17, 2**62 + 5])}
    if unread_nan:
        _poison_unread(case)
    return case


def _visible(rng: np.random.Generator, mask: str, q_lengths: tuple[int, ...], k_lengths: tuple[int, ...]) -> Tensor:
    if mask == "random":  # any run of keys, of any sample
        queries, keys = sum(q_lengths), sum(k_lengths)
        return torch.from_numpy(np.sort(rng.integers(0, keys + 1, (queries, 2)), axis=1).astype(np.int32))
    if mask == "full" or q_lengths != k_lengths:
        return intervals.cross(q_lengths, k_lengths)
    if mask == "causal":
        return intervals.causal(q_lengths)
    if mask == "window":
        return intervals.sliding_window(q_lengths, 9)
    if mask == "prefix":
        return intervals.prefix_lm(q_lengths, [n // 2 for n in q_lengths])
    raise ValueError(f"mask {mask!r}")


def _random_term(rng: np.random.Generator, visible: Tensor, queries: int, keys: int, wild: bool) -> RelativeTerm:
    """Coordinates with gaps and repeats, segments that cross samples, and a table that is exactly long enough."""
    cuts = np.sort(rng.integers(0, keys + 1, 4))
    segments = np.stack([np.r_[0, cuts], np.r_[cuts, keys]], axis=1)
    same = segments[rng.integers(0, len(segments), queries)].astype(np.int32).reshape(-1, 2)
    q_coord = rng.integers(-50, 50, queries)
    k_coord = (np.arange(keys) * rng.integers(1, 3) + rng.integers(0, 3, keys)).astype(np.int64)
    window = visible.numpy()
    lo, hi = np.maximum(same[:, 0], window[:, 0]), np.minimum(same[:, 1], window[:, 1])
    j = np.arange(keys)
    active = (lo[:, None] <= j) & (j < hi[:, None])
    rows = 1
    if active.any():
        difference = (q_coord[:, None] - k_coord[None, :])[active]
        q_coord = q_coord - difference.min()
        rows = int(difference.max() - difference.min() + 1)
    if wild:
        q_coord = np.where(active.any(1), q_coord, -_WILD)
        k_coord = np.where(active.any(0), k_coord, _WILD)
    return RelativeTerm(
        torch.from_numpy(q_coord.astype(np.int32)),
        torch.from_numpy(k_coord.astype(np.int32)),
        torch.from_numpy(same),
        rows,
    )


def _strided(x: Tensor, strides: str) -> Tensor:
    if strides == "contiguous":
        return x
    if strides == "fused":  # a third of a fused projection: rows far apart, last dimension contiguous
        wide = torch.full((x.shape[0], 3, *x.shape[1:]), torch.nan, dtype=x.dtype)
        wide[:, 1] = x
        return wide[:, 1]
    if strides == "transposed":
        return x.transpose(0, 2).contiguous().transpose(0, 2)
    raise ValueError(f"strides {strides!r}")


def _poison_unread(case: Case) -> None:
    unseen = case.layout.key_seen == 0
    alone = case.layout.visible[:, 0] >= case.layout.visible[:, 1]
    shared = case.layout.shared
    unseen_pos = unseen if shared is None else _unused(shared.k_index, ~unseen, shared.k_rows)
    alone_pos = alone if shared is None else _unused(shared.q_index, ~alone, shared.q_rows)
    for tensor, rows in (
        (case.k, unseen),
        (case.v, unseen),
        (case.k_pos, unseen_pos),
        (case.q, alone),
        (case.q_pos, alone_pos),
        (case.dout, alone),
        (case.dlse, alone),
    ):
        if tensor is not None:
            tensor[rows] = torch.nan


def _unused(index: Tensor, used: Tensor, rows: int) -> Tensor:
    """bool `[rows]`: those that no token which counts takes."""
    unused = torch.ones(rows, dtype=torch.bool)
    unused[index[used].long()] = False
    return unused


# ---- ways to compute a case -----------------------------------------------------------------------------------------


def run_backend(backend: str, **changes: Any) -> Run:
    """Runs a case through the public API; every new tensor starts as NaN, so that a result left unwritten shows."""

    def run(case: Case) -> dict[str, Tensor]:
        def forward(leaves: Case) -> tuple[Tensor, Tensor]:
            return attention(
                leaves.q,
                leaves.k,
                leaves.v,
                leaves.layout,
                leaves.q_pos,
                leaves.k_pos,
                leaves.tables,
                leaves.head_scale,
                **(leaves.options | changes),
                return_lse=True,
                backend=backend,
            )

        with poisoned_empty():  # what Triton's launchers take; the bindings' memory is malloc's
            return differentiate(case, forward) if backend != "cpu" else poisoned(lambda: differentiate(case, forward))

    return run


def oracle(case: Case) -> dict[str, Tensor]:
    """The reference in float64 on the same (rounded) inputs."""

    def forward(leaves: Case) -> tuple[Tensor, Tensor]:
        layout = leaves.layout
        return attention_reference(
            leaves.q,
            leaves.k,
            leaves.v,
            layout.visible,
            layout.q_offsets,
            layout.k_offsets,
            q_pos=leaves.q_pos,
            k_pos=leaves.k_pos,
            q_index=None if layout.shared is None else layout.shared.q_index,
            k_index=None if layout.shared is None else layout.shared.k_index,
            terms=[(table, t.q_coord, t.k_coord, t.same) for table, t in zip(leaves.tables, layout.terms, strict=True)],
            head_scale=leaves.head_scale,
            **({"scale": leaves.q.shape[2] ** -0.5} | leaves.options),
        )

    return differentiate(case.to(torch.float64), forward)


def plain(case: Case) -> dict[str, Tensor]:
    """What a user would write in the case's dtype: dense bias, softmax, two matmuls, each result rounded to it."""

    def forward(leaves: Case) -> tuple[Tensor, Tensor]:
        return dense_attention(leaves)

    return differentiate(case.to(case.q.dtype), forward)


def dense_attention(case: Case) -> tuple[Tensor, Tensor]:
    """Written apart from reference.py, in one dtype throughout; masks, bias and softmax as torch users know them."""
    layout, scale = case.layout, case.options.get("scale", case.q.shape[2] ** -0.5)
    group = case.q.shape[1] // case.k.shape[1]
    j = torch.arange(layout.keys)

    def inside(runs: Tensor) -> Tensor:
        return (j >= runs[:, :1]) & (j < runs[:, 1:])

    def dots(a: Tensor, b: Tensor) -> Tensor:
        return a.transpose(0, 1) @ b.repeat_interleave(group, 1).permute(1, 2, 0)

    scores = dots(case.q, case.k) * scale
    q_pos, k_pos = case.token_positions()
    if q_pos is not None and k_pos is not None:
        scores = scores + dots(q_pos, k_pos) * scale
    visible = inside(layout.visible)
    for table, term in zip(case.tables, layout.terms, strict=True):
        active = visible & inside(term.same)
        rows = (term.q_coord.long()[:, None] - term.k_coord.long()).masked_fill(~active, 0)
        scores = scores + table[:, rows].masked_fill(~active, 0.0)
    scores = scores.masked_fill(~visible, -torch.inf)
    alone = ~visible.any(1)[:, None]  # [Nq,1]
    probs = torch.softmax(scores.masked_fill(alone, 0.0), -1).masked_fill(alone, 0.0)
    lse = torch.logsumexp(scores.masked_fill(alone, 0.0), -1) if layout.keys else scores.new_zeros(scores.shape[:2])
    lse = lse.T.masked_fill(alone, -torch.inf)
    p = case.options.get("dropout_p", 0.0)
    if p:
        keep = dropout_keep(
            case.options["dropout_seed"], p, case.q.shape[1], layout.q_offsets, layout.k_offsets, layout.keys
        )
        probs = probs * keep / (1 - p)
    out = (probs @ case.v.repeat_interleave(group, 1).transpose(0, 1)).transpose(0, 1)
    if case.head_scale is not None:
        out = out * case.head_scale[:, None]
    return out, lse


def differentiate(case: Case, forward: Callable[[Case], tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """out, lse and the gradient of every leaf (strides of the leaves are kept)."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in case.leaves().items()}
    out, lse = forward(case.with_leaves(leaves))
    pairs = [(out, case.dout)] + ([] if case.dlse is None else [(lse, case.dlse.to(lse.dtype))])
    pairs = [pair for pair in pairs if pair[0].requires_grad]  # without keys plain torch has a constant lse
    found = torch.autograd.grad([x for x, _ in pairs], list(leaves.values()), [g for _, g in pairs], allow_unused=True)
    results = {"out": out.detach(), "lse": lse.detach()}
    for (name, leaf), grad in zip(leaves.items(), found, strict=True):
        results[f"d{name}"] = torch.zeros_like(leaf) if grad is None else grad
    return results


@contextmanager
def poisoned_empty() -> Iterator[None]:
    """torch.empty gives NaN (bytes: 0xFF, which is NaN in every float format) while inside."""
    empty = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        tensor = empty(*args, **kwargs)
        return tensor.fill_(torch.nan if tensor.is_floating_point() else 255)

    with mock.patch("torch.empty", poisoned):
        yield


# ---- the rule -------------------------------------------------------------------------------------------------------


def magnitudes(case: Case) -> dict[str, Tensor]:
    """For every result the sum of the absolute values it adds up, in float64; shapes of the results."""
    shared, exact = case.layout.shared, case.to(torch.float64)
    q_pos, k_pos = exact.token_positions()
    exact = replace(exact, q_pos=q_pos, k_pos=k_pos, layout=replace(exact.layout, shared=None))
    layout = exact.layout
    group = exact.q.shape[1] // exact.k.shape[1]
    _, lse = dense_attention(replace(exact, options={k: v for k, v in exact.options.items() if k == "scale"}))
    scale = abs(exact.options.get("scale", exact.q.shape[2] ** -0.5))
    absolute = {name: tensor.abs() for name, tensor in exact.leaves().items()}
    wide = {name: absolute[name].repeat_interleave(group, 1) for name in ("k", "v", "k_pos") if name in absolute}
    probs, actives, scores = _probabilities(exact, lse, absolute, wide, scale)
    p = exact.options.get("dropout_p", 0.0)
    kept = probs if not p else probs * _keep(exact) / (1 - p)
    c = absolute.get("head_scale", torch.ones(exact.q.shape[1], dtype=torch.float64))[:, None]
    out = torch.einsum("hij,jhv->ihv", kept, wide["v"]) * c
    dout = exact.dout.abs()
    dp = torch.einsum("ihv,jhv->hij", dout * c, wide["v"])
    ds = kept * dp + probs * (dout * out).sum(-1).T[..., None]
    if exact.dlse is not None:
        ds = ds + probs * exact.dlse.abs().T[..., None]
    # The absolute error of a score, a float32 sum in every dtype, is a relative error of its probability.
    wobble = 1.0 + scores * (torch.finfo(torch.float32).eps / torch.finfo(case.q.dtype).eps)

    def fold(x: Tensor) -> Tensor:
        return x.unflatten(1, (-1, group)).sum(2)

    ds_wobble = ds * wobble
    results = {
        "out": torch.einsum("hij,jhv->ihv", kept * wobble, wide["v"]) * c,
        "lse": (probs * wobble).sum(-1).T,
        "dq": scale * torch.einsum("hij,jhk->ihk", ds_wobble, wide["k"]),
        "dk": fold(scale * torch.einsum("hij,ihk->jhk", ds_wobble, absolute["q"])),
        "dv": fold(torch.einsum("hij,ihv->jhv", kept * wobble, dout * c)),
    }
    if "q_pos" in absolute:
        results["dq_pos"] = scale * torch.einsum("hij,jhk->ihk", ds_wobble, wide["k_pos"])
        results["dk_pos"] = fold(scale * torch.einsum("hij,ihk->jhk", ds_wobble, absolute["q_pos"]))
        if shared is not None:
            for name, index, rows in (
                ("dq_pos", shared.q_index, shared.q_rows),
                ("dk_pos", shared.k_index, shared.k_rows),
            ):
                summed = results[name].new_zeros((rows, *results[name].shape[1:]))
                results[name] = summed.index_add_(0, index.long(), results[name])
    for t, (term, active) in enumerate(zip(layout.terms, actives, strict=True)):
        rows = (term.q_coord.long()[:, None] - term.k_coord.long())[active]
        results[f"dtable{t}"] = torch.zeros_like(exact.tables[t]).index_add_(1, rows, ds_wobble[:, active])
    if exact.head_scale is not None:
        results["dhead_scale"] = (dout * torch.einsum("hij,jhv->ihv", kept * wobble, wide["v"])).sum((0, 2))
    return results


def _probabilities(
    case: Case, lse: Tensor, absolute: dict[str, Tensor], wide: dict[str, Tensor], scale: float
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Probabilities, active pairs per term, and the absolute summands of every score."""
    layout, j = case.layout, torch.arange(case.layout.keys)

    def inside(runs: Tensor) -> Tensor:
        return (j >= runs[:, :1]) & (j < runs[:, 1:])

    group = case.q.shape[1] // case.k.shape[1]
    scores = scale * torch.einsum("ihk,jhk->hij", absolute["q"], wide["k"])
    signed = case.options.get("scale", case.q.shape[2] ** -0.5)
    exact = signed * torch.einsum("ihk,jhk->hij", case.q, case.k.repeat_interleave(group, 1))
    if case.q_pos is not None and case.k_pos is not None:
        scores = scores + scale * torch.einsum("ihk,jhk->hij", absolute["q_pos"], wide["k_pos"])
        exact = exact + signed * torch.einsum("ihk,jhk->hij", case.q_pos, case.k_pos.repeat_interleave(group, 1))
    actives = []
    for table, term in zip(case.tables, layout.terms, strict=True):
        active = inside(term.same) & inside(layout.visible)
        rows = (term.q_coord.long()[:, None] - term.k_coord.long()).masked_fill(~active, 0)
        bias = table[:, rows].masked_fill(~active, 0.0)
        scores, exact = scores + bias.abs(), exact + bias
        actives.append(active)
    probs = torch.exp(exact - lse.T[..., None]).masked_fill(~inside(layout.visible), 0.0)
    return probs, actives, scores


def _keep(case: Case) -> Tensor:
    layout, options = case.layout, case.options
    return dropout_keep(
        options["dropout_seed"], options["dropout_p"], case.q.shape[1], layout.q_offsets, layout.k_offsets, layout.keys
    )


@dataclass
class Expected:
    """What a case is compared with; worth keeping when several runs of one case are checked."""

    exact: dict[str, Tensor]
    peer: dict[str, Tensor]
    size: dict[str, Tensor]


def expect(case: Case) -> Expected:
    return Expected(oracle(case), plain(case), magnitudes(case))


def check(case: Case, run: Run, expected: Expected | None = None) -> float:
    """Raises AssertionError unless `run` keeps the rule on the case; returns the largest error / bound."""
    expected = expect(case) if expected is None else expected
    exact, peer, size = expected.exact, expected.peer, expected.size
    got = run(case)
    assert got.keys() == exact.keys(), f"results {sorted(got)} instead of {sorted(exact)}"
    leaves = {f"d{name}": leaf for name, leaf in case.leaves().items()}
    worst = 0.0
    for name, want in exact.items():
        have = got[name]
        if name in leaves:
            assert have.dtype == leaves[name].dtype, f"{name}: dtype {have.dtype} instead of {leaves[name].dtype}"
        worst = max(worst, assert_kept(name, have, want, peer[name], size[name], case.q.dtype))
    return worst


def assert_same_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    """Bitwise equality of all results."""
    assert first.keys() == second.keys()
    for name in first:
        same = torch.equal(first[name].contiguous().view(torch.uint8), second[name].contiguous().view(torch.uint8))
        assert same, f"{name}: bits differ by up to {(first[name].double() - second[name].double()).abs().max():.3e}"
