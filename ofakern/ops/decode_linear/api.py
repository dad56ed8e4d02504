"""The public door of `decode_linear`: weights are packed once, every argument is checked here."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ofakern.errors import BackendError, OfakernError, OfakernRuntimeError, OfakernTypeError, OfakernValueError
from ofakern.ops import log
from ofakern.ops.decode_linear import op
from ofakern.ops.decode_linear.reference import decode_linear_reference, quantize_rows
from ofakern.ops.library import STRAIGHT, straight

_WHERE = "decode_linear"
_PACKED = "takes no packed weight"
_PLAIN = "takes packed weights, and this one was not packed for the CPU"
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_logger = logging.getLogger("ofakern.ops.decode_linear")


@dataclass(frozen=True)
class PackedWeight:
    """One or several weights that share an input, in the form that `decode_linear` streams.

    data: uint8, opaque, for the CPU of this process; of a GPU the weights themselves `[sum of widths, K]`, which
    torch's products (cuBLAS, backend "reference") take as they are. widths: outputs of each weight. depth: K. dtype:
    of the rows that it multiplies. scale: float32 `[sum of widths]` of int8 weights. bias: float32 `[sum of widths]`.
    """

    data: Tensor
    widths: tuple[int, ...]
    depth: int
    dtype: torch.dtype
    scale: Tensor | None
    bias: Tensor | None

    @property
    def packed(self) -> bool:
        """Whether `data` is for the CPU kernel."""
        return self.data.dtype == torch.uint8

    @property
    def nbytes(self) -> int:
        """What one product reads of it."""
        return sum(x.numel() * x.element_size() for x in (self.data, self.scale, self.bias) if x is not None)


def prepack_weight(
    weights: Tensor | Sequence[Tensor],
    biases: Tensor | Sequence[Tensor | None] | None = None,
    *,
    int8: bool = False,
    backend: str = "auto",
) -> PackedWeight:
    """Packs linear layers for `decode_linear`; the weights themselves are no longer needed by it.

    Args:
        weights: `[N,K]` as torch's Linear has it, or several with one K (query, key and value): one product makes all.
            float32, bfloat16 or float16, on one device.
        biases: `[N]` for each weight or None; kept in float32.
        int8: weight-only int8, one scale per output: a quarter or a half of the bytes, each weight off by at most half
            a step (1/254 of its row's largest magnitude). The products stay in the rows' dtype with float32 sums.
            On a GPU it saves memory only: torch multiplies the weights out at every call.
        backend: who will multiply: "auto" packs CPU weights for the CPU kernel and leaves a GPU's as they are, for
            torch's products; "cpu" or "reference" is one of the two.

    Raises:
        OfakernTypeError, OfakernValueError: a weight or bias of the wrong type, dtype, device or shape.
        BackendError: the compiled kernels are missing.
    """
    parts = [weights] if isinstance(weights, Tensor) else list(weights)
    if not parts:
        raise OfakernValueError(f"{_WHERE}: weights must not be empty, got none")
    for n, weight in enumerate(parts):
        _check_weight(f"weights[{n}]", weight, parts[0])
    given = [biases] if isinstance(biases, Tensor) or biases is None else list(biases)
    given = [None] * len(parts) if biases is None else given
    if len(given) != len(parts):
        raise OfakernValueError(f"{_WHERE}: biases must be one per weight ({len(parts)}), got {len(given)}")
    whole = torch.cat([weight.detach() for weight in parts])
    stored, scale = quantize_rows(whole) if int8 else (whole, None)
    packed = op.BACKENDS.select(backend, whole) == "cpu"
    return PackedWeight(
        op.pack(stored, whole.dtype) if packed else stored,
        tuple(weight.shape[0] for weight in parts),
        whole.shape[1],
        whole.dtype,
        scale,
        _whole_bias(given, parts),
    )


def decode_linear(x: Tensor, weight: PackedWeight, backend: str = "auto") -> Tensor | tuple[Tensor, ...]:
    """`x @ W.T + b` on a packed weight: each weight is read once, up to 96 rows.

    Args:
        x: `[M,K]` in the weight's dtype, on its device.
        weight: from `prepack_weight`.
        backend: "auto", "cpu" for packed weights, "reference" (torch's products: on a GPU cuBLAS) for others.

    Returns:
        `[M,N]` in x's dtype, or one such view per weight when several were packed together. float32 sums.

    Raises:
        OfakernTypeError, OfakernValueError: an argument of the wrong type, dtype, device or shape.
        OfakernRuntimeError: x needs a gradient (it has none), or vmap.
        BackendError: the backend cannot run the call.
    """
    plain = type(weight) is PackedWeight and weight.packed and straight(backend, x)
    if plain and not (torch.is_grad_enabled() and x.requires_grad):
        try:
            return _run(STRAIGHT, x, weight)
        except OfakernError:
            pass  # refused: the checks below say why
    _check(x, weight)
    if backend == "auto":
        backend = "cpu" if weight.packed else "reference"
    chosen = op.BACKENDS.select(backend, x, None if weight.packed else _PLAIN)
    if chosen == "reference" and weight.packed:
        raise BackendError(f"{_WHERE}: backend 'reference' cannot run this call: {_PACKED}\nTry: F.linear.")
    if log.ENABLED and not torch.compiler.is_compiling():
        log.once(_logger, f"decode_linear x{list(x.shape)} widths {weight.widths} {x.dtype} -> {chosen}")
    return _run(chosen, x, weight)


def _run(backend: str, x: Tensor, weight: PackedWeight) -> Tensor | tuple[Tensor, ...]:
    widths = weight.widths
    out: Tensor
    if backend == "reference":
        out = decode_linear_reference(x, weight.data, weight.scale, weight.bias)
    else:
        out = op.FORWARD[backend](x, weight.data, sum(widths), weight.scale, weight.bias)
    return out if len(widths) == 1 else torch.split(out, list(widths), dim=1)


def refusals(x: Tensor, weight: PackedWeight, backend: str = "auto") -> tuple[str, dict[str, str | None]]:
    """What `ofakern.explain` prints of a call of `decode_linear`."""
    _check(x, weight)
    wanted, reasons = op.BACKENDS.reasons(backend, x, None if weight.packed else _PLAIN)
    if backend == "auto":
        wanted = "cpu" if weight.packed else "reference"
    return wanted, reasons | {"reference": _PACKED if weight.packed else None}


def _check(x: Tensor, weight: PackedWeight) -> None:
    if not isinstance(weight, PackedWeight):
        raise OfakernTypeError(
            f"{_WHERE}: weight must be a PackedWeight, got {type(weight).__name__}\nTry: prepack_weight"
        )
    if not isinstance(x, Tensor):
        raise OfakernTypeError(f"{_WHERE}: x must be a tensor, got {type(x).__name__}")
    if x.dtype != weight.dtype:
        raise OfakernTypeError(f"{_WHERE}: x must have the packed weight's dtype ({weight.dtype}), got {x.dtype}")
    if x.device != weight.data.device:
        raise OfakernValueError(f"{_WHERE}: x must be on the weight's device ({weight.data.device}), got {x.device}")
    if x.ndim != 2 or x.shape[1] != weight.depth:
        raise OfakernValueError(f"{_WHERE}: x must have shape [M,K={weight.depth}], got {list(x.shape)}")
    if torch.is_grad_enabled() and x.requires_grad:
        raise OfakernRuntimeError(
            f"{_WHERE}: x must not need a gradient, got requires_grad=True\nTry: torch.no_grad(), or F.linear to train."
        )


def _check_weight(name: str, weight: Tensor, first: Tensor) -> None:
    if not isinstance(weight, Tensor):
        raise OfakernTypeError(f"{_WHERE}: {name} must be a tensor, got {type(weight).__name__}")
    if weight.dtype not in _FLOATS:
        raise OfakernTypeError(f"{_WHERE}: {name} must be float32, bfloat16 or float16, got {weight.dtype}")
    if weight.ndim != 2 or weight.numel() == 0:
        raise OfakernValueError(f"{_WHERE}: {name} must have shape [N,K] and not be empty, got {list(weight.shape)}")
    if weight.device != first.device:
        raise OfakernValueError(
            f"{_WHERE}: {name} must be on weights[0]'s device ({first.device}), got {weight.device}"
        )
    if weight.dtype != first.dtype:
        raise OfakernTypeError(f"{_WHERE}: {name} must have weights[0]'s dtype ({first.dtype}), got {weight.dtype}")
    if weight.shape[1] != first.shape[1]:
        raise OfakernValueError(f"{_WHERE}: {name} must have weights[0]'s K ({first.shape[1]}), got {weight.shape[1]}")


def _whole_bias(biases: Sequence[Tensor | None], weights: Sequence[Tensor]) -> Tensor | None:
    if all(bias is None for bias in biases):
        return None
    whole = []
    for n, (bias, weight) in enumerate(zip(biases, weights, strict=True)):
        if bias is not None and tuple(bias.shape) != (weight.shape[0],):
            raise OfakernValueError(
                f"{_WHERE}: biases[{n}] must have shape [N={weight.shape[0]}], got {list(bias.shape)}"
            )
        none = torch.zeros(weight.shape[0], device=weight.device)
        whole.append(none if bias is None else bias.detach().float())
    return torch.cat(whole)
