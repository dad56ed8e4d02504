"""A small model with the class names, attributes, state-dict keys and arithmetic of OFASys's GeneralistModel.

OFASys's own code cannot be here. This is our reading of it, without what patch does not touch (the ResNet is a
convolution, slots are plain objects). Layers are those of tests/nn/ofa_replicas.py. Dense biases are formed where
OFASys forms them.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.nn import ofa_replicas
from tests.patching.ofa_port import image_buckets, token_buckets

PAD = 1


@dataclass
class Slot:
    kind: str
    value: Tensor
    is_src: bool = True


@dataclass
class AdaptorOutput:
    embed: Tensor
    masks: Tensor
    pos_embed: Tensor
    self_attn_bias: Any
    modal_mask: Any = None

    @property
    def seq_length(self) -> int:
        return self.embed.shape[1]


def config(dim: int = 32, heads: int = 4, layers: int = 2, **options: Any) -> Any:
    cfg = ofa_replicas.ofasys_config(dim, heads)
    cfg.encoder.layers = cfg.decoder.layers = layers
    for name in ("embed_dim", "attention_heads", "layers"):
        setattr(cfg, f"encoder_{name}", getattr(cfg.encoder, name))
        setattr(cfg, f"decoder_{name}", getattr(cfg.decoder, name))
    defaults = {"use_self_attn_bias": True, "share_attn_bias": False, "entangle_position_embedding": False}
    for name, value in (
        defaults | {"image_bucket_size": 6, "token_bucket_size": 8, "vocabulary": 50, "max_positions": 64} | options
    ).items():
        setattr(cfg, name, value)
    return cfg


class TransformerEncoderLayer(ofa_replicas.TransformerEncoderLayer):
    def forward(
        self, x, encoder_padding_mask, attn_mask=None, self_attn_bias=None, need_attn=False, modal_mask=None
    ) -> Any:
        return super().forward(x, encoder_padding_mask, self_attn_bias)


class TransformerDecoderLayer(ofa_replicas.TransformerDecoderLayer):
    def forward(
        self,
        x,
        encoder_out=None,
        encoder_padding_mask=None,
        incremental_state=None,
        self_attn_mask=None,
        self_attn_padding_mask=None,
        need_attn=False,
        need_head_weights=False,
        self_attn_bias=None,
        cross_attn_bias=None,
        modal_mask=None,
    ) -> Any:
        assert incremental_state is None, "the replica has no cache of its own"
        return super().forward(
            *(x, encoder_out, encoder_padding_mask, self_attn_mask, self_attn_padding_mask),
            self_attn_bias=self_attn_bias,
            cross_attn_bias=cross_attn_bias,
        )


class BaseAdaptor(nn.Module):
    def __init__(self, embed_tokens: nn.Embedding, is_src: bool, cfg: Any) -> None:
        super().__init__()
        self._embedding = [embed_tokens]  # no submodule; OFASys hides it in lambdas, which would not be copied here
        self.is_src, self.cfg = is_src, cfg
        self.num_layers = cfg.encoder_layers if is_src else cfg.decoder_layers
        dim = cfg.encoder_embed_dim
        self.dropout_module = nn.Dropout(cfg.dropout)
        self.layernorm_embedding, self.layernorm_position = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.type_embedding = nn.Embedding(1, dim)
        self.register_forward_hook(BaseAdaptor.forward_hook_fn)

    def embed_tokens(self, x: Tensor) -> Tensor:
        return self._embedding[0](x)

    def embed_tokens_T(self, x: Tensor) -> Tensor:
        return F.linear(x, self._embedding[0].weight)

    def forward_hook_fn(self, inputs: Any, output: AdaptorOutput) -> AdaptorOutput:
        embed = output.embed
        if inputs[0].is_src:
            embed = embed + self.type_embedding.weight.squeeze()
        output.embed = self.dropout_module(self.layernorm_embedding(embed))
        output.pos_embed = self.layernorm_position(output.pos_embed)
        if not output.self_attn_bias and self.cfg.use_self_attn_bias:
            batch, length = output.embed.shape[:2]
            output.self_attn_bias = [
                self.expand_rel_pos_bias(self.get_rel_pos_bias(batch, length, idx), batch)
                for idx in range(1 if self.cfg.share_attn_bias else self.num_layers)
            ]
        return output

    def expand_rel_pos_bias(self, values: Tensor, batch_size: int) -> Tensor:
        return values.unsqueeze(0).expand(batch_size, -1, -1, -1).permute(0, 3, 1, 2)


class TextAdaptor(BaseAdaptor):
    def __init__(self, embed_tokens: nn.Embedding, is_src: bool, cfg: Any) -> None:
        super().__init__(embed_tokens, is_src, cfg)
        self.embed_positions = nn.Embedding(cfg.max_positions + 2, cfg.encoder_embed_dim)
        count = 1 if cfg.share_attn_bias else self.num_layers
        self.token_rel_pos_table_list = nn.ModuleList(
            nn.Embedding(2 * cfg.token_bucket_size - 1, cfg.encoder_attention_heads) for _ in range(count)
        )
        self.register_buffer("token_rp_bucket", token_buckets(cfg.token_bucket_size, cfg.max_positions))

    def get_rel_pos_bias(self, batch_size: int, seq_length: int, idx: int, **kwargs: Any) -> Tensor:
        bucket = self.token_rp_bucket[:seq_length, :seq_length]
        return F.embedding(bucket, self.token_rel_pos_table_list[idx].weight)

    def forward(self, slot: Slot) -> AdaptorOutput:
        places = torch.arange(slot.value.shape[1]).expand_as(slot.value)
        return AdaptorOutput(self.embed_tokens(slot.value), slot.value.eq(PAD), self.embed_positions(places), [])

    def forward_output(self, x: Tensor, extra: Any, slot: Slot) -> Any:
        return self.embed_tokens_T(x), extra


class ImageResnetAdaptor(BaseAdaptor):
    def __init__(self, embed_tokens: nn.Embedding, is_src: bool, cfg: Any) -> None:
        super().__init__(embed_tokens, is_src, cfg)
        dim, bucket = cfg.encoder_embed_dim, cfg.image_bucket_size
        rows = (2 * bucket - 1) ** 2 + 3
        self.embed_image_positions = nn.Embedding(bucket**2 + 1, dim)
        self.embed_images, self.image_proj = nn.Conv2d(3, 24, 16, 16), nn.Linear(24, dim)
        count = 1 if cfg.share_attn_bias else self.num_layers
        self.image_rel_pos_table_list = nn.ModuleList(
            nn.Embedding(rows, cfg.encoder_attention_heads) for _ in range(count)
        )
        self.register_buffer("image_rp_bucket", image_buckets(bucket, rows))

    def get_rel_pos_bias(self, batch_size: int, seq_length: int, idx: int, **kwargs: Any) -> Tensor:
        ids = kwargs["image_position_ids"]
        bucket = self.image_rp_bucket[ids[:, :, None], ids[:, None]]
        return F.embedding(bucket, self.image_rel_pos_table_list[idx].weight).permute(0, 3, 1, 2)

    def forward(self, slot: Slot) -> AdaptorOutput:
        image = self.embed_images(slot.value)
        h, w = image.shape[-2:]
        places = (torch.arange(w)[None] + torch.arange(h)[:, None] * self.cfg.image_bucket_size + 1).view(-1)
        ids = places[None].expand(image.shape[0], h * w)
        embed = self.image_proj(image.flatten(2).transpose(1, 2))
        count = 1 if self.cfg.share_attn_bias else self.num_layers
        bias = [
            self.get_rel_pos_bias(embed.shape[0], h * w, idx, image_position_ids=ids)
            for idx in range(count if self.cfg.use_self_attn_bias else 0)
        ]
        return AdaptorOutput(embed, torch.zeros_like(ids, dtype=torch.bool), self.embed_image_positions(ids), bias)


class OFAGeneralAdaptor(nn.Module):
    def __init__(self, cfg: Any, embed_tokens: nn.Embedding, is_src: bool) -> None:
        super().__init__()
        self.cfg, self.is_src = cfg, is_src
        self.name2adaptor = {"text": TextAdaptor(embed_tokens, is_src, cfg)}
        if is_src:
            self.name2adaptor["image_resnet"] = ImageResnetAdaptor(embed_tokens, is_src, cfg)
        for name, adaptor in self.name2adaptor.items():
            setattr(self, name, adaptor)
        dim = cfg.encoder_embed_dim
        self.num_attention_heads = cfg.encoder_attention_heads if is_src else cfg.decoder_attention_heads
        self.pos_scaling = float(dim / cfg.encoder_attention_heads * cfg.attn_scale_factor) ** -0.5
        self.pos_q_linear, self.pos_k_linear = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, slots: list[Slot]) -> Any:
        output = self.concat([self.name2adaptor[slot.kind](slot) for slot in slots])
        return output.embed, output.masks, output.pos_embed, output.self_attn_bias, [None] * len(slots)

    def forward_output(self, x: Tensor, extra: Any, slots: list[Slot]) -> Any:
        (slot,) = (slot for slot in slots if not slot.is_src)
        return self.name2adaptor[slot.kind].forward_output(x, extra, slot=slot)

    def build_abs_pos_bias(self, pos_embed: Tensor) -> Tensor:
        shape = (*pos_embed.shape[:2], self.num_attention_heads, -1)
        q = self.pos_q_linear(pos_embed).view(shape).transpose(1, 2) * self.pos_scaling
        return q @ self.pos_k_linear(pos_embed).view(shape).permute(0, 2, 3, 1)

    def concat(self, modality_outputs: list[AdaptorOutput]) -> AdaptorOutput:
        parts = [torch.cat([getattr(o, name) for o in modality_outputs], 1) for name in ("embed", "masks", "pos_embed")]
        output = AdaptorOutput(*parts, None)
        if not self.cfg.use_self_attn_bias:
            return output
        output.self_attn_bias = []
        absolute = self.build_abs_pos_bias(output.pos_embed)
        for idx in range(1 if self.cfg.share_attn_bias else self.cfg.encoder.layers):
            bias, start = absolute.clone(), 0
            for part in modality_outputs:
                end = start + part.seq_length
                bias[:, :, start:end, start:end] += part.self_attn_bias[idx]
                start = end
            output.self_attn_bias.append(bias)
        return output


class TransformerEncoder(nn.Module):
    def __init__(self, cfg: Any, embed_tokens: nn.Embedding) -> None:
        super().__init__()
        self.cfg = cfg
        self.adaptor = OFAGeneralAdaptor(cfg, embed_tokens, True)
        self.layers = nn.ModuleList(TransformerEncoderLayer(cfg) for _ in range(cfg.encoder_layers))
        self.layer_norm = nn.LayerNorm(cfg.encoder_embed_dim)
        self.register_buffer("version", torch.Tensor([3]))

    def forward(self, slots: list[Slot], return_all_attention_weights: bool = False) -> dict[str, list[Tensor]]:
        output = AdaptorOutput(*self.adaptor(slots))
        has_pad = output.masks.any()
        x = output.embed.transpose(0, 1)
        if has_pad:
            x = (output.embed * (1 - output.masks.unsqueeze(-1).type_as(output.embed))).transpose(0, 1)
        for idx, layer in enumerate(self.layers):
            bias = None
            if self.cfg.use_self_attn_bias:
                bias = output.self_attn_bias[0 if self.cfg.share_attn_bias else idx].view(-1, x.size(0), x.size(0))
            x, _ = layer(
                x,
                encoder_padding_mask=output.masks if has_pad else None,
                self_attn_bias=bias,
                need_attn=return_all_attention_weights,
                modal_mask=output.modal_mask,
            )
        fields = {"encoder_out": self.layer_norm(x), "encoder_padding_mask": output.masks}
        return {name: [x] for name, x in (fields | {"position_embeddings": output.pos_embed}).items()}


class TransformerDecoder(nn.Module):
    def __init__(self, cfg: Any, embed_tokens: nn.Embedding) -> None:
        super().__init__()
        self.cfg = cfg
        self.adaptor = OFAGeneralAdaptor(cfg, embed_tokens, False)
        dim = cfg.decoder_embed_dim
        self.num_attention_heads = cfg.decoder_attention_heads
        self.cross_pos_q_linear, self.cross_pos_k_linear = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.layers = nn.ModuleList(TransformerDecoderLayer(cfg) for _ in range(cfg.decoder_layers))
        self.num_layers = len(self.layers)
        self.layer_norm = nn.LayerNorm(dim)
        self.register_buffer("version", torch.Tensor([3]))

    def get_cross_pos_info(self, embed: Tensor, tgt_pos_embed: Tensor, src_pos_embed: Tensor) -> Tensor:
        shape = (embed.size(0), -1, self.num_attention_heads, tgt_pos_embed.size(2) // self.num_attention_heads)
        q = self.cross_pos_q_linear(tgt_pos_embed).view(shape).transpose(1, 2) * self.adaptor.pos_scaling
        return q @ self.cross_pos_k_linear(src_pos_embed).view(shape).permute(0, 2, 3, 1)

    def forward(self, slots, encoder_out=None, incremental_state=None, return_all_attention_weights=False):
        x, extra = self.extract_features(
            slots,
            encoder_out=encoder_out,
            incremental_state=incremental_state,
            alignment_layer=None,
            alignment_heads=None,
            return_all_attention_weights=return_all_attention_weights,
        )
        return self.adaptor.forward_output(x, extra, slots)

    def extract_features(
        self,
        slots,
        encoder_out,
        incremental_state=None,
        alignment_layer=None,
        alignment_heads=None,
        return_all_attention_weights=False,
    ):
        output = AdaptorOutput(*self.adaptor(slots))
        alignment_layer = self.num_layers - 1 if alignment_layer is None else alignment_layer
        memory, padding = encoder_out["encoder_out"][0], encoder_out["encoder_padding_mask"][0]
        cross = self.get_cross_pos_info(
            output.embed, output.pos_embed, src_pos_embed=encoder_out["position_embeddings"][0]
        )
        cross = cross.reshape(-1, *cross.size()[-2:])
        embed, own_padding = output.embed, output.masks
        if incremental_state is not None:
            embed, cross, own_padding = embed[:, -1:], cross[:, -1:, :], own_padding[:, -1:]
        x = embed.transpose(0, 1)
        for idx, layer in enumerate(self.layers):
            future = None
            if incremental_state is None:
                future = torch.full((x.size(0), x.size(0)), -torch.inf, dtype=x.dtype).triu(1)
            bias = output.self_attn_bias[0 if self.cfg.share_attn_bias else idx]
            bias = bias.view(-1, *bias.size()[-2:])
            if incremental_state is not None:
                bias = bias[:, -1:, :]
            x, attn, _ = layer(
                *(x, memory, padding, incremental_state),
                self_attn_mask=future,
                self_attn_padding_mask=own_padding,
                need_attn=bool((idx == alignment_layer) or return_all_attention_weights),
                need_head_weights=bool(idx == alignment_layer),
                self_attn_bias=bias,
                cross_attn_bias=cross,
                modal_mask=output.modal_mask,
            )
        return self.layer_norm(x).transpose(0, 1), {"attn": [attn]}


class GeneralistModel(nn.Module):
    def __init__(self, cfg: Any = None) -> None:
        super().__init__()
        self.cfg = SimpleNamespace(**vars(cfg or config()))
        embed_tokens = nn.Embedding(self.cfg.vocabulary, self.cfg.encoder_embed_dim, PAD)
        self.encoder = TransformerEncoder(self.cfg, embed_tokens)
        self.decoder = TransformerDecoder(self.cfg, embed_tokens)
        self.embed_tokens = embed_tokens

    def forward(self, slots: list[Slot], **options: Any) -> Any:
        memory = self.encoder([slot for slot in slots if slot.is_src], **options)
        return self.decoder([slot for slot in slots if not slot.is_src], encoder_out=memory)
