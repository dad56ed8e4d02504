"""Masks as libraries give them, recognised exactly: each query's keys must be one run, or the mask is refused.

A mask is bool (True: takes part, or True: left out, as the caller says) or additive: 0 takes part, -inf or a dtype's
lowest number (float16's -65504 and below) is left out. Nothing else is a mask: a learned bias has its own inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ofakern.errors import OfakernTypeError, OfakernValueError

Kind = Literal["keys", "pairs", "heads", "full"]

# The largest "minus infinity" in use is float16's lowest number.
_LOWEST = torch.finfo(torch.float16).min


@dataclass(frozen=True, eq=False)
class Mask:
    """A mask tensor and how to read it.

    kind: "keys" `[B,S]`, "pairs" `[T,S]`, "heads" `[B*H,T,S]`, "full" `[B,H,T,S]` (any size may be 1).
    left_out: of a bool mask, True marks keys that take no part (torch.nn, MPT, fairseq); False: keys that do (SDPA).
    """

    tensor: Tensor
    kind: Kind = "full"
    left_out: bool = False
    where: str = "attention"


def runs(mask: Mask, batch: int, queries: int, keys: int) -> tuple[np.ndarray, np.ndarray]:
    """First key and end of the keys each query sees: int64 `[B or 1, T or 1]`, counted inside a sample (0, 0: none).

    Reads the mask's values, so a mask on a device is copied. Raises OfakernTypeError and OfakernValueError for a mask
    that is not one run of keys per query, differs between heads, has other values, needs a gradient or does not fit.
    """
    _check(mask, batch, queries, keys)
    allowed = _allowed(mask, _four_dimensional(mask, batch, queries, keys).detach())
    if allowed.shape[1] > 1:
        if not bool((allowed == allowed[:, :1]).all()):
            raise OfakernValueError(f"{mask.where}: mask must be the same for every head, got one that differs")
        allowed = allowed[:, :1]
    seen = allowed[:, 0].expand(-1, -1, keys).cpu().numpy()
    count = np.count_nonzero(seen, axis=-1)
    lo = np.where(count > 0, seen.argmax(-1), 0)
    end = np.where(count > 0, keys - seen[..., ::-1].argmax(-1), 0)
    if (end - lo != count).any():
        b, i = (int(x) for x in np.argwhere(end - lo != count)[0])
        raise OfakernValueError(
            f"{mask.where}: mask must be one run of keys per query, got holes in sample {b}, query {i}\n"
            "Try: padding at one end of a sample, causal or prefix masks; other masks need the replaced layer."
        )
    return lo, end


def _check(mask: Mask, batch: int, queries: int, keys: int) -> None:
    tensor = mask.tensor
    if not isinstance(tensor, Tensor) or not (tensor.dtype == torch.bool or tensor.is_floating_point()):
        got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise OfakernTypeError(f"{mask.where}: mask must be a bool or floating tensor, got {got}")
    if tensor.requires_grad:
        raise OfakernValueError(
            f"{mask.where}: mask must not need a gradient, got a learned bias\n"
            "Try: the layer's own relative positions; the kernel takes masks that are runs of keys."
        )
    dimensions = {"keys": 2, "pairs": 2, "heads": 3, "full": 4}[mask.kind]
    sizes = {"keys": (batch, keys), "pairs": (queries, keys), "heads": (queries, keys), "full": (queries, keys)}
    wanted = sizes[mask.kind]
    shape = tuple(tensor.shape)
    fits = len(shape) == dimensions and all(have in (1, want) for have, want in zip(shape[-2:], wanted, strict=True))
    if fits and mask.kind == "heads":
        fits = batch > 0 and shape[0] % batch == 0
    if fits and mask.kind == "full":
        fits = shape[0] in (1, batch)
    if not fits:
        letters = {"keys": "[B,S]", "pairs": "[T,S]", "heads": "[B*H,T,S]", "full": "[B,H,T,S]"}[mask.kind]
        raise OfakernValueError(
            f"{mask.where}: mask must be {letters} with B={batch}, T={queries}, S={keys}, got {list(shape)}"
        )


def _four_dimensional(mask: Mask, batch: int, queries: int, keys: int) -> Tensor:
    """`[B,H,T,S]`, repeated dimensions (expanded ones too) of size 1, so that nothing is read twice."""
    tensor = mask.tensor
    if mask.kind == "keys":
        tensor = tensor[:, None, None, :]
    elif mask.kind == "pairs":
        tensor = tensor[None, None]
    elif mask.kind == "heads":
        tensor = tensor.reshape(batch, -1, *tensor.shape[1:])
    for dimension in range(3):
        if tensor.stride(dimension) == 0 and tensor.shape[dimension] > 1:
            tensor = tensor.narrow(dimension, 0, 1)
    return tensor


def _allowed(mask: Mask, tensor: Tensor) -> Tensor:
    if tensor.dtype == torch.bool:
        return ~tensor if mask.left_out else tensor
    allowed = tensor == 0
    if not bool((allowed | (tensor <= _LOWEST)).all()):
        raise OfakernValueError(
            f"{mask.where}: mask must hold 0 and -inf (or the dtype's lowest number), got other values\n"
            "Try: a bool mask; a bias of positions belongs to the layer's own relative positions."
        )
    return allowed
