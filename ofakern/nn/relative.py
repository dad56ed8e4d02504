"""Relative-position blocks: from a parameter of buckets to a table with one row per coordinate difference.

A block lists, for every difference `d = r + dmin` of two integer coordinates, the parameter row it reads. Blocks of a
batch are unfolded to the extents the batch really has and stand one after another in one table `[H, R]`; a block's
place in that table goes into the queries' coordinates (`RelativeBlock.origin`), so the kernel reads
`table[h, q_coord - k_coord]` and knows nothing of buckets, grids or slots.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ofakern.errors import OfakernValueError


@dataclass(frozen=True)
class RelativeBlock:
    """Which parameter row each difference reads.

    index: int64 `[R]`, the parameter row of difference `d = r + dmin`. dmin: the smallest difference.
    order, run_rows, run_lengths: the same rows grouped by parameter row, for the gradient's fixed-order sums; `order`
    is None when each parameter row already owns one contiguous run.
    """

    index: Tensor
    dmin: int
    order: Tensor | None
    run_rows: Tensor
    run_lengths: Tensor

    @classmethod
    def build(cls, index: Tensor, dmin: int) -> RelativeBlock:
        """index: int64 `[R]` on the CPU, R >= 1."""
        if index.dim() != 1 or index.dtype != torch.int64 or index.numel() == 0:
            raise OfakernValueError(
                f"RelativeBlock: index must be int64 [R] with R >= 1, got {index.dtype} {tuple(index.shape)}"
            )
        rows, lengths = torch.unique_consecutive(index, return_counts=True)
        order = None
        if rows.unique().numel() != rows.numel():
            order = torch.argsort(index, stable=True)
            rows, lengths = torch.unique_consecutive(index[order], return_counts=True)
        return cls(index, dmin, order, rows, lengths)

    @property
    def rows(self) -> int:
        return self.index.shape[0]

    def origin(self, base: int) -> int:
        """What to add to a query's coordinate when this block starts at row `base` of the table."""
        return base - self.dmin

    def to(self, device: torch.device | str) -> RelativeBlock:
        order = None if self.order is None else self.order.to(device)
        return replace(
            self,
            index=self.index.to(device),
            order=order,
            run_rows=self.run_rows.to(device),
            run_lengths=self.run_lengths.to(device),
        )


def text_bucket(difference: Tensor, bucket_size: int, max_position: int) -> Tensor:
    """OFA's log buckets. difference: int64, query minus key position; int64 rows in `[0, 2 * bucket_size - 2]`.

    The logarithm and its ceiling are float32, as in the published code: at bucket borders float64 differs.
    """
    middle = bucket_size // 2
    magnitude = torch.where((difference < middle) & (difference > -middle), middle - 1, difference.abs())
    logarithm = torch.log(magnitude.to(torch.float32) / middle) / math.log((max_position - 1) / middle)
    far = torch.ceil(logarithm * (middle - 1)).to(torch.int64) + middle
    return torch.where(magnitude <= middle, difference, far * torch.sign(difference)) + bucket_size - 1


def text_block(length: int, bucket_size: int, max_position: int, causal: bool = False) -> RelativeBlock:
    """One-dimensional positions 0 .. length-1 (coordinate = position). causal: only differences >= 0 occur.

    Raises OfakernValueError when length exceeds max_position: the buckets end there.
    """
    if length > max_position:
        raise OfakernValueError(f"text_block: length must be at most max_position ({max_position}), got {length}")
    last = max(length, 1) - 1
    difference = torch.arange(0 if causal else -last, last + 1)
    return RelativeBlock.build(text_bucket(difference, bucket_size, max_position), 0 if causal else -last)


def grid_coordinates(height: int, width: int) -> Tensor:
    """Coordinates of a row-major grid: int64 `[height * width]`, `y * (2 * width - 1) + x`."""
    return (torch.arange(height)[:, None] * (2 * width - 1) + torch.arange(width)).reshape(-1)


def grid_extent(height: int, width: int) -> int:
    """M: the largest coordinate of a grid, and so the largest difference."""
    return (height - 1) * (2 * width - 1) + width - 1


def grid_block(height: int, width: int, bucket_size: int) -> RelativeBlock:
    """A grid of patches over a parameter of `(2 * bucket_size - 1)^2` rows (more rows may follow).

    Raises OfakernValueError when the grid exceeds bucket_size: the published index would wrap silently.
    """
    _check_grid("grid_block", height, width, bucket_size)
    extent = grid_extent(height, width)
    return RelativeBlock.build(_grid_index(torch.arange(-extent, extent + 1), width, bucket_size), -extent)


