"""LayerNorm fused with what stands before it; csrc/ops/layer_norm/README.md has the maths and the measurements."""

from ofakern.ops.layer_norm.api import add_layer_norm, embed_layer_norm, gelu_layer_norm, head_scale_layer_norm

__all__ = ["add_layer_norm", "embed_layer_norm", "gelu_layer_norm", "head_scale_layer_norm"]
