"""While a model is patched, asking it for attention weights raises: a drop-in layer never forms them.

The layers refuse such arguments where they see them, but a model may also record its layers' outputs by hooks, and
would then return an empty tuple without a word.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from ofakern.errors import OfakernValueError

_ASKING = ("output_attentions", "output_cross_attentions")


def guard_model(model: nn.Module, layers: Iterable[nn.Module]) -> list[Callable[[], None]]:
    """Guards every module that has a config and holds one of `layers`; returns what takes the guards off again."""
    ours = {id(layer) for layer in layers}
    guarded = [
        module
        for module in model.modules()
        if id(module) not in ours
        and hasattr(module, "config")
        and any(id(inner) in ours for inner in module.modules())
        and _is_model(module)
    ]
    return [module.register_forward_pre_hook(_refuse_attentions, with_kwargs=True).remove for module in guarded]


def _is_model(module: nn.Module) -> bool:
    # transformers' models; their inner blocks may carry the config too, and are never asked by users.
    return any(base.__name__ == "PreTrainedModel" for base in type(module).__mro__)


def _refuse_attentions(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    config = getattr(module, "config", None)
    for name in _ASKING:
        asked = kwargs.get(name)
        if asked or (asked is None and getattr(config, name, False)):
            raise OfakernValueError(
                f"{type(module).__name__}: {name} must not be set on a patched model: attention weights are never "
                f"formed, got {asked if asked is not None else 'True in the config'}\n"
                "Try: report.undo(), then ask the original model."
            )
