"""What positions add to scores, kept where a graph looks it up: the blocks of positions that samples are in."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from ofakern.model.decode.segment import BLOCK, PositionBlock
from ofakern.model.decode.source import SampleBias


class OwnBias:
    """Of self-attention: `places` blocks of positions, for keys before the `width`-th.

    store: f32 `[layers * H, places * BLOCK, width]`. like: `PositionBlock.own` of any block.
    """

    def __init__(self, like: Tensor, places: int, width: int) -> None:
        self._layers, self._heads = like.shape[1], like.shape[2]
        self.store = like.new_zeros((self._layers * self._heads, places * BLOCK, width))
        self._held: list[PositionBlock | None] = [None] * places

    def rows(self, blocks: Sequence[PositionBlock], positions: Sequence[int]) -> np.ndarray:
        """int32 `[B]`: the store's row of each sample's position, which lies in its block. At most `places` blocks."""
        wanted = {id(block) for block in blocks}
        place = {id(block): n for n, block in enumerate(self._held) if id(block) in wanted}
        free = [n for n, block in enumerate(self._held) if id(block) not in wanted]
        found = np.empty(len(blocks), np.int32)
        for n, (block, position) in enumerate(zip(blocks, positions, strict=True)):
            if id(block) not in place:
                place[id(block)] = free.pop()
                self._put(place[id(block)], block)
            found[n] = place[id(block)] * BLOCK + position - block.start
        return found

    def _put(self, place: int, block: PositionBlock) -> None:
        assert block.own is not None
        count, end = block.own.shape[0], block.own.shape[3]
        rows = self.store[:, place * BLOCK : place * BLOCK + count, :end]
        rows.copy_(block.own.permute(1, 2, 0, 3).flatten(0, 1))
        self._held[place] = block

    def at(self, rows: Tensor) -> Tensor:
        """rows int32 `[n]`: f32 `[layers, H, n * width]`."""
        return self.store.index_select(1, rows).view(self._layers, self._heads, -1)


class CrossBias:
    """Of cross attention: a block of positions of each sample, keys side by side. store: f32 `[H, BLOCK, columns]`."""

    def __init__(self, like: Tensor, columns: int) -> None:
        """like: `PositionBlock.cross` of any block."""
        self.columns = columns
        self.store = like.new_zeros((like.shape[0], BLOCK, columns))
        self._held: list[tuple[Tensor, int, int]] = []

    def rows(self, biases: Sequence[SampleBias]) -> np.ndarray:
        """int32 `[sum of S]`: the row that each sample's columns are read from."""
        held, column = [], 0
        for n, (bias, _, length) in enumerate(biases):
            if n >= len(self._held) or self._held[n][0] is not bias or self._held[n][1:] != (column, length):
                own = bias[:, :, :length].transpose(0, 1)
                self.store[:, : len(bias), column : column + length].copy_(own)
            held.append((bias, column, length))  # samples may share one
            column += length
        self._held = held
        return np.array([row for _, row, _ in biases], np.int32).repeat([length for _, _, length in biases])

    def at(self, rows: Tensor) -> Tensor:
        """rows int32 `[columns]`: f32 `[H, columns]`."""
        heads, _, columns = self.store.shape
        found: Tensor = self.store.gather(1, rows.long().expand(heads, 1, columns))[:, 0]
        return found
