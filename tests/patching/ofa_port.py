"""A small model with the class names, attributes, state-dict keys and arithmetic of OFA's Hugging Face port.

The port's own code cannot be here. This is our reading of it, without what patch does not touch (the ResNet is a
convolution, there is no tokenizer). Dense biases `[B*H,T,S]` are formed exactly where the port forms them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class OFAConfig:
    vocab_size: int = 50
    d_model: int = 32
    encoder_layers: int = 2
    decoder_layers: int = 2
    encoder_attention_heads: int = 4
    decoder_attention_heads: int = 4
    encoder_ffn_dim: int = 48
    decoder_ffn_dim: int = 48
    max_position_embeddings: int = 64
    token_bucket_size: int = 8
    image_bucket_size: int = 6
    code_image_size: int = 16
    attn_scale_factor: float = 2.0
    pad_token_id: int = 1
    entangle_position_embedding: bool = False


@dataclass
class OFAEncoderOutput:
    last_hidden_state: Tensor
    padding_mask: Tensor
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    position_embedding: Tensor | None = None


@dataclass
class BaseModelOutputWithPastAndCrossAttentions:
    last_hidden_state: Tensor
    past_key_values: Any = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None


def token_buckets(size: int, max_position: int = 1024) -> Tensor:
    difference = torch.arange(max_position)[:, None] - torch.arange(max_position)
    middle = size // 2
    near = torch.where((difference < middle) & (difference > -middle), middle - 1, difference.abs())
    log = torch.ceil(torch.log(near / middle) / math.log((max_position - 1) / middle) * (middle - 1)) + middle
    return torch.where(near <= middle, difference, log.long() * difference.sign()) + size - 1


def image_buckets(size: int, rows: int) -> Tensor:
    places = torch.stack(torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")).flatten(1)
    apart = places[:, :, None] - places[:, None] + size - 1
    index = torch.zeros(size * size + 1, size * size + 1, dtype=torch.long)
    index[1:, 1:] = apart[0] * (2 * size - 1) + apart[1]
    index[0, :], index[:, 0], index[0, 0] = rows - 3, rows - 2, rows - 1
    return index


class OFAAttention(nn.Module):
    def __init__(self, embed_dim: int, num_heads: int, dropout: float = 0.0, is_decoder: bool = False) -> None:
        super().__init__()
        self.embed_dim, self.num_heads, self.dropout, self.is_decoder = embed_dim, num_heads, dropout, is_decoder
        self.head_dim = embed_dim // num_heads
        self.scaling = float(self.head_dim * 2) ** -0.5
        self.k_proj, self.v_proj, self.q_proj, self.out_proj = (nn.Linear(embed_dim, embed_dim) for _ in range(4))
        self.attn_dropout = nn.Dropout(p=dropout)
        self.c_attn = nn.Parameter(torch.rand(num_heads) + 0.5)

    def forward(
        self,
        hidden_states,
        key_value_states=None,
        past_key_value=None,
        attention_mask=None,
        output_attentions=False,
        attn_bias=None,
    ):
        batch, length, _ = hidden_states.shape

        def split(x: Tensor) -> Tensor:
            return x.view(batch, -1, self.num_heads, self.head_dim).transpose(1, 2)

        if key_value_states is not None and past_key_value is not None:
            key, value = past_key_value
        else:
            source = hidden_states if key_value_states is None else key_value_states
            key, value = split(self.k_proj(source)), split(self.v_proj(source))
            if past_key_value is not None:
                key, value = torch.cat([past_key_value[0], key], 2), torch.cat([past_key_value[1], value], 2)
        past_key_value = (key, value) if self.is_decoder else past_key_value
        scores = split(self.q_proj(hidden_states) * self.scaling) @ key.transpose(2, 3)
        if attn_bias is not None:
            scores = scores + attn_bias.view(batch, self.num_heads, length, -1)
        if attention_mask is not None:
            scores = scores + attention_mask
        weights = F.softmax(scores, dim=-1)
        out = torch.einsum("bhtk,h->bhtk", self.attn_dropout(weights) @ value, self.c_attn)
        out = self.out_proj(out.transpose(1, 2).reshape(batch, length, -1))
        return out, weights if output_attentions else None, past_key_value


class OFAEncoderLayer(nn.Module):
    def __init__(self, config: OFAConfig) -> None:
        super().__init__()
        dim = self.embed_dim = config.d_model
        self.self_attn = OFAAttention(dim, config.encoder_attention_heads)
        self.self_attn_layer_norm, self.self_attn_mid_layer_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.dropout, self.activation_dropout, self.activation_fn = nn.Dropout(0.1), nn.Dropout(0.0), nn.GELU()
        self.fc1, self.fc2 = nn.Linear(dim, config.encoder_ffn_dim), nn.Linear(config.encoder_ffn_dim, dim)
        self.ffn_layer_norm, self.final_layer_norm = nn.LayerNorm(config.encoder_ffn_dim), nn.LayerNorm(dim)
        self.drop_path = nn.Identity()
        self.normalize_before = True

    def residual_connection(self, x, residual):
        return residual + self.drop_path(x)

    def forward(self, hidden_states, attention_mask, output_attentions=False, attn_bias=None):
        x = self.self_attn_layer_norm(hidden_states)
        x, weights, _ = self.self_attn(
            x, attention_mask=attention_mask, output_attentions=output_attentions, attn_bias=attn_bias
        )
        hidden_states = self.residual_connection(self.dropout(self.self_attn_mid_layer_norm(x)), hidden_states)
        x = self.activation_dropout(self.activation_fn(self.fc1(self.final_layer_norm(hidden_states))))
        x = self.dropout(self.fc2(self.ffn_layer_norm(x)))
        outputs = (self.residual_connection(x, hidden_states),)
        return (*outputs, weights) if output_attentions else outputs


class OFADecoderLayer(nn.Module):
    def __init__(self, config: OFAConfig) -> None:
        super().__init__()
        dim = self.embed_dim = config.d_model
        self.self_attn = OFAAttention(dim, config.decoder_attention_heads, is_decoder=True)
        self.cross_attn = OFAAttention(dim, config.decoder_attention_heads, is_decoder=True)
        for name in ("self_attn", "cross_attn"):
            setattr(self, f"{name}_layer_norm", nn.LayerNorm(dim))
            setattr(self, f"{name}_mid_layer_norm", nn.LayerNorm(dim))
        self.dropout, self.activation_dropout, self.activation_fn = nn.Dropout(0.1), nn.Dropout(0.0), nn.GELU()
        self.fc1, self.fc2 = nn.Linear(dim, config.decoder_ffn_dim), nn.Linear(config.decoder_ffn_dim, dim)
        self.ffn_layer_norm, self.final_layer_norm = nn.LayerNorm(config.decoder_ffn_dim), nn.LayerNorm(dim)
        self.drop_path = nn.Identity()
        self.normalize_before = True

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        past_key_value=None,
        output_attentions=False,
        use_cache=False,
        self_attn_bias=None,
        cross_attn_bias=None,
    ):
        past_self = None if past_key_value is None else past_key_value[:2]
        x, weights, present = self.self_attn(
            self.self_attn_layer_norm(hidden_states),
            past_key_value=past_self,
            attention_mask=attention_mask,
            output_attentions=output_attentions,
            attn_bias=self_attn_bias,
        )
        hidden_states = hidden_states + self.drop_path(self.dropout(self.self_attn_mid_layer_norm(x)))
        past_cross = None if past_key_value is None else past_key_value[-2:]
        x, cross_weights, cross_present = self.cross_attn(
            self.cross_attn_layer_norm(hidden_states),
            key_value_states=encoder_hidden_states,
            past_key_value=past_cross,
            attention_mask=encoder_attention_mask,
            output_attentions=output_attentions,
            attn_bias=cross_attn_bias,
        )
        hidden_states = hidden_states + self.drop_path(self.dropout(self.cross_attn_mid_layer_norm(x)))
        x = self.activation_dropout(self.activation_fn(self.fc1(self.final_layer_norm(hidden_states))))
        hidden_states = hidden_states + self.drop_path(self.dropout(self.fc2(self.ffn_layer_norm(x))))
        outputs = (hidden_states, weights, cross_weights) if output_attentions else (hidden_states,)
        return (*outputs, present + cross_present) if use_cache else outputs


class OFAPreTrainedModel(nn.Module):
    def __init__(self, config: OFAConfig) -> None:
        super().__init__()
        self.config = config


def _positions(module: nn.Module, config: OFAConfig, heads: int, layers: int) -> None:
    """What both sides hold: embeddings of positions, their norms, buckets and the layers' tables."""
    dim, rows = config.d_model, (2 * config.image_bucket_size - 1) ** 2 + 3
    module.embed_positions = nn.Embedding(config.max_position_embeddings + 2, dim)
    module.embed_image_positions = nn.Embedding(config.image_bucket_size**2 + 1, dim)
    module.pos_ln, module.image_pos_ln = nn.LayerNorm(dim), nn.LayerNorm(dim)
    module.pos_scaling = float(dim / heads * config.attn_scale_factor) ** -0.5
    module.token_bucket_size, module.image_bucket_size = config.token_bucket_size, config.image_bucket_size
    module.token_rel_pos_table_list = nn.ModuleList(
        nn.Embedding(2 * config.token_bucket_size - 1, heads) for _ in range(layers)
    )
    module.image_rel_pos_table_list = nn.ModuleList(nn.Embedding(rows, heads) for _ in range(layers))
    module.register_buffer("token_rp_bucket", token_buckets(config.token_bucket_size))
    module.register_buffer("image_rp_bucket", image_buckets(config.image_bucket_size, rows))
    module.entangle_position_embedding = config.entangle_position_embedding


