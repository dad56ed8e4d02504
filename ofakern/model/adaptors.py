"""All adaptors of one side, the embeddings they share and the factored position projections."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ofakern.data.batch import PackedSide
from ofakern.errors import OfakernValueError
from ofakern.modality.adaptors import build_adaptor
from ofakern.modality.video.adaptor import VideoAdaptor
from ofakern.model.config import OFAConfig
from ofakern.model.side import SidePlan, find_adaptor, plan_side
from ofakern.nn.adaptor import Adaptor, SideShape
from ofakern.nn.attention import split_heads
from ofakern.nn.linear import Linear
from ofakern.nn.relative import RelativeBlock, unfold
from ofakern.ops.library import readable


class AdaptorGroup(nn.Module):
    """embed_tokens is shared by both sides and with the output. Adaptors are children under their own names."""

    def __init__(self, config: OFAConfig, source: bool, embed_tokens: nn.Embedding) -> None:
        super().__init__()
        self.config = config
        self.source = source
        self.embed_tokens = embed_tokens
        layers = config.encoder_layers if source else config.decoder_layers
        shape = SideShape(
            dim=config.dim,
            heads=config.heads,
            tables=1 if config.share_attn_bias else layers,
            source=source,
            dropout=config.dropout,
            entangle_position_embedding=config.entangle_position_embedding or (config.entangle_decoder and not source),
        )
        self.names: list[str] = []
        for options in config.adaptors:
            adaptor = build_adaptor(options, shape)
            if adaptor is not None:
                self.add_module(options.name, adaptor)
                self.names.append(options.name)
        for adaptor in self.adaptors.values():
            if isinstance(adaptor, VideoAdaptor):
                adaptor.bind(self.adaptors)
        factored = not config.entangle_position_embedding
        self.pos_q_linear = Linear(config.dim, config.dim) if factored else None
        self.pos_k_linear = Linear(config.dim, config.dim) if factored else None
        extra = config.max_segments if source else config.target_slots
        self.order_embedding = nn.Embedding(extra, config.dim) if extra else None

    @property
    def adaptors(self) -> dict[str, Adaptor]:
        found = {name: self.get_submodule(name) for name in self.names}
        return {name: module for name, module in found.items() if isinstance(module, Adaptor)}

    def plan(self, side: PackedSide, share_positions: bool = True) -> SidePlan:
        """The side's plan, built at the first call and kept in the side's cache. share_positions: where it pays."""
        routed = "ofasys" if self.config.compat == "ofasys" else "modality"
        experts = routed if self.config.modal_ffn else ""
        factored = self.pos_q_linear is not None
        key = ("plan", self.source, self.config.use_self_attn_bias, experts, self.config.adaptors, factored)
        plan = side.cache.get(key)
        if not isinstance(plan, SidePlan):
            relative = self.config.use_self_attn_bias
            causal = not self.source and self._is_ordered(side)
            share = factored and share_positions
            plan = plan_side(side, self.adaptors, causal=causal, relative=relative, experts=experts, factored=share)
            side.cache[key] = plan
        return plan

    def forward(self, side: PackedSide) -> tuple[Tensor, Tensor]:
        """(embeddings, position embeddings) of the packed tokens, `[N, D]` each."""
        order = self.plan(side).order  # first of all: it refuses segments that the tables are too short for
        adaptors = self.adaptors
        parts = [find_adaptor(adaptors, values)(values, self.embed_tokens) for values in side.segments]
        if not parts:
            empty = self.embed_tokens.weight.new_zeros((0, self.config.dim))
            return empty, empty
        embed = _pack([embed for embed, _ in parts], order)
        positions = _pack([position for _, position in parts], order)
        if self.order_embedding is not None:
            embed = embed + self._order(side)
        return embed, positions

    def factored(self, positions: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """q_pos and k_pos `[N, H, P]` of position embeddings `[N, D]`; (None, None) when the term is off."""
        if self.pos_q_linear is None or self.pos_k_linear is None:
            return None, None
        heads = self.config.heads
        return split_heads(self.pos_q_linear(positions), heads), split_heads(self.pos_k_linear(positions), heads)

    def _is_ordered(self, side: PackedSide) -> bool:
        """Whether the target is written token by token, not all of it at once."""
        adaptors = self.adaptors
        ordered = {find_adaptor(adaptors, values).ordered for values in side.segments}
        if len(ordered) > 1:
            names = sorted({values.adaptor for values in side.segments})
            raise OfakernValueError(f"OFAPlus: target must be written in order or all at once, got both: {names}")
        return ordered != {False}

    def tables(
        self, blocks: Sequence[tuple[str, RelativeBlock]], second: Sequence[tuple[str, RelativeBlock]] = ()
    ) -> list[tuple[Tensor, ...]]:
        """Per layer the tables for attention, `[H, R]` each, one per relative term; shared ones are built once."""
        layers = self.config.encoder_layers if self.source else self.config.decoder_layers
        if not blocks:
            return [()] * layers
        adaptors = self.adaptors
        count = 1 if self.config.share_attn_bias else layers
        terms = [([adaptors[name].tables() for name, _ in blocks], [block for _, block in blocks])]
        if second:
            terms.append(([adaptors[name].second_tables() for name, _ in second], [block for _, block in second]))
        tables = [
            tuple(unfold([w[layer] for w in weights], unfolded) for weights, unfolded in terms)
            for layer in range(count)
        ]
        return tables * layers if self.config.share_attn_bias else tables

    def _order(self, side: PackedSide) -> Tensor:
        assert self.order_embedding is not None
        index = side.segment_order if self.source else side.target_slot_id
        limit = self.order_embedding.num_embeddings
        if readable(index) and index.numel() and int(index.max()) >= limit:
            name = "max_segments" if self.source else "target_slots"
            raise OfakernValueError(f"OFAPlus: {name} ({limit}) must exceed every index, got {int(index.max())}")
        rows: Tensor = self.order_embedding(index)
        return rows


def _pack(parts: list[Tensor], order: Tensor | None) -> Tensor:
    joined = parts[0] if len(parts) == 1 else torch.cat(parts)
    return joined if order is None else joined.index_select(0, order)
