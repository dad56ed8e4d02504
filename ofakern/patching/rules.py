"""Which module a drop-in layer can take the place of, and which modules must be replaced together.

Modules are recognised by their class name and attributes, so no other library is imported.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache

from torch import nn

import ofakern.nn as nn_
from ofakern.nn.dropin import CannotReplace, DropIn
from ofakern.patching.ofa_hf import OFADecoder, OFAEncoder
from ofakern.patching.ofasys import OFASysDecoder, OFASysEncoder

_ATTENTION = re.compile(r"attention|attn", re.IGNORECASE)

# What may be replaced. The other layers of `ofakern.nn` need a caller that knows them.
_LAYERS: tuple[type[DropIn], ...] = (
    *(nn_.T5Attention, nn_.T5LayerNorm, nn_.UMT5Attention, nn_.BloomAttention, nn_.MptAttention),
    *(nn_.BeitAttention, nn_.BeitRelativePositionBias, nn_.PatchEmbeddings),
    *(nn_.SwinAttention, nn_.SwinPatchEmbeddings, nn_.MultiheadAttention),
    *(OFAEncoder, OFADecoder, OFASysEncoder, OFASysDecoder),
)

# Layers that hand each other a bias which no other class reads -> its name, and the end of the class name of the module
# inside which all of them are replaced or none.
_TOGETHER = {
    "T5Attention": ("T5 bias", "Stack"),
    "BeitAttention": ("BEiT bias", "Model"),
    "BeitRelativePositionBias": ("BEiT bias", "Model"),
}

# torch's attention returns weights unless it is told not to; these callers tell it.
_CALLERS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


@cache
def _layers() -> dict[str, type[DropIn]]:
    return {name: layer for layer in _LAYERS for name in layer.replaced_names}


def layer_for(module: nn.Module) -> type[DropIn] | None:
    """The drop-in class for modules of this name; `replacement` still looks at the attributes and the caller."""
    layer = _layers().get(type(module).__name__)
    if layer in (OFASysEncoder, OFASysDecoder) and not hasattr(module, "adaptor"):
        return None  # torch's classes have these names too; what is inside them may be replaced
    return layer


def replacement(module: nn.Module, layer: type[DropIn], parent: nn.Module) -> DropIn | str:
    """The layer in the module's place, sharing its parameters; or why there can be none."""
    try:
        result = layer.replacing(module)
    except CannotReplace as error:
        return error.reason
    if layer is nn_.MultiheadAttention and not isinstance(parent, _CALLERS):
        return (
            "its caller may ask for attention weights (need_weights=True is torch's default); "
            "where it does not: ofakern.nn.MultiheadAttention.replacing(module)"
        )
    return result


def group_of(layer: type[DropIn], ancestors: Sequence[tuple[str, nn.Module]]) -> tuple[str, str] | None:
    """Which modules this one must be replaced together with: those of an equal group; None: it stands for itself.

    ancestors: the modules around it from the root down, with their paths; the root counts where no other one fits.
    """
    if layer.__name__ not in _TOGETHER:
        return None
    shared, ending = _TOGETHER[layer.__name__]
    inside = [path for path, module in ancestors if type(module).__name__.endswith(ending)]
    return shared, inside[-1] if inside else ""


def attention_like(module: nn.Module) -> bool:
    """Whether the class name speaks of attention: worth a line in the report when it stays."""
    return _ATTENTION.search(type(module).__name__) is not None