class OFAEncoder(OFAPreTrainedModel):
    def __init__(self, config: OFAConfig, embed_tokens: nn.Embedding) -> None:
        super().__init__(config)
        dim = config.d_model
        self.dropout = nn.Dropout(0.1)
        self.padding_idx, self.embed_scale = config.pad_token_id, 1.0
        self.num_attention_heads = config.encoder_attention_heads
        self.embed_tokens, self.type_embedding = embed_tokens, nn.Embedding(2, dim)
        self.embed_images = nn.Conv2d(3, 1024, 16, 16)
        self.image_proj = nn.Linear(1024, dim)
        self.layernorm_embedding, self.patch_layernorm_embedding = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.pos_q_linear, self.pos_k_linear = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.layers = nn.ModuleList(OFAEncoderLayer(config) for _ in range(config.encoder_layers))
        self.num_layers = len(self.layers)
        self.layer_norm = nn.LayerNorm(dim)
        _positions(self, config, self.num_attention_heads, config.encoder_layers)

    def get_rel_pos_bias(self, x, idx):
        bucket = self.token_rp_bucket[: x.size(1), : x.size(1)]
        values = F.embedding(bucket, self.token_rel_pos_table_list[idx].weight)
        return values.expand(x.size(0), -1, -1, -1).permute(0, 3, 1, 2).contiguous()

    def get_image_rel_pos_bias(self, image_position_ids, idx):
        bucket = self.image_rp_bucket[image_position_ids[:, :, None], image_position_ids[:, None]]
        return F.embedding(bucket, self.image_rel_pos_table_list[idx].weight).permute(0, 3, 1, 2)

    def get_patch_images_info(self, patch_images, sample_patch_num, device):
        image_embed = self.embed_images(patch_images)
        h, w = image_embed.shape[-2:]
        padding = patch_images.new_zeros((patch_images.size(0), h * w)).bool()
        places = (torch.arange(w)[None] + torch.arange(h)[:, None] * self.image_bucket_size + 1).view(-1).to(device)
        ids = places[None].expand(patch_images.size(0), h * w)
        return image_embed.flatten(2).transpose(1, 2), h * w, padding, ids, self.embed_image_positions(ids)

    def forward_embedding(
        self,
        input_ids,
        image_embed=None,
        image_embed_2=None,
        token_embedding=None,
        pos_embed=None,
        image_pos_embed=None,
        image_pos_embed_2=None,
    ):
        token_embedding = self.embed_tokens(input_ids) if token_embedding is None else token_embedding
        embed = self.embed_scale * token_embedding
        x = self.dropout(self.layernorm_embedding(embed + self.type_embedding(torch.zeros_like(input_ids))))
        if image_embed is not None:
            image_embed = self.embed_scale * self.image_proj(image_embed)
            kinds = input_ids.new_ones(image_embed.shape[:2])
            image_x = self.dropout(self.patch_layernorm_embedding(image_embed + self.type_embedding(kinds)))
            x, embed = torch.cat([image_x, x], 1), torch.cat([image_embed, embed], 1)
        return x, embed

    def forward(
        self,
        input_ids=None,
        patch_images=None,
        patch_images_2=None,
        patch_masks=None,
        output_attentions=False,
        output_hidden_states=False,
        token_embeddings=None,
        sample_patch_num=None,
    ):
        image_embed = image_pos_embed = None
        padding = input_ids.eq(self.padding_idx)
        if patch_images is not None:
            image_embed, _, image_padding, image_ids, image_pos_embed = self.get_patch_images_info(
                patch_images, sample_patch_num, input_ids.device
            )
            image_padding[~patch_masks] = True
            padding = torch.cat([image_padding, padding], 1)
        has_pads = padding.any()
        pos_embed = self.embed_positions(torch.arange(input_ids.size(1)).expand_as(input_ids))
        x, _ = self.forward_embedding(input_ids, image_embed, None, token_embeddings, pos_embed, image_pos_embed, None)
        if has_pads:
            x = x * (1 - padding.unsqueeze(-1).type_as(x))
        pos_embed = self.pos_ln(pos_embed)
        if patch_images is not None:
            pos_embed = torch.cat([self.image_pos_ln(image_pos_embed), pos_embed], 1)
        shape = (x.size(0), x.size(1), self.num_attention_heads, -1)
        pos_q = self.pos_q_linear(pos_embed).view(shape).transpose(1, 2) * self.pos_scaling
        abs_pos_bias = pos_q @ self.pos_k_linear(pos_embed).view(shape).permute(0, 2, 3, 1)
        mask = _expand_mask(~padding, x.dtype) if has_pads else None
        states, attentions = () if output_hidden_states else None, () if output_attentions else None
        text = input_ids.size(1)
        for idx, layer in enumerate(self.layers):
            if output_hidden_states:
                states += (x,)
            bias = abs_pos_bias.clone()
            bias[:, :, -text:, -text:] += self.get_rel_pos_bias(input_ids, idx)
            if patch_images is not None:
                bias[:, :, :-text, :-text] += self.get_image_rel_pos_bias(image_ids, idx)
            outputs = layer(x, mask, attn_bias=bias.flatten(0, 1), output_attentions=output_attentions)
            x = outputs[0]
            if output_attentions:
                attentions += (outputs[1],)
        if output_hidden_states:
            states += (x,)
        return OFAEncoderOutput(self.layer_norm(x), padding, states, attentions, pos_embed)


