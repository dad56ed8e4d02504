"""Plain-torch replicas of OFA's layers, with the class names, attributes and keys of the HF port and of OFASys.

They form the dense bias `[B*H,T,S]` and every probability: what the drop-in layers are compared with.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class OFAAttention(nn.Module):
    def __init__(self, dim: int, heads: int, is_decoder: bool = False, scale_heads: bool = True) -> None:
        super().__init__()
        self.embed_dim, self.num_heads, self.head_dim, self.is_decoder = dim, heads, dim // heads, is_decoder
        self.scaling = (2 * self.head_dim) ** -0.5
        self.k_proj, self.v_proj, self.q_proj, self.out_proj = (nn.Linear(dim, dim) for _ in range(4))
        self.attn_dropout = nn.Dropout(0.0)
        self.c_attn = nn.Parameter(torch.ones(heads)) if scale_heads else None

    def forward(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        past_key_value: Any = None,
        attention_mask: Tensor | None = None,
        output_attentions: bool = False,
        attn_bias: Tensor | None = None,
    ) -> Any:
        batch, length, dim = hidden_states.shape
        heads = lambda x: x.view(batch, -1, self.num_heads, self.head_dim).transpose(1, 2)  # noqa: E731
        source = hidden_states if key_value_states is None else key_value_states
        if key_value_states is not None and past_key_value is not None:
            k, v = past_key_value
        else:
            k, v = heads(self.k_proj(source)), heads(self.v_proj(source))
            if past_key_value is not None:
                k, v = (torch.cat(pair, 2) for pair in zip(past_key_value, (k, v), strict=True))
        scores = heads(self.q_proj(hidden_states) * self.scaling) @ k.transpose(2, 3)
        if attn_bias is not None:
            scores = scores + attn_bias.view(scores.shape)
        if attention_mask is not None:
            scores = scores + attention_mask
        out = (scores.softmax(-1) @ v).transpose(1, 2)
        if self.c_attn is not None:
            out = out * self.c_attn[:, None]
        out = self.out_proj(out.reshape(batch, length, dim))
        return out, None, (k, v) if self.is_decoder else past_key_value


class _Port(nn.Module):
    def feed_forward(self, x: Tensor) -> Tensor:
        y = self.fc1(self.final_layer_norm(x) if self.normalize_before else x)
        y = F.gelu(y)
        y = x + self.fc2(y if self.ffn_layer_norm is None else self.ffn_layer_norm(y))
        return y if self.normalize_before else self.final_layer_norm(y)

    def rest(self, config: Any) -> None:
        dim = config.d_model
        self.dropout, self.activation_dropout = nn.Dropout(0.0), nn.Dropout(0.0)
        self.activation_fn = nn.GELU()
        self.fc1, self.fc2 = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)
        self.ffn_layer_norm = nn.LayerNorm(2 * dim) if config.normformer else None
        self.final_layer_norm = nn.LayerNorm(dim)
        self.drop_path = nn.Identity()


def _attended(layer: Any, x: Tensor, norm: nn.Module, extra: nn.Module | None, attention: Any) -> Tensor:
    y = attention(norm(x) if layer.normalize_before else x)
    y = x + (y if extra is None else extra(y))
    return y if layer.normalize_before else norm(y)


class OFAEncoderLayer(_Port):
    def __init__(self, config: Any) -> None:
        super().__init__()
        dim = config.d_model
        self.self_attn = OFAAttention(dim, config.encoder_attention_heads)
        self.self_attn_layer_norm = nn.LayerNorm(dim)
        self.self_attn_mid_layer_norm = nn.LayerNorm(dim) if config.normformer else None
        self.normalize_before = config.encoder_normalize_before
        self.rest(config)

    def forward(self, x: Tensor, attention_mask: Tensor, attn_bias: Tensor | None = None) -> tuple[Tensor]:
        run = lambda y: self.self_attn(y, attention_mask=attention_mask, attn_bias=attn_bias)[0]  # noqa: E731
        x = _attended(self, x, self.self_attn_layer_norm, self.self_attn_mid_layer_norm, run)
        return (self.feed_forward(x),)


class OFADecoderLayer(_Port):
    def __init__(self, config: Any) -> None:
        super().__init__()
        dim, heads = config.d_model, config.decoder_attention_heads
        self.self_attn = OFAAttention(dim, heads, True)
        self.self_attn_layer_norm = nn.LayerNorm(dim)
        self.self_attn_mid_layer_norm = nn.LayerNorm(dim) if config.normformer else None
        self.cross_attn = OFAAttention(dim, heads, True)
        self.cross_attn_layer_norm = nn.LayerNorm(dim)
        self.cross_attn_mid_layer_norm = nn.LayerNorm(dim) if config.normformer else None
        self.normalize_before = config.decoder_normalize_before
        self.rest(config)

    def forward(
        self,
        x: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_value: Any = None,
        use_cache: bool = False,
        self_attn_bias: Tensor | None = None,
        cross_attn_bias: Tensor | None = None,
    ) -> Any:
        kept: list[Tensor] = []

        def own(y: Tensor) -> Tensor:
            past = None if past_key_value is None else past_key_value[:2]
            out, _, present = self.self_attn(y, None, past, attention_mask, attn_bias=self_attn_bias)
            kept.extend(present)
            return out

        def cross(y: Tensor) -> Tensor:
            past = None if past_key_value is None else past_key_value[-2:]
            out, _, present = self.cross_attn(
                y, encoder_hidden_states, past, encoder_attention_mask, attn_bias=cross_attn_bias
            )
            kept.extend(present)
            return out

        x = _attended(self, x, self.self_attn_layer_norm, self.self_attn_mid_layer_norm, own)
        x = _attended(self, x, self.cross_attn_layer_norm, self.cross_attn_mid_layer_norm, cross)
        x = self.feed_forward(x)
        return (x, tuple(kept)) if use_cache else (x,)


class MultiheadAttention(nn.Module):
    """OFASys's, with its two paths: without a bias torch's own function runs, unscaled by factor and heads."""

    def __init__(self, dim: int, heads: int, memory: int | None = None, **options: Any) -> None:
        super().__init__()
        self.embed_dim, self.num_heads, self.head_dim = dim, heads, dim // heads
        self.scaling = (options.get("scale_factor", 2) * self.head_dim) ** -0.5
        self.self_attention, self.encoder_decoder_attention = memory is None, memory is not None
        self.dropout_module = nn.Dropout(0.0)
        self.c_attn = nn.Parameter(torch.ones(heads)) if options.get("scale_heads", True) else None
        source = dim if memory is None else memory
        self.k_proj, self.v_proj = nn.Linear(source, dim), nn.Linear(source, dim)
        self.q_proj, self.out_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        extra = options.get("add_bias_kv", False)
        self.bias_k = nn.Parameter(torch.zeros(1, 1, dim)) if extra else None
        self.bias_v = nn.Parameter(torch.zeros(1, 1, dim)) if extra else None
        self.add_zero_attn = options.get("add_zero_attn", False)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        incremental_state: Any = None,
        need_weights: bool = True,
        static_kv: bool = False,
        attn_mask: Tensor | None = None,
        attn_bias: Tensor | None | bool = None,
    ) -> tuple[Tensor, None]:
        if attn_bias is None and not static_kv:
            out, _ = F.multi_head_attention_forward(
                query,
                key,
                value,
                self.embed_dim,
                self.num_heads,
                None,
                torch.cat([self.q_proj.bias, self.k_proj.bias, self.v_proj.bias]),
                self.bias_k,
                self.bias_v,
                self.add_zero_attn,
                0.0,
                self.out_proj.weight,
                self.out_proj.bias,
                True,
                key_padding_mask,
                False,
                attn_mask,
                use_separate_proj_weight=True,
                q_proj_weight=self.q_proj.weight,
                k_proj_weight=self.k_proj.weight,
                v_proj_weight=self.v_proj.weight,
            )
            return out, None
        length, batch, dim = query.shape
        heads = lambda x: x.view(-1, batch, self.num_heads, self.head_dim).permute(1, 2, 0, 3)  # noqa: E731
        scores = heads(self.q_proj(query) * self.scaling) @ heads(self.k_proj(key)).transpose(2, 3)
        if isinstance(attn_bias, Tensor):
            scores = scores + attn_bias.view(scores.shape)
        if attn_mask is not None:
            scores = scores + attn_mask
        if key_padding_mask is not None:
            scores = scores.masked_fill(key_padding_mask[:, None, None].bool(), -torch.inf)
        out = (scores.softmax(-1) @ heads(self.v_proj(value))).permute(2, 0, 1, 3)
        if self.c_attn is not None:
            out = out * self.c_attn[:, None]
        return self.out_proj(out.reshape(length, batch, dim)), None


class _OFASys(nn.Module):
    def rest(self, cfg: Any, side: Any) -> None:
        dim = side.embed_dim
        self.dropout_module, self.activation_dropout_module = nn.Dropout(0.0), nn.Dropout(0.0)
        self.activation_fn = F.gelu
        self.normalize_before = side.normalize_before
        self.fc1, self.fc2 = nn.Linear(dim, side.ffn_embed_dim), nn.Linear(side.ffn_embed_dim, dim)
        self.ffn_layernorm = nn.LayerNorm(side.ffn_embed_dim) if cfg.scale_fc else None
        self.w_resid = nn.Parameter(torch.ones(dim)) if cfg.scale_resids else None
        self.final_layer_norm = nn.LayerNorm(dim)
        self.drop_path = nn.Identity()

    def feed_forward(self, x: Tensor) -> Tensor:
        y = F.gelu(self.fc1(self.final_layer_norm(x) if self.normalize_before else x))
        y = self.fc2(y if self.ffn_layernorm is None else self.ffn_layernorm(y))
        y = y + (x if self.w_resid is None else x * self.w_resid)
        return y if self.normalize_before else self.final_layer_norm(y)


class TransformerEncoderLayer(_OFASys):
    def __init__(self, cfg: Any) -> None:
        super().__init__()
        self.cfg = cfg
        dim = cfg.encoder.embed_dim
        self.self_attn = MultiheadAttention(dim, cfg.encoder.attention_heads, scale_heads=cfg.scale_heads)
        self.self_attn_layer_norm = nn.LayerNorm(dim)
        self.attn_ln = nn.LayerNorm(dim) if cfg.scale_attn else None
        self.rest(cfg, cfg.encoder)

    def forward(self, x: Tensor, padding: Tensor | None, self_attn_bias: Tensor | None = None) -> Any:
        run = lambda y: self.self_attn(y, y, y, padding, need_weights=False, attn_bias=self_attn_bias)[0]  # noqa: E731
        return self.feed_forward(_attended(self, x, self.self_attn_layer_norm, self.attn_ln, run)), None


class TransformerDecoderLayer(_OFASys):
    def __init__(self, cfg: Any) -> None:
        super().__init__()
        self.cfg, self.cross_self_attention = cfg, False
        dim, heads = cfg.decoder.embed_dim, cfg.decoder.attention_heads
        self.self_attn = MultiheadAttention(dim, heads, scale_heads=cfg.scale_heads)
        self.self_attn_ln = nn.LayerNorm(dim) if cfg.scale_attn else None
        self.cross_attn_ln = nn.LayerNorm(dim) if cfg.scale_attn else None
        self.self_attn_layer_norm = nn.LayerNorm(dim)
        self.encoder_attn = MultiheadAttention(dim, heads, cfg.encoder.embed_dim, scale_heads=cfg.scale_heads)
        self.encoder_attn_layer_norm = nn.LayerNorm(dim)
        self.rest(cfg, cfg.decoder)

    def forward(
        self,
        x: Tensor,
        encoder_out: Tensor,
        encoder_padding_mask: Tensor | None = None,
        self_attn_mask: Tensor | None = None,
        self_attn_padding_mask: Tensor | None = None,
        self_attn_bias: Any = None,
        cross_attn_bias: Any = None,
    ) -> Any:
        own = lambda y: self.self_attn(  # noqa: E731
            y, y, y, self_attn_padding_mask, attn_mask=self_attn_mask, attn_bias=self_attn_bias
        )[0]
        cross = lambda y: self.encoder_attn(  # noqa: E731
            y, encoder_out, encoder_out, encoder_padding_mask, static_kv=True, attn_bias=cross_attn_bias
        )[0]
        x = _attended(self, x, self.self_attn_layer_norm, self.self_attn_ln, own)
        x = _attended(self, x, self.encoder_attn_layer_norm, self.cross_attn_ln, cross)
        return self.feed_forward(x), None, None


def ofa_config(dim: int, heads: int, normformer: bool = True, pre_norm: bool = True) -> Any:
    """The attributes of OFAConfig that layers read."""
    return SimpleNamespace(
        d_model=dim,
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_ffn_dim=2 * dim,
        decoder_ffn_dim=2 * dim,
        attention_dropout=0.0,
        dropout=0.0,
        activation_dropout=0.0,
        activation_function="gelu",
        normformer=normformer,
        encoder_normalize_before=pre_norm,
        decoder_normalize_before=pre_norm,
    )


def ofasys_config(dim: int, heads: int, extras: bool = True, pre_norm: bool = True, memory: int | None = None) -> Any:
    """The attributes of OFASys's TransformerConfig that layers read."""
    side = {"attention_heads": heads, "ffn_embed_dim": 2 * dim, "normalize_before": pre_norm}
    return SimpleNamespace(
        encoder=SimpleNamespace(embed_dim=dim if memory is None else memory, **side),
        decoder=SimpleNamespace(embed_dim=dim, **side),
        dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        relu_dropout=0.0,
        activation_fn="gelu",
        attn_scale_factor=2,
        scale_heads=extras,
        scale_attn=extras,
        scale_fc=extras,
        scale_resids=extras,
        modal_ffn=False,
        cross_self_attention=False,
    )
