"""Drop-ins for whole stacks: a subclass, made on the fly, of the replaced module's own class.

Everything that is not overridden stays as it is, and what asks for the class still finds it.
"""

from __future__ import annotations

import sys
from copy import copy
from typing import Any, ClassVar, Self

from torch import nn

from ofakern.nn.dropin import DropIn


class Around(DropIn):
    """A drop-in that keeps the replaced module's class. Its submodules' containers are its own, leaves are shared."""

    home: ClassVar[str | None] = None  # the Python module of the replaced class, where its output classes are

    @classmethod
    def replacing(cls, module: nn.Module) -> Self:
        if cls.home is None and type(module).__name__ in cls.replaced_names:
            kind = type(module)
            around: type[Self] = type(cls.__name__, (cls, kind), {"home": kind.__module__})
            return around.replacing(module)
        return super().replacing(module)

    def hold(self, **children: nn.Module) -> None:
        """Takes these submodules; the replaced module keeps its own."""
        vars(self)["_modules"] = dict(self._modules) | children

    def named_there(self, name: str) -> Any:
        """What the replaced class's Python module calls `name`."""
        assert self.home is not None
        return getattr(sys.modules[self.home], name)


def each_replaced(layers: Any, layer_class: type[DropIn]) -> Any:
    """A copy of a module list (of whatever class) with a drop-in layer in every place."""
    result = copy(layers)
    result._modules = {name: layer_class.replacing(layer) for name, layer in layers._modules.items()}
    return result
