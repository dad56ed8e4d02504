"""OFA's Hugging Face port: its encoder and decoder hand positions to their layers, where the port hands on `[B*H,T,S]`.

The bias is made by the stack and read by its layers, so a stack is replaced with all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ofakern.errors import OfakernValueError
from ofakern.nn import OFADecoderLayer, OFAEncoderLayer, OFAPositions, PositionBias
from ofakern.nn.dropin import DropIn
from ofakern.patching.around import Around, each_replaced

_TABLES = ("token_bucket_size", "token_rel_pos_table_list", "token_rp_bucket")


class _Stack(Around):
    """A stack whose layers are drop-in layers."""

    layer_class: ClassVar[type[DropIn]]

    layers: Sequence[nn.Module]
    num_attention_heads: int
    pos_scaling: float
    token_bucket_size: int
    token_rp_bucket: Tensor
    token_rel_pos_table_list: Sequence[nn.Embedding]

    @classmethod
    def refusal(cls, module: Any) -> str | None:
        for layer in module.layers:
            cls.layer_class.replacing(layer)  # raises with the layer's own reason
        return None

    def adopt(self) -> None:
        self.hold(layers=each_replaced(self.layers, self.layer_class))

    def projected(self, linear: nn.Module, positions: Tensor) -> Tensor:
        """`[B,T,D]` to `[B,T,H,P]`."""
        out: Tensor = linear(positions)
        return out.view(*out.shape[:-1], self.num_attention_heads, -1)

    def query_positions(self, linear: nn.Module, positions: Tensor, scale: float) -> Tensor:
        """As `projected`; the attention applies its own scale to this product where the port applies pos_scaling."""
        out = self.projected(linear, positions)
        return out if scale == self.pos_scaling else out * (self.pos_scaling / scale)


class OFAEncoder(_Stack):
    """The port's OFAEncoder. Two images, sampled patches and output_attentions raise."""

    replaced_names = ("OFAEncoder",)
    needed = (*_TABLES, "layers", "image_rel_pos_table_list", "pos_q_linear", "pos_k_linear", "get_patch_images_info")
    layer_class = OFAEncoderLayer

    def forward(
        self,
        input_ids: Tensor,
        patch_images: Tensor | None = None,
        patch_images_2: Tensor | None = None,
        patch_masks: Tensor | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        token_embeddings: Tensor | None = None,
        sample_patch_num: int | None = None,
    ) -> Any:
        """As the port's: input_ids `[B,T]`, patch_images `[B,3,H,W]`, patch_masks `[B]` bool; its OFAEncoderOutput."""
        _refuse(
            "OFAEncoder",
            output_attentions=bool(output_attentions),
            patch_images_2=patch_images_2 is not None,
            sample_patch_num=sample_patch_num is not None,
        )
        this: Any = self
        padding = input_ids.eq(this.padding_idx)
        places = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        text_positions = this.embed_positions(places)
        image_embed = image_positions = grid = None
        if patch_images is not None:
            image_embed, _, image_padding, ids, image_positions = this.get_patch_images_info(
                patch_images, None, input_ids.device
            )
            image_padding[~patch_masks] = True  # type: ignore[operator]
            padding = torch.cat([image_padding, padding], dim=1)
            grid = _grid(ids, this.image_bucket_size)
        x, _ = this.forward_embedding(
            input_ids, image_embed, None, token_embeddings, text_positions, image_positions, None
        )
        seen = None
        if bool(padding.any()):
            x = x * (1 - padding.unsqueeze(-1).type_as(x))
            seen = ~padding[:, None, None]
        positions = this.pos_ln(text_positions)
        if image_positions is not None:
            positions = torch.cat([this.image_pos_ln(image_positions), positions], dim=1)
        bias, layout = self._bias(positions, input_ids.shape[1], grid)
        states: tuple[Tensor, ...] | None = () if output_hidden_states else None
        for index, layer in enumerate(self.layers):
            states = None if states is None else (*states, x)
            weights = [self.token_rel_pos_table_list[index].weight]
            if grid is not None:
                weights.append(this.image_rel_pos_table_list[index].weight)
            x = layer(x, seen, attn_bias=replace(bias, tables=(layout.table(*weights),)))[0]
        states = None if states is None else (*states, x)
        x = x if this.layer_norm is None else this.layer_norm(x)
        return self.named_there("OFAEncoderOutput")(
            **{"last_hidden_state": x, "padding_mask": padding, "hidden_states": states, "attentions": None},
            position_embedding=positions,
        )

    def _bias(self, positions: Tensor, text: int, grid: tuple[int, int] | None) -> tuple[PositionBias, OFAPositions]:
        this: Any = self
        layout = OFAPositions.encoder(
            text,
            grid,
            token_bucket_size=self.token_bucket_size,
            image_bucket_size=this.image_bucket_size,
            max_position=self.token_rp_bucket.shape[0],
        )
        q_pos = self.query_positions(this.pos_q_linear, positions, this.layers[0].self_attn.scaling)
        return PositionBias(q_pos, self.projected(this.pos_k_linear, positions), given=layout.given), layout


