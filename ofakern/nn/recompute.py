"""What keeps a backward pass small: parts of which only the input is kept, and freed memory that is given back."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ofakern.ops import native

# Elements below which the bookkeeping (a fraction of a millisecond) would cost more than the memory is worth.
_FEW = 2**16
# Elements of a backbone's features below which what stands behind them is little too.
_LARGE = 2**20


def recomputed(part: Callable[[Tensor, bool], Tensor], x: Tensor) -> Tensor:
    """`part(x, True)`, keeping x alone for the backward pass, which calls `part(x, False)` as far as it needs to.

    The second call must give the same and change nothing. A compiled graph decides for itself what it keeps, and
    torch.func's transforms know no checkpoints.
    """
    needed = torch.is_grad_enabled() and x.requires_grad and x.numel() >= _FEW
    if not needed or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return part(x, True)
    calls = count()
    y: Tensor = checkpoint(lambda x: part(x, next(calls) == 0), x, use_reentrant=False, preserve_rng_state=False)
    return y


def freed_behind(x: Tensor) -> Tensor:
    """x; when its gradient has come, the memory that the layers behind it have freed goes back to the system.

    The C library keeps what was freed between blocks that stay, as activations between gradients are. A backbone in
    front of the layers needs blocks of other sizes and would stand beside all of it.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return x
    cpu = native.cpu
    if cpu is not None and x.device.type == "cpu" and x.numel() >= _LARGE and x.grad_fn is not None:
        x.register_hook(lambda _: cpu.give_back_memory())  # type: ignore[no-untyped-call]
    return x
