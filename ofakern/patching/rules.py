"""Which module a drop-in layer can take the place of, and which modules must be replaced together.

Modules are recognised by their class name and attributes, so no other library is imported.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache

from torch import nn

from ofakern.nn import dropin
from ofakern.nn.dropin import CannotReplace, DropIn

_ATTENTION = re.compile(r"attention|attn", re.IGNORECASE)

# A drop-in layer whose bias only its own kind reads -> the end of the class name of the module inside which all or none
# are replaced.
_TOGETHER = {"T5Attention": "Stack"}


@cache
def _layers() -> dict[str, type[DropIn]]:
    found = [getattr(dropin, name) for name in dropin.__all__]
    layers = [item for item in found if isinstance(item, type) and issubclass(item, DropIn)]
    return {name: layer for layer in layers for name in layer.replaced_names}


def layer_for(module: nn.Module) -> type[DropIn] | None:
    """The drop-in class for modules of this name; its `replacing` still looks at the attributes."""
    return _layers().get(type(module).__name__)


def replacement(module: nn.Module, layer: type[DropIn]) -> DropIn | str:
    """The layer in the module's place, sharing its parameters; or why there can be none."""
    try:
        return layer.replacing(module)
    except CannotReplace as error:
        return error.reason


def group_of(layer: type[DropIn], ancestors: Sequence[tuple[str, nn.Module]]) -> str | None:
    """Path of the module inside which all modules of this kind are replaced or none; None: each for itself.

    ancestors: from the root down, with their paths; the root where no other module fits.
    """
    ending = _TOGETHER.get(layer.__name__)
    if ending is None:
        return None
    inside = [path for path, module in ancestors if type(module).__name__.endswith(ending)]
    return inside[-1] if inside else ""


def attention_like(module: nn.Module) -> bool:
    """Whether the class name speaks of attention: worth a line in the report when it stays."""
    return _ATTENTION.search(type(module).__name__) is not None
