"""cross_entropy on GPUs in Triton: chunks of tokens, blocks and launches. The kernels: triton_kernels/. They have not
run on a GPU yet: `auto` does not take them.

Losses never hold a score. Gradients hold those of a chunk of tokens at a time (at most 128 MiB), in the inputs' dtype;
torch's own products make dhidden and dweight of them. Order and partition come from shapes alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ofakern.ops.cross_entropy.triton_kernels import gradient, losses, tiles
from ofakern.ops.triton_launch import Launch, ceil_div, options, power_of_2, run, shared_memory

IGNORED = -100
# Bytes of a chunk's score gradients; and what a chunk's tokens are a multiple of.
_CHUNK_BYTES, _CHUNK_TOKENS = 128 * 2**20, 128
# Programs over tokens and ids: enough to fill a GPU.
_PROGRAMS = 512
_MERGED, _MARKED = 128, 256


class Blocks(NamedTuple):
    """tokens x ids of a tile, the width of a step of its product, warps, and how many steps its loads run ahead."""

    tokens: int
    ids: int
    width: int
    warps: int
    stages: int


# By the bytes of an element; from what compiles for sm_90 without spills, not from timings: there are none yet.
_BLOCKS = {2: Blocks(128, 128, 64, 8, 3), 4: Blocks(32, 64, 32, 4, 2)}
# Ids of a tile of the losses where not all are allowed: with more the masks spill.
_MASKED_IDS = 64
_ROOMY = 160 * 1024  # bytes of shared memory that three stages need, with some to spare


@dataclass(frozen=True)
class Given:
    """A call's inputs, ready for kernels. hidden is 0 where there is no label: what stood there reaches nothing."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    offsets: Tensor | None
    ids: Tensor | None
    allowed_range: Tensor | None
    always: int
    epsilon: float

    @staticmethod
    def of(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        offsets: Tensor | None,
        ids: Tensor | None,
        allowed_range: Tensor | None,
        always: int,
        epsilon: float,
    ) -> Given:
        hidden = hidden.masked_fill((labels == IGNORED)[:, None], 0.0)
        return Given(hidden, weight, bias, labels, offsets, ids, allowed_range, always, epsilon)

    @property
    def vocabulary(self) -> int:
        return self.weight.shape[0]

    def chunks(self) -> Iterator[slice]:
        """Runs of tokens whose score gradients are held at once."""
        fit = _CHUNK_BYTES // (self.vocabulary * self.weight.element_size())
        size = max(_CHUNK_TOKENS, fit // _CHUNK_TOKENS * _CHUNK_TOKENS)
        for first in range(0, self.hidden.shape[0], size):
            yield slice(first, min(first + size, self.hidden.shape[0]))


class Chunk(NamedTuple):
    """What the kernels of a chunk read. marking: what fills the mask of allowed ids first, where there is one."""

    arguments: dict[str, Any]
    constants: dict[str, Any]
    options: dict[str, Any]
    marking: list[Launch]


def forward_triton(*arguments: Any) -> tuple[Tensor, ...]:
    """The registered op cross_entropy_fwd: loss, nll, lse, best."""
    *inputs, best = arguments
    found, _ = _run(Given.of(*inputs), best, None)
    return tuple(found)


def sum_triton(*arguments: Any) -> tuple[Tensor, ...]:
    """The registered op cross_entropy_sum: the losses' sums, and the gradients of the first."""
    inputs, best, wanted = arguments[:-4], arguments[-4], arguments[-3:]
    given = Given.of(*inputs)
    (loss, nll, lse, ids), grads = _run(given, best, wanted)
    lse = lse if any(wanted) else lse.new_empty(0)  # for gradients computed again
    return (loss.sum(), nll.sum(), (given.labels != IGNORED).sum(), lse, ids, *grads)


def backward_triton(dloss: Tensor, lse: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """The registered op cross_entropy_bwd: dhidden, dweight, dbias; no elements where not wanted."""
    inputs, wanted = arguments[:-3], arguments[-3:]
    given = Given.of(*inputs)
    sums, shared = Gradients(given, wanted), shared_memory(given.hidden)
    for rows in given.chunks():
        chunk = chunk_of(given, rows, shared)
        run("cross_entropy", given.hidden, chunk.marking)
        sums.add(chunk, rows, dloss, lse)
    return sums.results()


def _run(given: Given, best: bool, wanted: tuple[bool, ...] | None) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    found, shared = empty_losses(given, best), shared_memory(given.hidden)
    sums = None if wanted is None else Gradients(given, wanted)
    for rows in given.chunks():
        chunk = chunk_of(given, rows, shared)
        run("cross_entropy", given.hidden, chunk.marking + loss_launches(given, chunk, rows, found))
        if sums is not None:
            sums.add(chunk, rows, torch.ones_like(found[0]), found[2])
    return found, () if sums is None else sums.results()


def empty_losses(given: Given, best: bool) -> list[Tensor]:
    """loss, nll, lse f32 `[N]`; best int64 `[N]`, `[0]` when not wanted."""
    tokens, device = given.hidden.shape[0], given.hidden.device
    found = [torch.empty(tokens, dtype=torch.float32, device=device) for _ in range(3)]
    return [*found, torch.empty(tokens if best else 0, dtype=torch.int64, device=device)]


def chunk_of(given: Given, rows: slice, shared: int) -> Chunk:
    """shared: bytes of shared memory that a program may use."""
    hidden, vocabulary = given.hidden[rows], given.vocabulary
    tokens, device = hidden.shape[0], hidden.device
    limits, mask, marking, allowed = given.allowed_range, None, list[Launch](), tiles.ALL
    if limits is not None:
        allowed = tiles.RANGE
        limits = limits if limits.shape[0] == 1 else limits[rows]
    elif given.offsets is not None:
        allowed = tiles.MASK
        mask = torch.zeros((tokens, vocabulary), dtype=torch.uint8, device=device)
        offsets = given.offsets[rows.start : rows.stop + 1]
        named = {"mask": mask, "offsets": offsets, "ids": given.ids, "vocabulary": vocabulary}
        marking = [Launch(tiles.cross_entropy_allow, (tokens,), named, {"BLOCK": _MARKED}, options(4, 1))]
    arguments: dict[str, Any] = {"hidden": hidden, "weight": given.weight, "bias": given.bias}
    arguments |= {"labels": given.labels[rows]}
    arguments |= {"ranges": limits, "range_stride": 0 if limits is None or limits.shape[0] == 1 else 2}
    arguments |= {"always": given.always, "mask": mask, "tokens": tokens, "vocabulary": vocabulary}
    blocks = _BLOCKS[hidden.element_size()]
    stages = blocks.stages if shared >= _ROOMY else 2
    constants = {"ALLOWED": allowed.value, "BIAS": given.bias is not None, "WIDTH": hidden.shape[1]}
    constants |= {"BLOCK_N": blocks.tokens, "BLOCK_V": blocks.ids}
    constants |= {"BLOCK_D": min(blocks.width, power_of_2(hidden.shape[1], 16))}
    return Chunk(arguments, constants, options(blocks.warps, stages), marking)


def loss_launches(given: Given, chunk: Chunk, rows: slice, found: list[Tensor]) -> list[Launch]:
    """Writes the chunk's rows of `found`: loss, nll, lse, best."""
    loss, nll, lse, best = (tensor[rows] for tensor in found)
    tokens, device = loss.shape[0], loss.device
    constants = dict(chunk.constants)
    if constants["ALLOWED"] != tiles.ALL.value:
        constants["BLOCK_V"] = min(constants["BLOCK_V"], _MASKED_IDS)
    token_blocks = ceil_div(tokens, constants["BLOCK_N"])
    id_blocks = ceil_div(given.vocabulary, constants["BLOCK_V"])
    each = ceil_div(id_blocks, max(1, min(id_blocks, _PROGRAMS // max(token_blocks, 1))))
    splits = ceil_div(id_blocks, each)
    parts = torch.empty((5, splits, tokens), dtype=torch.float32, device=device)
    best_parts = torch.empty((splits, tokens), dtype=torch.int32, device=device)
    shared = {"parts": parts, "best_parts": best_parts}
    scores = chunk.arguments | shared | {"blocks_per_split": each}
    merge = shared | {"loss": loss, "nll": nll, "lse": lse, "best": best, "labels": chunk.arguments["labels"]}
    merge |= {"tokens": tokens, "splits": splits, "epsilon": given.epsilon}
    merging = {"BEST": best.numel() > 0, "BLOCK": _MERGED}
    return [
        Launch(losses.cross_entropy_scores, (token_blocks, splits), scores, constants, chunk.options),
        Launch(losses.cross_entropy_merge, (ceil_div(tokens, _MERGED),), merge, merging, options(4, 1)),
    ]


def gradient_launch(given: Given, chunk: Chunk, dscore: Tensor, dloss: Tensor, lse: Tensor) -> Launch:
    """Writes dscore `[tokens, V]` of a chunk; dloss and lse are the chunk's rows."""
    arguments = chunk.arguments | {"dscore": dscore, "dloss": dloss, "lse": lse}
    arguments |= {"epsilon": given.epsilon, "counts": _counts(chunk, dscore.shape[0])}
    tokens, ids = chunk.constants["BLOCK_N"], chunk.constants["BLOCK_V"]
    grid = (ceil_div(dscore.shape[0], tokens), ceil_div(given.vocabulary, ids))
    return Launch(gradient.cross_entropy_gradient, grid, arguments, chunk.constants, chunk.options)


class Gradients:
    """Sums over chunks: dweight in its dtype (rounded once per chunk), dbias in f32."""

    def __init__(self, given: Given, wanted: tuple[bool, ...]) -> None:
        self.given, self.wanted = given, wanted
        hidden, weight, bias = given.hidden, given.weight, given.bias
        self.dhidden = torch.empty_like(hidden) if wanted[0] else hidden.new_empty(0)
        self.dweight = torch.zeros_like(weight) if wanted[1] else weight.new_empty(0)
        with_bias = wanted[2] and bias is not None
        self.dbias = torch.zeros(given.vocabulary if with_bias else 0, dtype=torch.float32, device=hidden.device)

    def add(self, chunk: Chunk, rows: slice, dloss: Tensor, lse: Tensor) -> None:
        given, hidden = self.given, self.given.hidden[rows]
        if not any(self.wanted):
            return
        dscore = torch.empty((hidden.shape[0], given.vocabulary), dtype=hidden.dtype, device=hidden.device)
        run("cross_entropy", hidden, [gradient_launch(given, chunk, dscore, dloss[rows], lse[rows])])
        if self.wanted[0]:
            torch.mm(dscore, given.weight, out=self.dhidden[rows])
        if self.wanted[1]:
            torch.addmm(self.dweight, dscore.t(), hidden, out=self.dweight)
        if self.dbias.numel():
            self.dbias += dscore.sum(0, dtype=torch.float32)

    def results(self) -> tuple[Tensor, ...]:
        return self.dhidden, self.dweight, self.dbias.to(self.given.hidden.dtype)


def _counts(chunk: Chunk, tokens: int) -> Tensor:
    """f32 `[tokens]`: how many ids each token of a chunk allows, of those there are."""
    limits, mask, vocabulary = (chunk.arguments[name] for name in ("ranges", "mask", "vocabulary"))
    if mask is not None:
        return mask.sum(1, dtype=torch.float32)  # type: ignore[no-any-return]
    if limits is None:
        return torch.full((tokens,), float(vocabulary), device=chunk.arguments["hidden"].device)
    lo, hi = limits.clamp(0, vocabulary).unbind(1)
    first = min(chunk.arguments["always"], vocabulary)
    counts: Tensor = first + (hi - lo.clamp(min=first)).clamp(min=0)
    return counts.float().expand(tokens).contiguous()