@dataclass(frozen=True)
class SpecialRows:
    """Parameter rows of a special token beside a segment: `row` [special, j], `column` [i, special], `corner`."""

    row: int
    column: int
    corner: int

    @classmethod
    def of_image(cls, bucket_size: int) -> SpecialRows:
        """OFA's image parameter: the last three of `(2 * bucket_size - 1)^2 + 3` rows."""
        rows = (2 * bucket_size - 1) ** 2 + 3
        return cls(row=rows - 3, column=rows - 2, corner=rows - 1)


def with_special(block: RelativeBlock, special: SpecialRows) -> RelativeBlock:
    """Adds one special token (class token, begin token) to a symmetric block; `special_coordinates` gives its places.

    With M = -block.dmin the result has 5M + 4 rows from difference -(2M+1): column, normal, corner, row.
    """
    extent = -block.dmin
    if block.rows != 2 * extent + 1:
        raise OfakernValueError(
            f"with_special: block must span -M..M ({2 * extent + 1} rows from {block.dmin}), got {block.rows} rows"
        )
    parts = [
        torch.full((extent + 1,), special.column),
        block.index,
        torch.full((extent + 1,), special.corner),
        torch.full((extent + 1,), special.row),
    ]
    return RelativeBlock.build(torch.cat(parts), -(2 * extent + 1))


def special_coordinates(extent: int) -> tuple[int, int]:
    """(query, key) coordinate of the special token beside a segment with coordinates in [0, extent]."""
    return 3 * extent + 2, 2 * extent + 1


def causal_with_special(block: RelativeBlock, special: SpecialRows) -> RelativeBlock:
    """The causal form, special token first: only differences >= 0 occur, 2M + 3 rows: normal, column, corner."""
    extent = block.rows - 1 + block.dmin
    parts = [
        block.index[-block.dmin :],
        torch.full((extent + 1,), special.column),
        torch.full((1,), special.corner),
    ]
    return RelativeBlock.build(torch.cat(parts), 0)


def causal_special_coordinates(extent: int) -> tuple[int, int]:
    """(query, key) coordinate of the leading special token of a causal segment."""
    return extent + 1, -(extent + 1)


def unfold(weights: Sequence[Tensor], blocks: Sequence[RelativeBlock]) -> Tensor:
    """The table of a layer: f32 `[H, R_total]` from parameters `[P_b, H]`, one per block, in the blocks' order.

    The gradient of a parameter row is the sum of its table rows in ascending order, the same bits run after run.
    """
    if len(weights) != len(blocks) or not blocks:
        raise OfakernValueError(
            f"unfold: weights must have one parameter per block ({len(blocks)}, at least 1), got {len(weights)}"
        )
    parts = [_unfold_one(weight, block) for weight, block in zip(weights, blocks, strict=True)]
    rows = parts[0] if len(parts) == 1 else torch.cat(parts)
    return rows.t().contiguous()


def _unfold_one(weight: Tensor, block: RelativeBlock) -> Tensor:
    wide = weight if weight.dtype == torch.float64 else weight.float()  # kernels take tables in f32
    rows: Tensor = _Unfold.apply(wide, block.index, block.order, block.run_rows, block.run_lengths)  # type: ignore[no-untyped-call]
    return rows


class _Unfold(torch.autograd.Function):
    """index_select whose gradient is a segment sum: CUDA's index_add_ adds in any order."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        weight: Tensor,
        index: Tensor,
        order: Tensor | None,
        run_rows: Tensor,
        run_lengths: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(order, run_rows, run_lengths)  # type: ignore[arg-type]
        ctx.parameter_rows = weight.shape[0]  # type: ignore[attr-defined]
        return weight.index_select(0, index)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        order, run_rows, run_lengths = ctx.saved_tensors  # type: ignore[attr-defined]
        rows = grad.contiguous() if order is None else grad.index_select(0, order)
        sums = torch.segment_reduce(rows, "sum", lengths=run_lengths, axis=0, unsafe=True)
        out = grad.new_zeros((ctx.parameter_rows, grad.shape[1]))  # type: ignore[attr-defined]
        return out.index_copy_(0, run_rows, sums), None, None, None, None


def _grid_index(difference: Tensor, width: int, bucket_size: int) -> Tensor:
    span = 2 * bucket_size - 1
    dy = torch.div(difference + width - 1, 2 * width - 1, rounding_mode="floor")
    dx = difference - dy * (2 * width - 1)
    return (dy + bucket_size - 1) * span + dx + bucket_size - 1


def _check_grid(where: str, height: int, width: int, bucket_size: int) -> None:
    if not (0 < height <= bucket_size and 0 < width <= bucket_size):
        raise OfakernValueError(
            f"{where}: height and width must be in [1, {bucket_size}] (the bucket size), got {height} x {width}"
        )