class OFADecoder(_Stack):
    """The port's OFADecoder. Image codes in the decoder (code_masks) and output_attentions raise."""

    replaced_names = ("OFADecoder",)
    needed = (*_TABLES, "layers", "self_pos_q_linear", "self_pos_k_linear", "cross_pos_q_linear", "cross_pos_k_linear")
    layer_class = OFADecoderLayer

    @classmethod
    def refusal(cls, module: Any) -> str | None:
        if module.entangle_position_embedding:
            return "entangle_position_embedding must be off in the decoder (the port itself cannot run it), got on"
        return super().refusal(module)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        code_masks: Tensor | None = None,
        src_pos_embed: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
    ) -> Any:
        """As the port's: input_ids `[B,T]`, encoder_attention_mask `[B,1,T,S]` additive, src_pos_embed `[B,S,D]`."""
        _refuse(
            "OFADecoder",
            output_attentions=bool(output_attentions),
            code_masks=code_masks is not None and bool(code_masks.any()),
        )
        this: Any = self
        past = past_key_values is not None and len(past_key_values) > 0
        kept = past_key_values[0][0].shape[2] if past else 0
        length = kept + 1 if past else input_ids.shape[1]
        own, cross, layout = self._biases(input_ids, length, src_pos_embed)
        if past:
            input_ids, own, cross = input_ids[:, -1:], own.last(), cross.last()
        x = this.embed_scale * this.embed_tokens(input_ids)
        x = this.dropout(x if this.layernorm_embedding is None else this.layernorm_embedding(x))
        mask = this._prepare_decoder_attention_mask(attention_mask, input_ids.shape, x.dtype, kept)
        states: tuple[Tensor, ...] | None = () if output_hidden_states else None
        caches: tuple[Any, ...] | None = () if use_cache else None
        for index, layer in enumerate(self.layers):
            states = None if states is None else (*states, x)
            outputs = layer(
                x,
                attention_mask=mask,
                encoder_hidden_states=encoder_hidden_states,
                encoder_attention_mask=encoder_attention_mask,
                past_key_value=past_key_values[index] if past else None,
                use_cache=use_cache,
                self_attn_bias=replace(own, tables=(layout.table(self.token_rel_pos_table_list[index].weight),)),
                cross_attn_bias=cross,
            )
            x = outputs[0]
            caches = None if caches is None else (*caches, outputs[1])
        states = None if states is None else (*states, x)
        x = x if this.layer_norm is None else this.layer_norm(x)
        x = x if this.output_projection is None else this.output_projection(x)
        return self.named_there("BaseModelOutputWithPastAndCrossAttentions")(
            **{"last_hidden_state": x, "past_key_values": caches, "hidden_states": states},
            **{"attentions": None, "cross_attentions": None},
        )

    def _biases(
        self, input_ids: Tensor, length: int, source: Tensor | None
    ) -> tuple[PositionBias, PositionBias, OFAPositions]:
        """Of self and cross attention, for the whole sequence."""
        this: Any = self
        places = torch.arange(length, device=input_ids.device).expand(input_ids.shape[0], length)
        target = this.pos_ln(this.embed_positions(places))
        layout = OFAPositions.decoder(
            length, token_bucket_size=self.token_bucket_size, max_position=self.token_rp_bucket.shape[0]
        )
        scale = this.layers[0].self_attn.scaling
        own = PositionBias(
            self.query_positions(this.self_pos_q_linear, target, scale),
            self.projected(this.self_pos_k_linear, target),
            given=layout.given,
        )
        source = target if source is None else source
        cross = PositionBias(
            self.query_positions(this.cross_pos_q_linear, target, scale),
            self.projected(this.cross_pos_k_linear, source),
        )
        return own, cross, layout


def _grid(ids: Tensor, bucket_size: int) -> tuple[int, int]:
    """Rows and columns of an image's patches from their position ids `[B,N]`, row * bucket_size + column + 1."""
    last = int(ids[0, -1]) - 1
    return last // bucket_size + 1, last % bucket_size + 1


def _refuse(where: str, **asked: bool) -> None:
    for name, given in asked.items():
        if given:
            raise OfakernValueError(
                f"{where}: {name} must not be given while the model is patched, got it\n"
                "Try: report.undo(), then run the original model."
            )
