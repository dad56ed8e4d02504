"""Triton kernels over rows of one width: how rows are cut into tiles, and the two kinds of launches.

A tile is ROWS whole rows, [ROWS, BLOCK]; BLOCK is the power of two that holds WIDTH, and what lies beyond is 0
everywhere (`tile_of` and its kin in triton_device.py).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ofakern.ops.triton_launch import Launch, ceil_div, options, power_of_2, run

# Elements of a tile where rows are narrow, and how many of them a warp holds; a program has at most 16 warps.
_TILE, _PER_WARP = 2048, 512
# Programs of a pass that sums over rows: each owns one f32 row per sum.
_PARTS = 512


class Tiles(NamedTuple):
    """How rows of a width are cut: ROWS x BLOCK elements and warps per program, tiles in all."""

    block: int
    rows: int
    warps: int
    tiles: int

    def constants(self, width: int) -> dict[str, Any]:
        return {"WIDTH": width, "BLOCK": self.block, "ROWS": self.rows}


class Call(NamedTuple):
    """Launches that were not run yet, what they write, and the parts whose sums are still to be made."""

    launches: list[Launch]
    results: tuple[Tensor, ...]
    parts: Tensor | None = None

    def run(self, op: str) -> tuple[Tensor, ...]:
        run(op, self.results[0], self.launches)
        return self.results

    def sums(self) -> list[Tensor]:
        """torch adds over the first dimension in an order that the shape alone fixes."""
        return [] if self.parts is None else [part.sum(0) for part in self.parts]


def tiles_of(rows: int, width: int) -> Tiles:
    block = power_of_2(width, 4)  # dropout's words come by four
    high = max(1, min(16, _TILE // block))
    warps = max(1, min(16, block * high // _PER_WARP))
    return Tiles(block, high, warps, ceil_div(rows, high))


def partition(tiles: int) -> tuple[int, int]:
    """(programs, tiles of each) of a pass with sums; a function of shapes only. One program at least writes zeros."""
    parts = max(1, min(tiles, _PARTS))
    return parts, ceil_div(tiles, parts)


def over_rows(kernel: Any, arguments: dict[str, Any], width: int, constants: dict[str, Any] | None = None) -> Launch:
    """A program per tile; `arguments` holds "rows"."""
    tiles = tiles_of(arguments["rows"], width)
    constants = {**(constants or {}), **tiles.constants(width)}
    return Launch(kernel, (tiles.tiles,), arguments, constants, options(tiles.warps, 1))


def over_runs(
    kernel: Any, arguments: dict[str, Any], weight: Tensor, constants: dict[str, Any] | None = None, sums: int = 2
) -> tuple[Launch, Tensor]:
    """A program per run of tiles, and the f32 `[sums, programs, WIDTH]` that it fills by `store_part`."""
    width = weight.shape[0]
    tiles = tiles_of(arguments["rows"], width)
    programs, each = partition(tiles.tiles)
    parts = torch.empty((sums, programs, width), dtype=torch.float32, device=weight.device)
    arguments = {**arguments, "parts": parts, "tiles": tiles.tiles, "tiles_per_part": each}
    constants = {**(constants or {}), **tiles.constants(width)}
    return Launch(kernel, (programs,), arguments, constants, options(tiles.warps, 2)), parts
