"""The encoder's and the decoder's stacks of layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ofakern.data.batch import PackedSide
from ofakern.model.adaptors import AdaptorGroup
from ofakern.model.config import OFAConfig
from ofakern.model.side import PositionSets, plan_cross
from ofakern.nn.attention import Positions, split_heads
from ofakern.nn.experts import Routing
from ofakern.nn.layers import DecoderLayer, EncoderLayer, Samples
from ofakern.nn.light import PromptEncoder
from ofakern.nn.linear import Linear
from ofakern.ops.attention import AttentionLayout


@dataclass(frozen=True)
class Memory:
    """The encoder's result. Its content is the model's own: nothing outside `ofakern.model` reads it.

    samples: B. sets: samples that share positions, where the encoder made use of it.
    """

    states: Tensor
    positions: Tensor
    lengths: tuple[int, ...]
    sets: PositionSets | None = None

    @property
    def samples(self) -> int:
        return len(self.lengths)

    def to(self, dtype: torch.dtype) -> Memory:
        return replace(self, states=self.states.to(dtype), positions=self.positions.to(dtype))


class Encoder(nn.Module):
    """Adaptors, layers and the final norm over packed source tokens."""

    def __init__(self, config: OFAConfig, embed_tokens: nn.Embedding, backend: str) -> None:
        super().__init__()
        self.config = config
        self.backend = backend
        self.adaptor = AdaptorGroup(config, source=True, embed_tokens=embed_tokens)
        rates = _rates(config.encoder_drop_path, config.encoder_layers)
        self.encoder_prompt_encoder = _prompt(config, config.encoder_prefix, config.encoder_layers)
        self.layers = nn.ModuleList(EncoderLayer(config.layer(rate)) for rate in rates)
        self.layer_norm = nn.LayerNorm(config.dim) if config.normalize_before else None
        if config.compat == "ofasys" and not config.use_self_attn_bias:
            for layer in self.layers:
                assert isinstance(layer, EncoderLayer)
                layer.self_attn.scale = layer.self_attn.width**-0.5
                layer.self_attn.use_head_scale = False

    def forward(self, side: PackedSide) -> Memory:
        x, positions = self.adaptor(side)
        plan = self.adaptor.plan(side)
        q_pos, k_pos = self.adaptor.factored(plan.factored_rows(positions))
        prefixes, prefix_layout = prefixes_of(self.encoder_prompt_encoder, side.tokens, len(self.layers), x.device)
        shared = Positions(plan.layout, q_pos, k_pos, self.backend, prefix_layout)
        samples = dropped_together(side, self.config.compat)
        tables = self.adaptor.tables(plan.blocks, plan.second_blocks)
        for layer, own_tables, prefix in zip(self.layers, tables, prefixes, strict=True):
            call = partial(layer, positions=shared, samples=samples, routing=plan.routing, prefix=prefix)
            x = run_layer(self, call, x, tables=own_tables)
        if self.layer_norm is not None:
            x = self.layer_norm(x)
        return Memory(x, positions, side.lengths_cpu, plan.sets)


class Decoder(nn.Module):
    """Adaptors, layers and the final norm over packed target tokens."""

    def __init__(self, config: OFAConfig, embed_tokens: nn.Embedding, backend: str) -> None:
        super().__init__()
        self.config = config
        self.backend = backend
        self.adaptor = AdaptorGroup(config, source=False, embed_tokens=embed_tokens)
        factored = not config.entangle_position_embedding
        self.cross_pos_q_linear = Linear(config.dim, config.dim) if factored else None
        self.cross_pos_k_linear = Linear(config.dim, config.dim) if factored else None
        rates = _rates(config.decoder_drop_path, config.decoder_layers)
        self.decoder_prompt_encoder = _prompt(config, config.decoder_prefix, config.decoder_layers)
        self.layers = nn.ModuleList(DecoderLayer(config.layer(rate)) for rate in rates)
        self.layer_norm = nn.LayerNorm(config.dim) if config.normalize_before else None

    def decoder_layers(self) -> list[DecoderLayer]:
        return [layer for layer in self.layers if isinstance(layer, DecoderLayer)]

    def cross_layout(
        self, side: PackedSide, source_lengths: tuple[int, ...], source_sets: PositionSets | None = None
    ) -> AttentionLayout:
        """Of cross attention; kept in the target side's cache."""
        sets = self.adaptor.plan(side).sets if self.cross_pos_q_linear is not None else None
        numbers = None if sets is None or source_sets is None else (sets.numbers, source_sets.numbers)
        key = ("cross", source_lengths, numbers)
        layout = side.cache.get(key)
        if not isinstance(layout, AttentionLayout):
            layout = plan_cross(side, source_lengths, sets, source_sets)
            side.cache[key] = layout
        return layout

    def cross_queries(self, positions: Tensor) -> Tensor | None:
        """q_pos of cross attention `[Nt, H, P]`."""
        return self._split(self.cross_pos_q_linear, positions)

    def cross_keys(self, positions: Tensor) -> Tensor | None:
        """k_pos of cross attention `[Ns, H, P]`, the same for all layers and steps."""
        return self._split(self.cross_pos_k_linear, positions)

    def forward(self, side: PackedSide, memory: Memory) -> Tensor:
        x, positions = self.adaptor(side)
        plan = self.adaptor.plan(side)
        q_pos, k_pos = self.adaptor.factored(plan.factored_rows(positions))
        prefixes, prefix_layout = prefixes_of(self.decoder_prompt_encoder, side.tokens, len(self.layers), x.device)
        own = Positions(plan.layout, q_pos, k_pos, self.backend, prefix_layout)
        cross = self._cross(side, positions, memory)
        samples = dropped_together(side, self.config.compat)
        tables = self.adaptor.tables(plan.blocks, plan.second_blocks)
        for layer, own_tables, prefix in zip(self.decoder_layers(), tables, prefixes, strict=True):
            call = partial(_decoder_layer, layer, own, cross, memory.states, samples, plan.routing, prefix)
            x = run_layer(self, call, x, tables=own_tables)
        return self.finish(x)

    def _cross(self, side: PackedSide, positions: Tensor, memory: Memory) -> Positions:
        layout, sources = self.cross_layout(side, memory.lengths, memory.sets), memory.positions
        if layout.shared is not None and memory.sets is not None:
            positions, sources = self.adaptor.plan(side).factored_rows(positions), memory.sets.take(sources)
        k_pos = self._split(self.cross_pos_k_linear, sources)
        return Positions(layout, self.cross_queries(positions), k_pos, self.backend)

    def finish(self, x: Tensor) -> Tensor:
        y: Tensor = x if self.layer_norm is None else self.layer_norm(x)
        return y

    def _split(self, linear: nn.Linear | None, positions: Tensor) -> Tensor | None:
        return None if linear is None else split_heads(linear(positions), self.config.heads)


