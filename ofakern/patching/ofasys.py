"""OFASys's GeneralistModel: adaptors that hand on tables and positions, where OFASys hands on `[B,H,T,T]` per layer.

The bias starts in the slots' adaptors, is put together by the general adaptor and is read by the layers; all of a
side are replaced together. Text and ResNet-image slots have tables; other adaptors' dense biases raise.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Self

import torch
from torch import Tensor, nn

from ofakern.errors import OfakernValueError
from ofakern.nn import OFASysDecoderLayer, OFASysEncoderLayer, PositionBias
from ofakern.nn.dropin import DropIn
from ofakern.nn.dropin.layouts import Given
from ofakern.nn.relative import RelativeBlock, grid_block, grid_coordinates, text_block, unfold
from ofakern.ops.attention import RelativeTerm
from ofakern.patching.around import Around, each_replaced


@dataclass(frozen=True)
class SlotPlaces:
    """Where a slot's tokens stand: "text" (length, bucket_size, max_position), "grid" (rows, columns, bucket_size)."""

    kind: str
    sizes: tuple[int, int, int]

    @property
    def length(self) -> int:
        return self.sizes[0] if self.kind == "text" else self.sizes[0] * self.sizes[1]

    def block(self) -> RelativeBlock:
        return text_block(*self.sizes) if self.kind == "text" else grid_block(*self.sizes)

    def coordinates(self) -> Tensor:
        return torch.arange(self.sizes[0]) if self.kind == "text" else grid_coordinates(*self.sizes[:2])


@dataclass(frozen=True)
class SlotBias:
    """A slot's relative bias in one layer: where its tokens stand, and the parameter `[P,H]`."""

    places: SlotPlaces
    weight: Tensor


@dataclass(frozen=True, eq=False)
class SequenceBias(PositionBias):
    """A side's bias in one layer, with what OFASys's code does to a dense one: reshape it, take its last query."""

    sizes: tuple[int, int, int, int] = (0, 0, 0, 0)

    def size(self) -> torch.Size:
        return torch.Size(self.sizes)

    def view(self, *shape: int) -> Self:
        if len(shape) != 3 or shape[1:] != self.sizes[2:]:
            raise OfakernValueError(f"SequenceBias: shape must be [B*H,{self.sizes[2]},{self.sizes[3]}], got {shape}")
        return self

    reshape = view

    def __getitem__(self, key: Any) -> SequenceBias:
        if key != (slice(None), slice(-1, None), slice(None)):
            raise OfakernValueError(f"SequenceBias: the index must be [:, -1:, :], got {key}")
        q_pos = None if self.q_pos is None else self.q_pos[:, -1:]
        given = None if self.given is None else _last(self.given)
        return replace(self, q_pos=q_pos, given=given, sizes=(*self.sizes[:2], 1, self.sizes[3]))


@lru_cache(maxsize=64)
def _last(given: Given) -> Given:
    """The last query's coordinates: one object for all layers of a step, so that they share a layout."""
    return Given(tuple(replace(term, q_coord=term.q_coord[-1:], same=term.same[-1:]) for term in given.given))


@lru_cache(maxsize=64)
def _sequence(slots: tuple[SlotPlaces, ...], device: torch.device) -> tuple[Given, tuple[RelativeBlock, ...]]:
    blocks = [slot.block() for slot in slots]
    q_coord, k_coord, same, base, start = [], [], [], 0, 0
    for slot, block in zip(slots, blocks, strict=True):
        places = slot.coordinates()
        q_coord.append(places + block.origin(base))
        k_coord.append(places)
        same.append(torch.tensor([[start, start + slot.length]]).expand(slot.length, 2))
        base, start = base + block.rows, start + slot.length
    queries, keys, inside = (torch.cat(part).to(torch.int32) for part in (q_coord, k_coord, same))
    return Given((RelativeTerm(queries, keys, inside, base),)), tuple(block.to(device) for block in blocks)


class TextAdaptor(Around):
    """OFASys's TextAdaptor; its relative bias is a `SlotBias`."""

    replaced_names = ("TextAdaptor",)
    needed = ("token_rel_pos_table_list", "token_rp_bucket")

    def get_rel_pos_bias(self, batch_size: int, seq_length: int, idx: int, **kwargs: Any) -> SlotBias:
        this: Any = self
        weight = this.token_rel_pos_table_list[idx].weight
        bucket = (weight.shape[0] + 1) // 2
        return SlotBias(SlotPlaces("text", (seq_length, bucket, this.token_rp_bucket.shape[0])), weight)

    def expand_rel_pos_bias(self, values: SlotBias, batch_size: int) -> SlotBias:
        return values


