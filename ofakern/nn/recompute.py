"""Parts of a model of which only the input is kept for the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Elements below which the bookkeeping (a fraction of a millisecond) would cost more than the memory is worth.
_FEW = 2**16


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
