"""What every drop-in layer shares: taking a module's place, refusing what the kernel cannot do, the call itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ofakern.errors import OfakernValueError
from ofakern.nn.relative import RelativeBlock, unfold
from ofakern.ops.attention import AttentionLayout, attention

MAX_WIDTH = 256


class CannotReplace(OfakernValueError):
    """A module whose place a drop-in layer cannot take. `reason` says why, without the place."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class DropIn(nn.Module):
    """A layer with the constructor, state-dict keys and outputs of the one it replaces.

    `backend` is the attention op's ("auto", "cpu", "reference", ...): an attribute, because constructors are the
    original's. `replaced_names` are the class names whose place `replacing` takes, `needed` the attributes it reads.
    """

    backend: str = "auto"
    replaced_names: ClassVar[tuple[str, ...]] = ()
    needed: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def replacing(cls, module: nn.Module) -> Self:
        """This class's layer in place of `module`, which stays usable.

        Both hold the *same* parameters, buffers, submodules and hooks (the registries themselves are shared, so a
        parameter set anew on one is seen by the other), so a state dict of one fits the other. Mode (train, eval) and
        plain attributes are copied.

        Raises CannotReplace, with the reason: another class, a subclass with its own forward, an option or a width
        that the kernel does not have.
        """
        where = f"{cls.__name__}.replacing"
        if isinstance(module, DropIn):
            raise CannotReplace(f"{where}: module must not be a drop-in layer already, got {type(module).__name__}")
        if type(module).__name__ not in cls.replaced_names:
            expected = " or ".join(cls.replaced_names)
            raise CannotReplace(f"{where}: module must be {expected}, got {type(module).__name__}")
        missing = [name for name in cls.needed if not hasattr(module, name)]
        if missing:
            raise CannotReplace(f"{where}: module must have {', '.join(cls.needed)}, got none of {', '.join(missing)}")
        if "forward" in vars(module):
            raise CannotReplace(f"{where}: module must not carry a forward of its own instance, got one")
        if getattr(module, "_compiled_call_impl", None) is not None:
            # The compiled call is bound to the module it was made for: ours would run the replaced forward.
            raise CannotReplace(f"{where}: module must not be compiled in place yet, got one that is")
        reason = cls.refusal(module)
        if reason is not None:
            raise CannotReplace(f"{where}: {reason}")
        layer = cls.__new__(cls)
        vars(layer).update(vars(module))
        layer.adopt()
        return layer

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        """Why this (right) module's options cannot be run here; None when they can."""
        return None

    def adopt(self) -> None:
        """Adds what the class holds beyond the replaced module's attributes."""


def width_refusal(width: int, name: str = "head width") -> str | None:
    """Why the kernels have no such head width, or None."""
    if width % 8 or not 8 <= width <= MAX_WIDTH:
        return f"{name} must be a multiple of 8 up to {MAX_WIDTH}, got {width}"
    return None


def check_width(where: str, width: int) -> None:
    """Raises OfakernValueError when the kernels have no such head width."""
    reason = width_refusal(width)
    if reason is not None:
        raise OfakernValueError(f"{where}: {reason}")


def refuse_arguments(where: str, arguments: Mapping[str, Any], names: Sequence[str]) -> None:
    """Raises OfakernValueError when one of `names` is given and asks for something (not None, not False)."""
    for name in names:
        value = arguments.get(name)
        if value is not None and value is not False:
            raise OfakernValueError(
                f"{where}: {name} must not be given (the kernel forms no matrix of probabilities), "
                f"got {type(value).__name__}\nTry: the replaced layer, for inspecting probabilities."
            )


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: AttentionLayout,
    *,
    tables: Sequence[Tensor] = (),
    q_pos: Tensor | None = None,
    k_pos: Tensor | None = None,
    head_scale: Tensor | None = None,
    scale: float,
    dropout_p: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """Attention on padded batches: q `[B,T,H,K]`, k `[B,S,H,K]`, v `[B,S,H,V]`, positions alike; `[B,T,H*V]`."""
    batch, length = q.shape[:2]
    out = attention(
        q.flatten(0, 1),
        k.flatten(0, 1),
        v.flatten(0, 1),
        layout,
        q_pos=None if q_pos is None else q_pos.flatten(0, 1),
        k_pos=None if k_pos is None else k_pos.flatten(0, 1),
        tables=tables,
        head_scale=head_scale,
        scale=scale,
        dropout_p=dropout_p,
        backend=backend,
    )
    return out.reshape(batch, length, -1)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """`[..., H * K]` to `[..., H, K]`, a view."""
    return x.view(*x.shape[:-1], heads, x.shape[-1] // heads)


def unfold_table(weight: Tensor, index: Callable[[torch.device], Tensor], block: Callable[[], RelativeBlock]) -> Tensor:
    """f32 (float64 for float64) `[H, R]`: the rows of a parameter `[P, H]` that the differences read.

    index: int64 `[R]`, made on a device; block: the same as a block, whose gradient is a sum of fixed order. The block
    is built on the CPU and cached by the caller; it is asked for only outside of graphs and when there is a gradient.
    """
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and weight.requires_grad):
        wide = weight if weight.dtype == torch.float64 else weight.float()
        return wide.index_select(0, index(weight.device)).t().contiguous()
    return unfold([weight], [block()])
