"""OFA's encoder and decoder layers: the HF port's and OFASys's, under their own parameter names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ofakern.errors import OfakernValueError
from ofakern.nn.attention import gelu_or_relu
from ofakern.nn.dropin.base import DropIn, refuse_arguments
from ofakern.nn.dropin.ofa import FairseqMultiheadAttention, OFAAttention
from ofakern.nn.dropin.positions import PositionBias


class DropPath(nn.Module):
    """Drops a residual branch for whole samples; kept ones grow by 1 / (1 - rate). batch_axis: where samples are."""

    def __init__(self, rate: float, batch_axis: int = 0) -> None:
        super().__init__()
        self.rate, self.batch_axis = rate, batch_axis

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0.0:
            return x
        shape = [1] * x.dim()
        shape[self.batch_axis] = x.shape[self.batch_axis]
        return x * x.new_empty(shape).bernoulli_(1.0 - self.rate).div_(1.0 - self.rate)


class Activation(nn.Module):
    """gelu (exact) or relu, by its name."""

    def __init__(self, name: str) -> None:
        super().__init__()
        gelu_or_relu(name, torch.zeros(1))  # an unknown name raises here, not in the first step
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        return gelu_or_relu(self.name, x)


class _Layer(DropIn):
    """Sub-layers in pre- or post-norm order. Attention modules are replaced together with their layer."""

    attentions: tuple[str, ...] = ()
    attention_class: type[DropIn]
    normalize_before: bool
    fc1: nn.Linear
    fc2: nn.Linear
    activation_fn: Callable[[Tensor], Tensor]
    drop_path: nn.Module
    ffn_norm_name: str
    dropout_name: str
    activation_dropout_name: str

    @classmethod
    def refusal(cls, module: Any) -> str | None:
        for name in cls.attentions:
            attention = getattr(module, name)
            if attention is not None and not isinstance(attention, cls.attention_class):
                cls.attention_class.replacing(attention)  # raises with the attention's own reason
        return None

    def adopt(self) -> None:
        # The registry of submodules is this layer's own: the replaced layer keeps its attention.
        vars(self)["_modules"] = dict(self._modules)
        for name in self.attentions:
            attention = getattr(self, name)
            if attention is not None and not isinstance(attention, self.attention_class):
                self._modules[name] = self.attention_class.replacing(attention)

    def _branch(
        self,
        x: Tensor,
        norm: nn.Module,
        inner: Callable[[Tensor], Tensor],
        extra: nn.Module | None,
        residual_scale: Tensor | None = None,
    ) -> Tensor:
        """x + drop_path(dropout(extra norm(inner(norm(x))))), the norm before the branch or after the sum."""
        y = inner(norm(x) if self.normalize_before else x)
        if extra is not None:
            y = extra(y)
        y = self.drop_path(getattr(self, self.dropout_name)(y))
        x = (x if residual_scale is None else x * residual_scale) + y
        result: Tensor = x if self.normalize_before else norm(x)
        return result

    def _feed_forward(self, x: Tensor) -> Tensor:
        y = getattr(self, self.activation_dropout_name)(self.activation_fn(self.fc1(x)))
        norm = getattr(self, self.ffn_norm_name)
        result: Tensor = self.fc2(y if norm is None else norm(y))
        return result


class _OFALayer(_Layer):
    attention_class = OFAAttention
    embed_dim: int
    ffn_norm_name, dropout_name, activation_dropout_name = "ffn_layer_norm", "dropout", "activation_dropout"

    def _common(self, config: Any, ffn_dim: int, drop_path_rate: float) -> None:
        self.dropout = nn.Dropout(config.dropout)
        self.activation_fn = Activation(config.activation_function)
        self.activation_dropout = nn.Dropout(config.activation_dropout)
        self.fc1 = nn.Linear(self.embed_dim, ffn_dim)
        self.fc2 = nn.Linear(ffn_dim, self.embed_dim)
        self.ffn_layer_norm = nn.LayerNorm(ffn_dim) if config.normformer else None
        self.final_layer_norm = nn.LayerNorm(self.embed_dim)
        self.drop_path = DropPath(drop_path_rate) if drop_path_rate > 0.0 else nn.Identity()

    def _finite(self, x: Tensor) -> Tensor:
        # As published: float16 overflow is cut off.
        if x.dtype != torch.float16:
            return x
        limit = torch.finfo(torch.float16).max - 1000
        broken = torch.isinf(x).any() | torch.isnan(x).any()
        return torch.where(broken, torch.clamp(x, min=-limit, max=limit), x)


class OFAEncoderLayer(_OFALayer):
    """OFAEncoderLayer of OFA's Hugging Face port, `[B,T,D]`; keys `self_attn self_attn_layer_norm
    self_attn_mid_layer_norm fc1 fc2 ffn_layer_norm final_layer_norm`.

    Differences: `attn_bias` is a `PositionBias`; output_attentions raises; drop path drops whole samples (the port's
    drops token positions; a replaced layer keeps its own drop path).
    """

    replaced_names = ("OFAEncoderLayer",)
    needed = ("self_attn", "self_attn_layer_norm", "fc1", "fc2", "final_layer_norm", "drop_path", "normalize_before")
    attentions = ("self_attn",)

    def __init__(self, config: Any, drop_path_rate: float = 0.0) -> None:
        """config: anything with OFAConfig's attributes (d_model, encoder_attention_heads, normformer, ...)."""
        super().__init__()
        self.embed_dim = config.d_model
        self.self_attn = OFAAttention(self.embed_dim, config.encoder_attention_heads, config.attention_dropout)
        self.self_attn_layer_norm = nn.LayerNorm(self.embed_dim)
        self.self_attn_mid_layer_norm = nn.LayerNorm(self.embed_dim) if config.normformer else None
        self.normalize_before = config.encoder_normalize_before
        self._common(config, config.encoder_ffn_dim, drop_path_rate)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        output_attentions: bool = False,
        attn_bias: PositionBias | None = None,
    ) -> tuple[Tensor]:
        """hidden_states `[B,T,D]`, attention_mask `[B,1,T,T]` additive; (`[B,T,D]`,)."""
        refuse_arguments("OFAEncoderLayer", {"output_attentions": output_attentions}, ["output_attentions"])

        def self_attention(x: Tensor) -> Tensor:
            out: Tensor = self.self_attn(x, attention_mask=attention_mask, attn_bias=attn_bias)[0]
            return out

        x = self._branch(hidden_states, self.self_attn_layer_norm, self_attention, self.self_attn_mid_layer_norm)
        return (self._finite(self._branch(x, self.final_layer_norm, self._feed_forward, None)),)


class OFADecoderLayer(_OFALayer):
    """OFADecoderLayer of OFA's Hugging Face port; keys as `OFAEncoderLayer`'s and `cross_attn cross_attn_layer_norm
    cross_attn_mid_layer_norm`. Differences as there."""

    replaced_names = ("OFADecoderLayer",)
    needed = ("self_attn", "cross_attn", "self_attn_layer_norm", "cross_attn_layer_norm", "fc1", "fc2", "drop_path")
    attentions = ("self_attn", "cross_attn")

    def __init__(self, config: Any, drop_path_rate: float = 0.0) -> None:
        """config: anything with OFAConfig's attributes (d_model, decoder_attention_heads, normformer, ...)."""
        super().__init__()
        self.embed_dim = config.d_model
        heads, dropout = config.decoder_attention_heads, config.attention_dropout
        self.self_attn = OFAAttention(self.embed_dim, heads, dropout, is_decoder=True)
        self.self_attn_layer_norm = nn.LayerNorm(self.embed_dim)
        self.self_attn_mid_layer_norm = nn.LayerNorm(self.embed_dim) if config.normformer else None
        self.cross_attn = OFAAttention(self.embed_dim, heads, dropout, is_decoder=True)
        self.cross_attn_layer_norm = nn.LayerNorm(self.embed_dim)
        self.cross_attn_mid_layer_norm = nn.LayerNorm(self.embed_dim) if config.normformer else None
        self.normalize_before = config.decoder_normalize_before
        self._common(config, config.decoder_ffn_dim, drop_path_rate)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_value: tuple[Tensor, ...] | None = None,
        output_attentions: bool | None = False,
        use_cache: bool | None = False,
        self_attn_bias: PositionBias | None = None,
        cross_attn_bias: PositionBias | None = None,
    ) -> tuple[Any, ...]:
        """hidden_states `[B,T,D]`; (`[B,T,D]`,) and with use_cache the keys and values of both attentions."""
        refuse_arguments("OFADecoderLayer", {"output_attentions": output_attentions}, ["output_attentions"])
        present: tuple[Tensor, ...] = ()

        def self_attention(x: Tensor) -> Tensor:
            nonlocal present
            past = None if past_key_value is None else past_key_value[:2]
            out: Tensor
            out, _, present = self.self_attn(
                x, past_key_value=past, attention_mask=attention_mask, attn_bias=self_attn_bias
            )
            return out

        def cross_attention(x: Tensor) -> Tensor:
            nonlocal present
            past = None if past_key_value is None else past_key_value[-2:]
            out: Tensor
            out, _, memory = self.cross_attn(
                x, encoder_hidden_states, past, encoder_attention_mask, attn_bias=cross_attn_bias
            )
            present = present + memory
            return out

        x = self._branch(hidden_states, self.self_attn_layer_norm, self_attention, self.self_attn_mid_layer_norm)
        if encoder_hidden_states is not None:
            x = self._branch(x, self.cross_attn_layer_norm, cross_attention, self.cross_attn_mid_layer_norm)
        x = self._branch(x, self.final_layer_norm, self._feed_forward, None)
        return (x, present) if use_cache else (x,)


class _OFASysLayer(_Layer):
    attention_class = FairseqMultiheadAttention
    embed_dim: int
    encoder_attn: FairseqMultiheadAttention | None
    encoder_attn_layer_norm: nn.LayerNorm | None
    ffn_norm_name, dropout_name = "ffn_layernorm", "dropout_module"
    activation_dropout_name = "activation_dropout_module"

    @classmethod
    def refusal(cls, module: Any) -> str | None:
        if getattr(module.cfg, "modal_ffn", False):
            return "modal_ffn must be off (its layers route by modality), got on"
        return super().refusal(module)

    def _common(self, cfg: Any, side: Any, drop_path_rate: float) -> None:
        self.dropout_module = nn.Dropout(cfg.dropout)
        self.activation_fn = Activation(cfg.activation_fn)
        self.activation_dropout_module = nn.Dropout(float(cfg.activation_dropout or getattr(cfg, "relu_dropout", 0)))
        self.normalize_before = side.normalize_before
        self.fc1 = nn.Linear(self.embed_dim, side.ffn_embed_dim)
        self.fc2 = nn.Linear(side.ffn_embed_dim, self.embed_dim)
        self.ffn_layernorm = nn.LayerNorm(side.ffn_embed_dim) if cfg.scale_fc else None
        self.w_resid = nn.Parameter(torch.ones(self.embed_dim)) if cfg.scale_resids else None
        self.final_layer_norm = nn.LayerNorm(self.embed_dim)
        self.drop_path = DropPath(drop_path_rate, batch_axis=1)

    def _attention(self, cfg: Any, side: Any, **options: Any) -> FairseqMultiheadAttention:
        return FairseqMultiheadAttention(
            self.embed_dim,
            side.attention_heads,
            dropout=cfg.attention_dropout,
            scale_factor=cfg.attn_scale_factor,
            scale_heads=cfg.scale_heads,
            **options,
        )


class OFASysEncoderLayer(_OFASysLayer):
    """OFASys's TransformerEncoderLayer, `[T,B,D]`; keys `self_attn self_attn_layer_norm attn_ln fc1 fc2 ffn_layernorm
    w_resid final_layer_norm`. `self_attn_bias` is a `PositionBias`; need_attn and modal_ffn raise."""

    replaced_names = ("TransformerEncoderLayer",)
    needed = ("cfg", "self_attn", "self_attn_layer_norm", "attn_ln", "fc1", "fc2", "w_resid", "dropout_module")
    attentions = ("self_attn",)

    def __init__(self, args: Any, drop_path_rate: float = 0.0) -> None:
        """args: anything with OFASys's TransformerConfig attributes (encoder.embed_dim, scale_attn, ...)."""
        super().__init__()
        self.cfg = args
        self.embed_dim = args.encoder.embed_dim
        _check_no_experts(args)
        self.self_attn = self._attention(args, args.encoder, self_attention=True)
        self.self_attn_layer_norm = nn.LayerNorm(self.embed_dim)
        self.attn_ln = nn.LayerNorm(self.embed_dim) if args.scale_attn else None
        self._common(args, args.encoder, drop_path_rate)

    def forward(
        self,
        x: Tensor,
        encoder_padding_mask: Tensor | None,
        attn_mask: Tensor | None = None,
        self_attn_bias: PositionBias | bool | None = None,
        need_attn: bool = False,
        modal_mask: Any = None,
    ) -> tuple[Tensor, None]:
        """x `[T,B,D]`, encoder_padding_mask `[B,T]` (nonzero: pad), attn_mask `[T,T]` (nonzero: left out)."""
        blocked = None if attn_mask is None else attn_mask.to(torch.bool)

        def self_attention(y: Tensor) -> Tensor:
            out: Tensor = self.self_attn(
                y, y, y, encoder_padding_mask, need_weights=need_attn, attn_mask=blocked, attn_bias=self_attn_bias
            )[0]
            return out

        x = self._branch(x, self.self_attn_layer_norm, self_attention, self.attn_ln)
        return self._branch(x, self.final_layer_norm, self._feed_forward, None, self.w_resid), None


class OFASysDecoderLayer(_OFASysLayer):
    """OFASys's TransformerDecoderLayer, `[T,B,D]`; keys as `OFASysEncoderLayer`'s with `self_attn_ln encoder_attn
    encoder_attn_layer_norm cross_attn_ln` for `attn_ln`.

    Differences: biases are `PositionBias`; need_attn raises and is off in eval mode too (both weights come back as
    None); prev_self_attn_state, prev_attn_state, cross_self_attention and modal_ffn raise.
    """

    replaced_names = ("TransformerDecoderLayer",)
    needed = ("cfg", "self_attn", "encoder_attn", "self_attn_ln", "cross_attn_ln", "fc1", "fc2", "w_resid")
    attentions = ("self_attn", "encoder_attn")

    def __init__(
        self,
        args: Any,
        no_encoder_attn: bool = False,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        drop_path_rate: float = 0.0,
    ) -> None:
        """args: anything with OFASys's TransformerConfig attributes (decoder.embed_dim, scale_attn, ...)."""
        super().__init__()
        self.cfg = args
        self.embed_dim = args.decoder.embed_dim
        _check_no_experts(args)
        extra = {"add_bias_kv": add_bias_kv, "add_zero_attn": add_zero_attn}
        self.self_attn = self._attention(args, args.decoder, self_attention=True, **extra)
        self.self_attn_ln = nn.LayerNorm(self.embed_dim) if args.scale_attn else None
        self.cross_attn_ln = nn.LayerNorm(self.embed_dim) if args.scale_attn else None
        self.self_attn_layer_norm = nn.LayerNorm(self.embed_dim)
        self.encoder_attn = self.encoder_attn_layer_norm = None
        if not no_encoder_attn:
            memory = args.encoder.embed_dim
            self.encoder_attn = self._attention(
                args, args.decoder, kdim=memory, vdim=memory, encoder_decoder_attention=True
            )
            self.encoder_attn_layer_norm = nn.LayerNorm(self.embed_dim)
        self._common(args, args.decoder, drop_path_rate)

    @classmethod
    def refusal(cls, module: Any) -> str | None:
        if getattr(module, "cross_self_attention", False):
            return "cross_self_attention must be off, got on"
        return super().refusal(module)

    def forward(
        self,
        x: Tensor,
        encoder_out: Tensor | None = None,
        encoder_padding_mask: Tensor | None = None,
        incremental_state: dict[str, dict[str, Tensor | None]] | None = None,
        prev_self_attn_state: Any = None,
        prev_attn_state: Any = None,
        self_attn_mask: Tensor | None = None,
        self_attn_padding_mask: Tensor | None = None,
        need_attn: bool = False,
        need_head_weights: bool = False,
        self_attn_bias: PositionBias | bool | None = None,
        cross_attn_bias: PositionBias | bool | None = None,
        modal_mask: Any = None,
    ) -> tuple[Tensor, None, None]:
        """x `[T,B,D]`, encoder_out `[S,B,D]`, self_attn_mask `[T,T]` additive; (`[T,B,D]`, None, None)."""
        given = {"prev_self_attn_state": prev_self_attn_state, "prev_attn_state": prev_attn_state}
        weights = {"need_attn": need_attn, "need_head_weights": need_head_weights}
        refuse_arguments("OFASysDecoderLayer", given | weights, [*given, *weights])

        def self_attention(y: Tensor) -> Tensor:
            out: Tensor = self.self_attn(
                y,
                y,
                y,
                self_attn_padding_mask,
                incremental_state,
                need_weights=False,
                attn_mask=self_attn_mask,
                attn_bias=self_attn_bias,
            )[0]
            return out

        encoder_attn, norm = self.encoder_attn, self.encoder_attn_layer_norm

        def cross_attention(y: Tensor) -> Tensor:
            assert encoder_attn is not None
            out: Tensor = encoder_attn(
                y,
                encoder_out,
                encoder_out,
                encoder_padding_mask,
                incremental_state,
                need_weights=False,
                static_kv=True,
                attn_bias=cross_attn_bias,
            )[0]
            return out

        x = self._branch(x, self.self_attn_layer_norm, self_attention, self.self_attn_ln)
        if encoder_attn is not None and norm is not None and encoder_out is not None:
            x = self._branch(x, norm, cross_attention, self.cross_attn_ln)
        return self._branch(x, self.final_layer_norm, self._feed_forward, None, self.w_resid), None, None


def _check_no_experts(args: Any) -> None:
    if getattr(args, "modal_ffn", False) or getattr(args, "cross_self_attention", False):
        raise OfakernValueError("OFASys layer: modal_ffn and cross_self_attention must be off, got on")