class ImageResnetAdaptor(Around):
    """OFASys's ImageResnetAdaptor; its relative bias is a `SlotBias`."""

    replaced_names = ("ImageResnetAdaptor",)
    needed = ("image_rel_pos_table_list", "image_rp_bucket", "cfg")

    def get_rel_pos_bias(
        self, batch_size: int, seq_length: int, idx: int, *, image_position_ids: Tensor, **kwargs: Any
    ) -> SlotBias:
        this: Any = self
        bucket = this.cfg.image_bucket_size
        last = int(image_position_ids[0, -1]) - 1
        grid = (last // bucket + 1, last % bucket + 1, bucket)
        return SlotBias(SlotPlaces("grid", grid), this.image_rel_pos_table_list[idx].weight)


_SLOT_ADAPTORS: tuple[type[Around], ...] = (TextAdaptor, ImageResnetAdaptor)


class OFAGeneralAdaptor(Around):
    """OFASys's OFAGeneralAdaptor; the biases it hands on are `SequenceBias`es."""

    replaced_names = ("OFAGeneralAdaptor",)
    needed = ("cfg", "is_src", "name2adaptor", "num_attention_heads", "pos_scaling")

    def adopt(self) -> None:
        this: Any = self
        known = {name: layer for layer in _SLOT_ADAPTORS for name in layer.replaced_names}
        made: dict[str, nn.Module] = {}
        for name, adaptor in this.name2adaptor.items():
            layer = known.get(type(adaptor).__name__)
            made[name] = adaptor if layer is None else layer.replacing(adaptor)
        this.name2adaptor = made
        self.hold(**made)

    def concat(self, modality_outputs: list[Any]) -> Any:
        """As OFASys's: the slots' embeddings, masks and positions end to end, and one bias per layer."""
        this: Any = self
        joined = [
            torch.cat([getattr(o, name) for o in modality_outputs], 1) for name in ("embed", "masks", "pos_embed")
        ]
        output = self.named_there("AdaptorOutput")(*joined, None)
        if this.cfg.use_self_attn_bias:
            layers = this.cfg.encoder.layers if this.is_src else this.cfg.decoder.layers
            count = 1 if this.cfg.share_attn_bias else layers
            slots = [[o.self_attn_bias[n] for o in modality_outputs] for n in range(count)]
            output.self_attn_bias = self._biases(output.pos_embed, slots)
        return output

    def _biases(self, positions: Tensor, layers: list[list[Any]]) -> list[SequenceBias]:
        this: Any = self
        batch, length, dim = positions.shape
        heads = this.num_attention_heads
        q_pos = k_pos = None
        if not this.cfg.entangle_position_embedding:
            # The attention's scale applies to this product too; OFASys's own scale of it counts the encoder's heads.
            ratio = this.pos_scaling * float(dim / heads * this.cfg.attn_scale_factor) ** 0.5
            q_pos = this.pos_q_linear(positions).view(batch, length, heads, -1) * ratio
            k_pos = this.pos_k_linear(positions).view(batch, length, heads, -1)
        whole = SequenceBias(q_pos, k_pos, sizes=(batch, heads, length, length))
        return [self._with_table(whole, slots, positions.device) for slots in layers]

    def _with_table(self, whole: SequenceBias, slots: list[Any], device: torch.device) -> SequenceBias:
        dense = [slot for slot in slots if not isinstance(slot, SlotBias)]
        if dense:
            raise OfakernValueError(
                "OFAGeneralAdaptor: every slot's adaptor must be text or image_resnet while the model is patched, got "
                f"another one's bias ({type(dense[0]).__name__})\nTry: report.undo(), then run the original model."
            )
        given, blocks = _sequence(tuple(slot.places for slot in slots), device)
        return replace(whole, tables=(unfold([slot.weight for slot in slots], blocks),), given=given)


class _Side(Around):
    """Layers and general adaptor of one side."""

    needed = ("adaptor", "layers", "cfg")
    layer_class: type[DropIn]

    @classmethod
    def refusal(cls, module: Any) -> str | None:
        OFAGeneralAdaptor.replacing(module.adaptor)  # these raise with their own reasons
        for layer in module.layers:
            cls.layer_class.replacing(layer)
        return None

    def adopt(self) -> None:
        this: Any = self
        adaptor = OFAGeneralAdaptor.replacing(this.adaptor)
        self.hold(adaptor=adaptor, layers=each_replaced(this.layers, self.layer_class))


class OFASysEncoder(_Side):
    """OFASys's TransformerEncoder. return_all_attention_weights raises."""

    replaced_names = ("TransformerEncoder",)
    layer_class = OFASysEncoderLayer


class OFASysDecoder(_Side):
    """OFASys's TransformerDecoder. Attention weights raise when asked for; `extra["attn"]` is `[None]`."""

    replaced_names = ("TransformerDecoder",)
    layer_class = OFASysDecoderLayer

    def get_cross_pos_info(self, embed: Tensor, tgt_pos_embed: Tensor, src_pos_embed: Tensor) -> SequenceBias:
        this: Any = self
        batch, queries, dim = tgt_pos_embed.shape
        heads = this.num_attention_heads
        ratio = this.adaptor.pos_scaling * float(dim / heads * this.cfg.attn_scale_factor) ** 0.5
        q_pos = this.cross_pos_q_linear(tgt_pos_embed).view(batch, queries, heads, -1) * ratio
        k_pos = this.cross_pos_k_linear(src_pos_embed).view(batch, src_pos_embed.shape[1], heads, -1)
        return SequenceBias(q_pos, k_pos, sizes=(batch, heads, queries, src_pos_embed.shape[1]))

    def extract_features(self, slots: Any, encoder_out: Any, *args: Any, **kwargs: Any) -> Any:
        """As OFASys's, but no layer is asked for its weights (the last one is, by default)."""
        for name in ("return_all_attention_weights", "alignment_layer", "alignment_heads"):
            if kwargs.get(name) not in (None, False):
                raise OfakernValueError(
                    f"OFASysDecoder: {name} must not be given while the model is patched, got {kwargs[name]}\n"
                    "Try: report.undo(), then run the original model."
                )
        own: Any = super()
        return own.extract_features(slots, encoder_out, *args, **kwargs | {"alignment_layer": -1})
