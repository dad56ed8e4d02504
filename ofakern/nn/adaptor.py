"""The contract between the model and a modality's adaptor: values in, packed embeddings and positions out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ofakern.nn.norm import embed_norm
from ofakern.nn.relative import RelativeBlock


class SegmentValues(Protocol):
    """What an adaptor reads of a batch's `AdaptorInput`."""

    @property
    def value(self) -> Tensor: ...
    @property
    def lengths(self) -> Tensor: ...
    @property
    def positions(self) -> Tensor: ...
    @property
    def partial(self) -> bool: ...
    @property
    def levels(self) -> Tensor | None: ...


@dataclass(frozen=True, kw_only=True)
class AdaptorConfig:
    """Options every adaptor has. `None` takes the model's own value."""

    name: ClassVar[str] = ""
    layernorm_embedding: bool = True
    layernorm_position: bool = True
    add_type_embedding: bool = True
    entangle_position_embedding: bool | None = None
    scale_embedding: bool = False
    scale_embedding_gradient: float = 1.0
    dropout: float | None = None


@dataclass(frozen=True)
class SideShape:
    """What an adaptor needs to know of the side it is built for. tables: relative tables to hold (1 when shared)."""

    dim: int
    heads: int
    tables: int
    source: bool
    dropout: float
    entangle_position_embedding: bool


class Adaptor(nn.Module, ABC):
    """Turns all segments of one kind into embeddings and position embeddings, `[n_tokens, D]` each.

    ordered: as a target its tokens are written one after the other, so each sees the earlier ones only.
    """

    ordered: ClassVar[bool] = True

    def __init__(self, config: AdaptorConfig, side: SideShape) -> None:
        super().__init__()
        self.options = config
        self.side = side
        self.dropout = side.dropout if config.dropout is None else config.dropout
        entangle = config.entangle_position_embedding
        self.entangle = side.entangle_position_embedding if entangle is None else entangle
        self.embed_scale = side.dim**0.5 if config.scale_embedding else 1.0
        self.layernorm_embedding = nn.LayerNorm(side.dim) if config.layernorm_embedding else None
        self.layernorm_position = nn.LayerNorm(side.dim) if config.layernorm_position else None
        self.type_embedding = nn.Embedding(1, side.dim) if config.add_type_embedding else None

    @abstractmethod
    def embed(self, values: SegmentValues, embed_tokens: nn.Embedding) -> Tensor:
        """The raw embeddings `[n_tokens, D]`."""

    @abstractmethod
    def position(self, values: SegmentValues) -> Tensor:
        """The raw position embeddings `[n_tokens, D]`: of a token's place (`positions`) and the value's size alone.

        Samples whose tokens agree in these share what attention makes of them.
        """

    @abstractmethod
    def block(self, values: SegmentValues, causal: bool) -> RelativeBlock | None:
        """The relative block for the extents of these values, on the CPU; None: no relative bias."""

    @abstractmethod
    def coordinates(self, values: SegmentValues) -> Tensor:
        """Integer coordinates `[n_tokens]` on the CPU, before the block's origin."""

    def key_coordinates(self, values: SegmentValues) -> Tensor:
        """The same for the tokens as keys; only special tokens differ from `coordinates`."""
        return self.coordinates(values)

    @abstractmethod
    def tables(self) -> Sequence[Tensor]:
        """The relative parameters `[P, H]`, one per layer (one in all when shared)."""

    def second_block(self, values: SegmentValues) -> RelativeBlock | None:
        """The block of a second relative term (a video's frames beside its patches); None: there is none."""
        return None

    def second_coordinates(self, values: SegmentValues) -> Tensor:
        """Integer coordinates `[n_tokens]` of the second term, on the CPU."""
        return torch.zeros(values.positions.shape[0], dtype=torch.int64)

    def second_tables(self) -> Sequence[Tensor]:
        """The relative parameters of the second term, as `tables`."""
        return ()

    def zero_at_start(self) -> Sequence[Tensor]:
        """Parameters that are zero in a new model: it starts without relative bias."""
        return (*self.tables(), *self.second_tables())

    def forward(self, values: SegmentValues, embed_tokens: nn.Embedding) -> tuple[Tensor, Tensor]:
        """(embedding, position embedding), `[n_tokens, D]` each, after scale, type embedding, norms and dropout."""
        position = self.position(values)
        embed = self._normed_embedding(values, embed_tokens, position)
        return F.dropout(embed, self.dropout, self.training), self._normed_position(position)

    def position_embedding(self, values: SegmentValues) -> Tensor:
        """The second half of `forward` alone, `[n_tokens, D]`."""
        return self._normed_position(self.position(values))

    def token_embedding(self, values: SegmentValues, embed_tokens: nn.Embedding) -> Tensor:
        """The first half of `forward` alone, `[n_tokens, D]`; raw positions are made only where they are added."""
        embed = self._normed_embedding(values, embed_tokens, self.position(values) if self.entangle else None)
        return F.dropout(embed, self.dropout, self.training)

    def table(self, embed_tokens: nn.Embedding) -> Tensor | None:
        """`[V, D]` where the raw embeddings are its rows at `value` and nothing more, else None."""
        return None

    def _normed_position(self, position: Tensor) -> Tensor:
        return position if self.layernorm_position is None else self.layernorm_position(position)

    def _normed_embedding(self, values: SegmentValues, embed_tokens: nn.Embedding, position: Tensor | None) -> Tensor:
        """The embeddings after scale, raw position (given where it is entangled), type embedding and norm."""
        types = self.type_embedding.weight if self.type_embedding is not None and self.side.source else None
        factor = self.options.scale_embedding_gradient
        table = self.table(embed_tokens)
        if table is not None and self.layernorm_embedding is not None and not self.entangle and factor == 1.0:
            return embed_norm(values.value, table, self.layernorm_embedding, types, self.embed_scale)
        embed = self.embed(values, embed_tokens)
        if self.embed_scale != 1.0:
            embed = embed * self.embed_scale
        if self.entangle and position is not None:  # the raw position: its norm serves the bias only
            embed = embed + position
        if types is not None:
            embed = embed + types
        if factor != 1.0:
            embed = embed * factor + embed.detach() * (1.0 - factor)
        return embed if self.layernorm_embedding is None else self.layernorm_embedding(embed)


