"""The configuration of OFA+: plain, frozen dataclasses."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from ofakern.errors import OfakernValueError
from ofakern.modality.adaptors import adaptor_config, adaptor_options
from ofakern.modality.image.adaptor import ImageResnetConfig
from ofakern.modality.text.adaptor import TextAdaptorConfig
from ofakern.nn.adaptor import AdaptorConfig
from ofakern.nn.layers import LayerConfig

# name: width, feed-forward width, heads, encoder layers, decoder layers, backbone
SIZES = {
    "tiny": (256, 1024, 4, 4, 4, "resnet50"),
    "medium": (512, 2048, 8, 4, 4, "resnet101"),
    "base": (768, 3072, 12, 6, 6, "resnet101"),
    "large": (1024, 4096, 16, 12, 12, "resnet152"),
    "huge": (1280, 5120, 16, 24, 12, "resnet152"),
}
COMPAT = ("", "ofasys", "ofa_hf")
# Modality numbers in batches are 1 .. MODALITIES; expert = number - 1.
MODALITIES = 9


@dataclass(frozen=True, kw_only=True)
class OFAConfig:
    """Everything that shapes an `OFAPlus`. Names and defaults are OFASys's (base size).

    Attributes:
        vocab_size, pad_id: rows of the tied embeddings, and the pad's.
        dim, ffn_dim, heads: model width D, feed-forward width, heads H; D / H is a multiple of 8.
        encoder_layers, decoder_layers: depth.
        adaptors: configurations of the adaptors that the model has, each name once.
        activation: of the feed-forward layers, "gelu" or "relu".
        normalize_before: layer norms before (True) or after each part of a layer.
        dropout, attention_dropout, activation_dropout, encoder_drop_path, decoder_drop_path: probabilities; a drop path
            grows with depth up to its value.
        attn_scale_factor: scores are scaled by (attn_scale_factor * D / H)^-0.5.
        scale_attn, scale_fc, scale_heads, scale_resids: NormFormer's extra norms and weights, after attention, inside
            the feed-forward layers, per head, and on its residual.
        use_self_attn_bias: relative tables. share_attn_bias: one for all layers of a stack.
        entangle_position_embedding: positions are added to the embeddings and the factored position term is off.
        max_segments: above 0, segments of one sample get an order embedding (two images of one instruction become
            distinguishable). target_slots: above 0, target slots get an embedding. Published checkpoints: both 0.
        checkpoint_activations: recompute layers in the backward pass instead of keeping their activations.
        init_std: deviation of new matrices and embeddings; 0.02 suits dim 768, about dim^-0.5 lets narrow models attend
            from the start.
        entangle_decoder: positions are added to the decoder's embeddings while the factored term stays (OFA's fairseq
            code without `--disable-entangle`).
        adapter_dim: width of bottleneck adapters after every feed-forward part. encoder_prefix, decoder_prefix: learned
            keys that all tokens of a stack see in self-attention; prefix_dim: width of the network that makes them
            (0: they are parameters themselves).
        modal_ffn: every modality has feed-forward weights of its own (`MODALITIES` experts per layer).
        compat: "ofasys" reproduces quirks of the published implementation: without relative tables its encoder scales
            scores by K^-0.5 and ignores the head weights; with `modal_ffn` it sends the tokens of a batch of more than
            one sample to experts of other tokens' modalities. "ofa_hf" reproduces that of OFA's Hugging Face port:
            drop path drops places of the sequence in all samples at once, instead of samples.

    Raises OfakernValueError for widths, names and combinations that cannot be built.
    """

    vocab_size: int = 59457
    pad_id: int = 1
    dim: int = 768
    ffn_dim: int = 3072
    heads: int = 12
    encoder_layers: int = 6
    decoder_layers: int = 6
    adaptors: tuple[AdaptorConfig, ...] = (TextAdaptorConfig(), ImageResnetConfig())
    activation: str = "gelu"
    normalize_before: bool = True
    dropout: float = 0.1
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    encoder_drop_path: float = 0.0
    decoder_drop_path: float = 0.0
    attn_scale_factor: float = 2.0
    scale_attn: bool = True
    scale_fc: bool = True
    scale_heads: bool = True
    scale_resids: bool = False
    use_self_attn_bias: bool = True
    share_attn_bias: bool = False
    entangle_position_embedding: bool = False
    entangle_decoder: bool = False
    adapter_dim: int = 0
    encoder_prefix: int = 0
    decoder_prefix: int = 0
    prefix_dim: int = 0
    modal_ffn: bool = False
    max_segments: int = 0
    target_slots: int = 0
    checkpoint_activations: bool = False
    init_std: float = 0.02
    compat: str = ""

    def __post_init__(self) -> None:
        if self.heads < 1 or self.dim % self.heads or (self.dim // self.heads) % 8:
            raise OfakernValueError(
                f"OFAConfig: dim must be heads ({self.heads}) times a multiple of 8, got {self.dim}"
            )
        names = [adaptor.name for adaptor in self.adaptors]
        if len(set(names)) != len(names):
            raise OfakernValueError(f"OFAConfig: adaptors must have distinct names, got {names}")
        if not self.use_self_attn_bias and not self.entangle_position_embedding:
            raise OfakernValueError(
                "OFAConfig: entangle_position_embedding must be on when use_self_attn_bias is off, got False"
            )
        if self.compat not in COMPAT:
            raise OfakernValueError(f"OFAConfig: compat must be one of {list(COMPAT)}, got {self.compat!r}")

    @classmethod
    def from_size(cls, size: str, **overrides: Any) -> OFAConfig:
        """tiny (33M), medium (93M), base (180M), large (470M) or huge (930M), with any field overridden.

        `image_size` is not part of it: the grid follows the images, up to the adaptor's bucket.
        """
        if size not in SIZES:
            raise OfakernValueError(f"OFAConfig.from_size: size must be one of {list(SIZES)}, got {size!r}")
        dim, ffn_dim, heads, encoder_layers, decoder_layers, backbone = SIZES[size]
        config = cls(
            dim=dim,
            ffn_dim=ffn_dim,
            heads=heads,
            encoder_layers=encoder_layers,
            decoder_layers=decoder_layers,
            adaptors=(TextAdaptorConfig(), ImageResnetConfig(resnet_type=backbone)),
        )
        return replace(config, **overrides)

    def adaptor(self, name: str) -> AdaptorConfig:
        """The adaptor's config by name."""
        for adaptor in self.adaptors:
            if adaptor.name == name:
                return adaptor
        raise OfakernValueError(
            f"OFAConfig: adaptor must be one of {[adaptor.name for adaptor in self.adaptors]}, got {name!r}"
        )

    def layer(self, drop_path: float) -> LayerConfig:
        """The part that one layer needs."""
        own = {"drop_path", "experts"}
        shared = {f.name: getattr(self, f.name) for f in fields(LayerConfig) if f.name not in own}
        return LayerConfig(**shared, drop_path=drop_path, experts=MODALITIES if self.modal_ffn else 0)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a config file; `from_dict` reads it back."""
        data = asdict(self)
        data["adaptors"] = {adaptor.name: adaptor_options(adaptor) for adaptor in self.adaptors}
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> OFAConfig:
        """Raises OfakernValueError for unknown fields."""
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(data) - known)
        if unknown:
            raise OfakernValueError(f"OFAConfig.from_dict: fields must be among {sorted(known)}, got {unknown}")
        values = dict(data)
        if "adaptors" in values:
            values["adaptors"] = tuple(adaptor_config(name, opts) for name, opts in values["adaptors"].items())
        return cls(**values)