def dropped_together(side: PackedSide, compat: str) -> Samples:
    """What drop path drops as one: a sample's tokens. OFA's Hugging Face port drops a place in all samples."""
    if compat != "ofa_hf":
        return Samples(side.sample_id, side.samples)
    place = torch.arange(side.tokens, device=side.device) - side.offsets.long()[side.sample_id.long()]
    return Samples(place, max(side.lengths_cpu, default=0))


def prefixes_of(
    prompt: PromptEncoder | None, queries: int, layers: int, device: torch.device
) -> tuple[Sequence[tuple[Tensor, Tensor] | None], AttentionLayout | None]:
    """Per layer its prefix (None without any), and the layout by which every one of `queries` tokens sees all of it."""
    if prompt is None:
        return [None] * layers, None
    return prompt(), AttentionLayout.even(1, queries, prompt.length, device)


def _prompt(config: OFAConfig, length: int, layers: int) -> PromptEncoder | None:
    return PromptEncoder(length, layers, config.dim, config.heads, config.prefix_dim) if length else None


def run_layer(stack: Encoder | Decoder, call: Callable[..., Any], x: Tensor, **kwargs: Any) -> Tensor:
    """Runs a layer, recomputing its activations in the backward pass where the config asks for it."""
    if stack.config.checkpoint_activations and stack.training and torch.is_grad_enabled():
        y: Tensor = checkpoint(call, x, use_reentrant=False, **kwargs)
    else:
        y = call(x, **kwargs)
    return y


def _decoder_layer(
    layer: DecoderLayer,
    own: Positions,
    cross: Positions,
    source: Tensor,
    samples: Samples,
    routing: Routing | None,
    prefix: tuple[Tensor, Tensor] | None,
    x: Tensor,
    tables: tuple[Tensor, ...],
) -> Tensor:
    source_keys = layer.encoder_attn.keys_values(source)
    y: Tensor = layer(x, own, cross, source_keys, tables, samples=samples, routing=routing, prefix=prefix)
    return y


def _rates(last: float, layers: int) -> list[float]:
    """Drop-path rates rise linearly from 0 to the last layer's."""
    return [last * layer / max(layers - 1, 1) for layer in range(layers)]