class TokenAdaptor(Adaptor):
    """An adaptor of tokens that the decoder can write one by one. step_shape: of one token's value.

    Its `position` depends on the values' `positions` only, so that decoding makes those of a block of steps at once.
    """

    step_shape: tuple[int, ...] = ()

    @abstractmethod
    def block_of_length(self, length: int, causal: bool) -> RelativeBlock:
        """The block of one segment of `length` tokens."""

    @abstractmethod
    def step_coordinates(self, length: int) -> tuple[Tensor, Tensor]:
        """Coordinates of the tokens 0 .. length-1 of such a segment, as queries and as keys, `[length]` each."""


class FrameAdaptor(TokenAdaptor):
    """An adaptor whose target tokens are frames: it has output layers of its own."""

    @abstractmethod
    def frames(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(frame `[N, F]`, logit `[N]` that it is the last) of the decoder's states `[N, D]`."""

    @abstractmethod
    def refine(self, frames: Tensor, lengths: Sequence[int]) -> Tensor:
        """Whole segments' frames, end to end `[N, F]`, made better by what stands before and behind them."""


def relative_tables(count: int, rows: int, heads: int) -> nn.ModuleList:
    """`count` parameters `[rows, heads]`, zero: the model starts without relative bias."""
    tables = nn.ModuleList(nn.Embedding(rows, heads) for _ in range(count))
    for table in tables:
        assert isinstance(table, nn.Embedding)
        nn.init.zeros_(table.weight)
    return tables


def table_weights(tables: nn.ModuleList) -> list[Tensor]:
    return [table.weight for table in tables if isinstance(table.weight, torch.Tensor)]
