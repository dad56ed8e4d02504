"""Position inputs of OFA's attention: what stands in place of its dense `attn_bias`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from ofakern.errors import OfakernValueError
from ofakern.nn.dropin.layouts import Given
from ofakern.nn.relative import RelativeBlock, grid_block, grid_coordinates, text_block, unfold
from ofakern.ops.attention import RelativeTerm


@dataclass(frozen=True, eq=False)
class PositionBias:
    """A bias that is a function of positions: OFA's absolute term and its relative tables, for a padded batch.

    q_pos `[B,T,H,P]`, k_pos `[B,S,H,P]`: the projections of position embeddings, *not* scaled (the attention's scale
    applies to both products); both or neither. tables: `[H,R]` each, one per term of `given`, which is shared by all
    layers and samples (`OFAPositions` makes them).
    """

    q_pos: Tensor | None = None
    k_pos: Tensor | None = None
    tables: tuple[Tensor, ...] = ()
    given: Given | None = None

    def last(self, queries: int = 1) -> PositionBias:
        """The same for the last queries only: a step of incremental decoding."""
        given = None
        if self.given is not None:
            given = Given(
                tuple(
                    replace(term, q_coord=term.q_coord[-queries:], same=term.same[-queries:])
                    for term in self.given.given
                )
            )
        return replace(self, q_pos=None if self.q_pos is None else self.q_pos[:, -queries:], given=given)


@dataclass(frozen=True, eq=False)
class OFAPositions:
    """Coordinates and tables of OFA's sequences: image patches (if any), then text.

    `given` goes into `PositionBias`; `table` unfolds a layer's parameters. Make it with `encoder` or `decoder`, which
    return the same object for the same sizes, so that layouts are shared.
    """

    given: Given
    blocks: tuple[RelativeBlock, ...]

    @classmethod
    def encoder(
        cls,
        text: int,
        image: tuple[int, int] | None = None,
        *,
        token_bucket_size: int = 256,
        image_bucket_size: int = 42,
        max_position: int = 1024,
    ) -> OFAPositions:
        """text: (padded) tokens; image: rows and columns of patches before them."""
        return _encoder_positions(text, image, token_bucket_size, image_bucket_size, max_position)

    @classmethod
    def decoder(cls, text: int, *, token_bucket_size: int = 256, max_position: int = 1024) -> OFAPositions:
        """text: (padded) tokens of a causal sequence."""
        return _encoder_positions(text, None, token_bucket_size, 1, max_position)

    def table(self, token_weight: Tensor, image_weight: Tensor | None = None) -> Tensor:
        """f32 `[H,R]` of one layer: token_weight `[2 * bucket - 1, H]`, image_weight `[(2 * bucket - 1)^2 + 3, H]`."""
        weights: Sequence[Tensor] = [token_weight] if image_weight is None else [image_weight, token_weight]
        if len(weights) != len(self.blocks):
            raise OfakernValueError(
                f"OFAPositions: image_weight must be given exactly when there are patches, got {len(weights)} "
                f"parameters for {len(self.blocks)} blocks"
            )
        return unfold(weights, [block.to(token_weight.device) for block in self.blocks])


@lru_cache(maxsize=64)
def _encoder_positions(
    text: int, image: tuple[int, int] | None, token_bucket_size: int, image_bucket_size: int, max_position: int
) -> OFAPositions:
    blocks = [text_block(text, token_bucket_size, max_position)]
    line = torch.arange(text)
    if image is None:
        runs, coordinates = [text], [line]
    else:
        blocks.insert(0, grid_block(*image, image_bucket_size))
        runs, coordinates = [image[0] * image[1], text], [grid_coordinates(*image), line]
    q_coord, same, base, start = [], [], 0, 0
    for block, length, places in zip(blocks, runs, coordinates, strict=True):
        q_coord.append(places + block.origin(base))
        same.append(torch.tensor([[start, start + length]]).expand(length, 2))
        base, start = base + block.rows, start + length
    term = RelativeTerm(
        torch.cat(q_coord).to(torch.int32),
        torch.cat(coordinates).to(torch.int32),
        torch.cat(same).to(torch.int32),
        base,
    )
    return OFAPositions(Given((term,)), tuple(blocks))
