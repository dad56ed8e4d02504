"""The segment that samples write: its embeddings, and what its positions add to every score.

Position terms depend on the position only, not on tokens, rows or samples, so they are made for `BLOCK` upcoming
positions in one product and looked up afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ofakern.errors import OfakernValueError
from ofakern.model.stacks import Decoder
from ofakern.nn.adaptor import TokenAdaptor

BLOCK = 16


@dataclass(frozen=True)
class SegmentKind:
    """What a decoder writes: the adaptor's name, the modality's number, the target slot, the most tokens fed."""

    adaptor: str
    modality: int
    slot: int
    max_length: int


@dataclass(frozen=True)
class PositionBlock:
    """Position terms of the positions start .. start + n - 1.

    own: f32 `[n, layers, H, start + n]`, what self-attention's scores get (`layers` is 1 where all share it).
    cross: f32 `[H, n, P]`, scaled queries of cross attention's factored term. None: there is no such term.
    """

    start: int
    own: Tensor | None
    cross: Tensor | None


@dataclass(frozen=True)
class _Tokens:
    """Tokens of one step as an adaptor sees them: each is a segment of which only one position is here."""

    value: Tensor
    lengths: Tensor
    positions: Tensor
    partial: bool = False
    levels: Tensor | None = None


class Segment:
    """A `SegmentKind` on a decoder. Raises OfakernValueError for an adaptor that writes no tokens, and lengths that
    the adaptor does not reach."""

    def __init__(self, decoder: Decoder, kind: SegmentKind) -> None:
        adaptor = decoder.adaptor.adaptors.get(kind.adaptor)
        if not isinstance(adaptor, TokenAdaptor):
            known = sorted(n for n, a in decoder.adaptor.adaptors.items() if isinstance(a, TokenAdaptor))
            raise OfakernValueError(f"OFAPlus.begin_decode: adaptor must be one of {known}, got {kind.adaptor!r}")
        self.kind = kind
        self._decoder, self._adaptor = decoder, adaptor
        self._scale = decoder.decoder_layers()[0].self_attn.scale
        self._device = decoder.adaptor.embed_tokens.weight.device
        self._blocks: dict[int, PositionBlock] = {}
        self._k_pos: Tensor | None = None
        self._table = self._unfolded()
        self._q_coord, self._k_coord = (c.to(self._device) for c in adaptor.step_coordinates(kind.max_length))

    @property
    def token_shape(self) -> tuple[int, ...]:
        return self._adaptor.step_shape

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """tokens `[n, *token_shape]` at their positions int64 `[n]`: `[n, D]`."""
        group = self._decoder.adaptor
        embed = self._adaptor.token_embedding(self._tokens(tokens, positions), group.embed_tokens)
        if group.order_embedding is not None:
            embed = embed + group.order_embedding.weight[self.kind.slot]
        return embed

    def block(self, position: int) -> PositionBlock:
        """The block that holds the position."""
        start = position - position % BLOCK
        if start not in self._blocks:
            self._blocks[start] = self._make(start, min(start + BLOCK, self.kind.max_length))
        return self._blocks[start]

    def forget_before(self, position: int) -> None:
        """Drops blocks of positions that nobody will ask for again."""
        for start in [start for start in self._blocks if start + BLOCK <= position]:
            del self._blocks[start]

    def _make(self, start: int, end: int) -> PositionBlock:
        places = torch.arange(start, end, device=self._device)
        embedded = self._embedded(places)
        q_pos, _ = self._decoder.adaptor.factored(embedded)
        own = None
        if q_pos is not None:
            keys = self._keys_until(end)
            # As the attention op does: products of rounded projections in float32.
            own = torch.bmm(_by_head(q_pos) * self._scale, keys.transpose(1, 2)).transpose(0, 1)[:, None]
        if self._table is not None:
            relative = self._relative(start, end)
            own = relative if own is None else own + relative
        cross = self._decoder.cross_queries(embedded)
        return PositionBlock(start, own, None if cross is None else _by_head(cross) * self._scale)

    def _keys_until(self, end: int) -> Tensor:
        """f32 `[H, end, P]`: the positions' keys; `end` is asked for in any order."""
        have = 0 if self._k_pos is None else self._k_pos.shape[1]
        if have < end:
            _, k_pos = self._decoder.adaptor.factored(self._embedded(torch.arange(have, end, device=self._device)))
            assert k_pos is not None
            more = _by_head(k_pos)
            self._k_pos = more if self._k_pos is None else torch.cat([self._k_pos, more], 1)
        assert self._k_pos is not None
        return self._k_pos[:, :end]

    def _relative(self, start: int, end: int) -> Tensor:
        """f32 `[n, layers, H, end]` of the tables; what later keys would get is never read."""
        assert self._table is not None
        rows = self._q_coord[start:end, None] - self._k_coord[:end]
        rows = rows.clamp(0, self._table.shape[2] - 1)
        found = self._table.index_select(2, rows.flatten())
        return found.view(*found.shape[:2], *rows.shape).permute(2, 0, 1, 3)

    def _unfolded(self) -> Tensor | None:
        """The tables f32 `[layers, H, R]`, causal: row = coordinate difference."""
        group, length = self._decoder.adaptor, self.kind.max_length
        if not self._decoder.config.use_self_attn_bias:
            return None
        block = self._adaptor.block_of_length(length, causal=True).to(self._device)
        tables = [table for (table,) in group.tables([(self.kind.adaptor, block)])]
        return torch.stack(tables[:1] if self._decoder.config.share_attn_bias else tables)

    def _embedded(self, places: Tensor) -> Tensor:
        """Position embeddings `[n, D]`."""
        value = torch.zeros((len(places), *self.token_shape), dtype=torch.int64, device=self._device)
        return self._adaptor.position_embedding(self._tokens(value, places))

    def _tokens(self, value: Tensor, positions: Tensor) -> _Tokens:
        return _Tokens(value, torch.ones(len(positions), dtype=torch.int32, device="cpu"), positions)


def _by_head(x: Tensor) -> Tensor:
    """`[n, H, P]` to f32 (float64 stays) `[H, n, P]`."""
    wide = x if x.dtype == torch.float64 else x.float()
    return wide.transpose(0, 1).contiguous()