class OFADecoder(OFAPreTrainedModel):
    def __init__(self, config: OFAConfig, embed_tokens: nn.Embedding) -> None:
        super().__init__(config)
        dim = self.embed_dim = config.d_model
        self.dropout = nn.Dropout(0.1)
        self.padding_idx, self.embed_scale = config.pad_token_id, 1.0
        self.num_attention_heads = config.decoder_attention_heads
        self.embed_tokens = embed_tokens
        self.layernorm_embedding, self.code_layernorm_embedding = nn.LayerNorm(dim), nn.LayerNorm(dim)
        for name in ("self_pos_q", "self_pos_k", "cross_pos_q", "cross_pos_k"):
            setattr(self, f"{name}_linear", nn.Linear(dim, dim))
        self.layers = nn.ModuleList(OFADecoderLayer(config) for _ in range(config.decoder_layers))
        self.num_layers = len(self.layers)
        self.layer_norm = nn.LayerNorm(dim)
        self.output_projection = nn.Linear(dim, config.vocab_size, bias=False)
        self.output_projection.weight = embed_tokens.weight
        _positions(self, config, self.num_attention_heads, config.decoder_layers)
        window = config.code_image_size // 8
        places = torch.arange(window)[None] + torch.arange(window)[:, None] * config.image_bucket_size + 1
        self.register_buffer("image_position_idx", torch.cat([torch.zeros(1, dtype=torch.long), places.view(-1)]))

    def get_rel_pos_bias(self, x, idx):
        bucket = self.token_rp_bucket[: x.size(1), : x.size(1)]
        return F.embedding(bucket, self.token_rel_pos_table_list[idx].weight).permute(2, 0, 1).contiguous()

    def get_pos_info(self, tgt_pos_embed, src_pos_embed=None, use_image=False):
        target = self.image_pos_ln(tgt_pos_embed) if use_image else self.pos_ln(tgt_pos_embed)
        kind, source = ("self", target) if src_pos_embed is None else ("cross", src_pos_embed)
        shape = (target.size(0), -1, self.num_attention_heads, self.embed_dim // self.num_attention_heads)
        q = getattr(self, f"{kind}_pos_q_linear")(target).view(shape).transpose(1, 2) * self.pos_scaling
        return q @ getattr(self, f"{kind}_pos_k_linear")(source).view(shape).permute(0, 2, 3, 1)

    def _prepare_decoder_attention_mask(self, attention_mask, input_shape, dtype, past_key_values_length):
        length = input_shape[-1]
        mask = None
        if length > 1:
            mask = torch.full((length, length), torch.finfo(dtype).min, dtype=dtype).triu(1)[None, None]
        if attention_mask is not None:
            expanded = _expand_mask(attention_mask, dtype, length)
            mask = expanded if mask is None else mask + expanded
        return mask

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        code_masks=None,
        src_pos_embed=None,
        past_key_values=None,
        use_cache=False,
        output_attentions=False,
        output_hidden_states=False,
    ):
        past = past_key_values is not None and len(past_key_values) > 0
        batch = input_ids.size(0)
        length = past_key_values[0][0].size(-2) + 1 if past else input_ids.size(1)
        pos_embed = self.embed_positions(torch.arange(length).expand(batch, length))
        self_bias = self.get_pos_info(pos_embed)
        cross_bias = self.get_pos_info(pos_embed, src_pos_embed).flatten(0, 1)
        tokens = input_ids.new_zeros(batch, length)
        if past:
            input_ids, cross_bias = input_ids[:, -1:], cross_bias[:, -1:]
        x = self.dropout(self.layernorm_embedding(self.embed_scale * self.embed_tokens(input_ids)))
        mask = self._prepare_decoder_attention_mask(attention_mask, input_ids.shape, x.dtype, length - 1 if past else 0)
        states, presents = () if output_hidden_states else None, () if use_cache else None
        attentions, crosses = () if output_attentions else None, () if output_attentions else None
        for idx, layer in enumerate(self.layers):
            if output_hidden_states:
                states += (x,)
            bias = (self_bias + self.get_rel_pos_bias(tokens, idx)[None]).flatten(0, 1)
            outputs = layer(
                x,
                attention_mask=mask,
                encoder_hidden_states=encoder_hidden_states,
                encoder_attention_mask=encoder_attention_mask,
                past_key_value=past_key_values[idx] if past else None,
                output_attentions=output_attentions,
                use_cache=use_cache,
                self_attn_bias=bias[:, -1:] if past else bias,
                cross_attn_bias=cross_bias,
            )
            x = outputs[0]
            if use_cache:
                presents += (outputs[-1],)
            if output_attentions:
                attentions, crosses = (*attentions, outputs[1]), (*crosses, outputs[2])
        if output_hidden_states:
            states += (x,)
        x = self.output_projection(self.layer_norm(x))
        return BaseModelOutputWithPastAndCrossAttentions(x, presents, states, attentions, crosses)


