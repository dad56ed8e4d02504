"""The weights of the recorded flag variants: each tensor follows from its key and shape alone."""

from __future__ import annotations

import math
import zlib

from torch import Tensor

from ofakern.checkpoint.golden import formula_tensor


def rule(key: str, shape: list[int]) -> tuple[float, float]:
    """(offset, std) of the recording for the parameters that `v16` has."""
    last = key.rsplit(".", 1)[-1]
    if last == "c_attn":
        return 1.0, 0.3
    if "rel_pos_table" in key:
        return 0.0, 0.5
    if key == "decoder.layer_norm.weight":
        return 0.0, 1.0
    if last == "weight" and len(shape) == 1:
        return 1.0, 0.2
    if last == "bias":
        return 0.0, 0.1
    if "embed_tokens" in key:
        return 0.0, 0.3
    if "type_embedding" in key or "cls_token" in key or ("embed_" in key and "position" in key):
        return 0.0, 0.5
    fan_in = math.prod(shape[1:])
    if "decoder.layers" in key and len(shape) == 2:
        return 0.0, 1.6 / math.sqrt(fan_in)
    return 0.0, math.sqrt(2.0 if len(shape) == 4 else 1.0) / math.sqrt(fan_in)


def weights(keys: dict[str, list[int]]) -> dict[str, Tensor]:
    """The tensors of all keys that are no integer buffers; the decoder's embedding is the encoder's."""
    kept = {
        k: s for k, s in keys.items() if not k.endswith(("_rp_bucket", "version")) and "decoder.adaptor.embed" not in k
    }
    return {key: formula_tensor(shape, zlib.crc32(key.encode()), *rule(key, shape)) for key, shape in kept.items()}