class OFAModel(OFAPreTrainedModel):
    def __init__(self, config: OFAConfig | None = None) -> None:
        config = config or OFAConfig()
        super().__init__(config)
        shared = nn.Embedding(config.vocab_size, config.d_model, config.pad_token_id)
        self.encoder, self.decoder = OFAEncoder(config, shared), OFADecoder(config, shared)

    def forward(
        self,
        input_ids,
        patch_images=None,
        patch_masks=None,
        decoder_input_ids=None,
        past_key_values=None,
        encoder_outputs=None,
        use_cache=False,
        output_attentions=False,
        code_masks=None,
        sample_patch_num=None,
    ):
        if encoder_outputs is None:
            encoder_outputs = self.encoder(
                input_ids,
                patch_images,
                patch_masks=patch_masks,
                output_attentions=output_attentions,
                sample_patch_num=sample_patch_num,
            )
        memory = encoder_outputs.last_hidden_state
        length = 1 if past_key_values else decoder_input_ids.size(1)
        return self.decoder(
            decoder_input_ids,
            encoder_hidden_states=memory,
            encoder_attention_mask=_expand_mask(~encoder_outputs.padding_mask, memory.dtype, length),
            code_masks=code_masks,
            src_pos_embed=encoder_outputs.position_embedding,
            past_key_values=past_key_values,
            use_cache=use_cache,
            output_attentions=output_attentions,
        )


def _expand_mask(mask: Tensor, dtype: torch.dtype, length: int | None = None) -> Tensor:
    """`[B,S]` (True: real) to `[B,1,T,S]`, 0 or the lowest number."""
    expanded = mask[:, None, None].expand(-1, 1, mask.size(1) if length is None else length, -1).to(dtype)
    return (1.0 - expanded).masked_fill((1.0 - expanded).bool(), torch.finfo(dtype).min)
