"""What a call costs before any work is done: every op on tensors without rows, beside one call of torch's.

Phases: `without` a gradient (nothing asks for one) and `with`, the forward call whose parameters ask for one. Empty
tensors pass all checks, conversions and allocations, and leave the kernel nothing to do: the time is the overhead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.core import DTYPES, Contender, Phase, Unavailable, Work
from ofakern.ops.attention import AttentionLayout, RelativeTerm, attention, intervals
from ofakern.ops.cross_entropy import cross_entropy
from ofakern.ops.decode_linear import decode_linear, prepack_weight
from ofakern.ops.layer_norm import add_layer_norm, embed_layer_norm, gelu_layer_norm, head_scale_layer_norm
from ofakern.ops.linear import linear
from ofakern.ops.log_mel import kaldi, log_mel
from ofakern.ops.patch_embed import patch_embed
from ofakern.ops.rms_norm import rms_norm
from ofakern.ops.rotation_6d import rotation_6d
from ofakern.ops.routed_ffn import routed_linear

OP = "call_overhead"
OURS = "cpu"
PHASES: tuple[Phase, ...] = ("without", "with")
TIMED_DTYPES = ("f32",)
ABOUT = {"torch": "the nearest single call of torch: layer_norm, scaled_dot_product_attention, linear, cross_entropy"}
WIDTH = 64

Call = Callable[..., Any]


@dataclass(frozen=True)
class Spec:
    """A case: `ours` and `torch` (None: no single call does it) take the same tensors of `shapes`."""

    name: str
    description: str
    ours: Callable[[torch.dtype], Call]
    shapes: tuple[tuple[int, ...], ...]
    torch: Callable[[torch.dtype], Call] | None = None
    differentiable: bool = True
    quick: bool = True
    default: bool = True

    @property
    def phases(self) -> tuple[Phase, ...]:
        return PHASES if self.differentiable else PHASES[:1]


@dataclass
class Problem:
    spec: Spec
    dtype: torch.dtype
    plain: list[Tensor]
    leaves: list[Tensor]


def _attention(terms: int) -> Callable[[torch.dtype], Call]:
    none = torch.empty(0, dtype=torch.int32)
    term = RelativeTerm(none, none, torch.empty(0, 2, dtype=torch.int32), 7)
    layout = AttentionLayout.build(intervals.full([0]), [0], [0], [term] * terms)

    def call(q: Tensor, k: Tensor, v: Tensor, *bias: Tensor) -> Tensor:
        if not terms:
            return attention(q, k, v, layout, backend=OURS)
        q_pos, k_pos, table, head_scale = bias
        return attention(q, k, v, layout, q_pos, k_pos, [table], head_scale, backend=OURS)

    return lambda dtype: call


def _decode(dtype: torch.dtype) -> Call:
    packed = prepack_weight(torch.ones(WIDTH, WIDTH, dtype=dtype))
    return lambda x: decode_linear(x, packed)


def _linear(dtype: torch.dtype) -> Call:
    weight = torch.ones(WIDTH, WIDTH, dtype=dtype)
    return lambda x: F.linear(x, weight)


def _layer_norm(dtype: torch.dtype) -> Call:
    return lambda x, *affine: F.layer_norm(x, ROW, *affine[-2:])


def _log_mel(dtype: torch.dtype) -> Call:
    convention = kaldi()
    return lambda wave: log_mel(wave, convention=convention, backend=OURS)


ROW, EMPTY = (WIDTH,), (0, WIDTH)
HEADS = (0, 2, WIDTH)
NO_IDS = torch.empty(0, dtype=torch.int64)
_IMAGE = torch.empty(0, 3, 16, 16, dtype=torch.uint8)

CASES: dict[str, Spec] = {
    spec.name: spec
    for spec in (
        Spec(
            "attention",
            "attention without bias",
            _attention(0),
            (HEADS,) * 3,
            lambda dtype: lambda q, k, v: F.scaled_dot_product_attention(q[None], k[None], v[None]),
        ),
        Spec(
            "attention_bias",
            "attention with a factored and a relative term and a head scale",
            _attention(1),
            (*(HEADS,) * 5, (2, 7), (2,)),
        ),
        Spec(
            "add_layer_norm",
            "x, residual, weight, bias",
            lambda _: add_layer_norm,
            (EMPTY, EMPTY, ROW, ROW),
            _layer_norm,
        ),
        Spec("gelu_layer_norm", "x, weight, bias", lambda _: gelu_layer_norm, (EMPTY, ROW, ROW), _layer_norm),
        Spec(
            "head_scale_layer_norm",
            "x, head_scale, weight, bias",
            lambda _: head_scale_layer_norm,
            ((0, 2, WIDTH // 2), (2,), ROW, ROW),
        ),
        Spec(
            "embed_layer_norm",
            "tokens, table, weight, bias",
            lambda dtype: lambda *inputs: embed_layer_norm(NO_IDS, *inputs),
            ((8, WIDTH), ROW, ROW),
        ),
        Spec(
            "rms_norm",
            "x, weight",
            lambda _: rms_norm,
            (EMPTY, ROW),
            lambda _: lambda x, weight: F.rms_norm(x, ROW, weight, 1e-6),
        ),
        Spec("rotation_6d", "x", lambda _: rotation_6d, ((0, 6),)),
        Spec(
            "cross_entropy",
            "hidden, weight, labels",
            lambda dtype: lambda h, w: cross_entropy(h, w, NO_IDS, backend=OURS).loss,
            (EMPTY, (8, WIDTH)),
            lambda dtype: lambda h, w: F.cross_entropy(F.linear(h, w), NO_IDS, reduction="sum"),
        ),
        Spec(
            "routed_linear",
            "x, two experts' weights and biases",
            lambda _: lambda x, a, b, c, d: routed_linear(x, [a, b], [c, d], [0, 0], backend=OURS),
            (EMPTY, (WIDTH, WIDTH), (WIDTH, WIDTH), ROW, ROW),
        ),
        Spec(
            "linear",
            "x, weight, bias",
            lambda _: lambda x, weight, bias: linear(x, weight, bias, backend=OURS),
            (EMPTY, (WIDTH, WIDTH), ROW),
            lambda _: F.linear,
        ),
        Spec(
            "patch_embed",
            "no image, weight",
            lambda _: lambda weight: patch_embed(_IMAGE, weight, backend=OURS),
            ((WIDTH, 3, 16, 16),),
        ),
        Spec("decode_linear", "x, a packed weight", _decode, (EMPTY,), _linear, differentiable=False),
        Spec("log_mel", "no samples", _log_mel, ((0,),), differentiable=False),
    )
}


def make(spec: Spec, dtype: str) -> Problem:
    plain = [torch.ones(shape, dtype=DTYPES[dtype]) for shape in spec.shapes]
    return Problem(spec, DTYPES[dtype], plain, [x.clone().requires_grad_() for x in plain])


def work(spec: Spec, dtype: str, phase: Phase) -> Work:
    """Nothing but the parameters' bytes: there is no roofline for an overhead."""
    return Work(0.0, float(DTYPES[dtype].itemsize * WIDTH))


def verify(spec: Spec, dtype: str, harness: Any) -> None:
    """Raises AssertionError unless a call gives a result without rows that differentiates where it should."""
    problem = make(spec, dtype)
    call = spec.ours(problem.dtype)
    assert not _first(call(*problem.plain)).requires_grad
    if spec.differentiable:
        out = _first(call(*problem.leaves))
        assert out.numel() <= 1 and out.requires_grad
        assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.sum(), problem.leaves))


def _first(output: Any) -> Tensor:
    first: Tensor = output[0] if isinstance(output, tuple) else output
    return first


def _contender(name: str, call: Call, problem: Problem) -> Contender:
    def step(inputs: Sequence[Tensor]) -> Callable[[], Any]:
        return lambda: call(*inputs)

    steps = {"without": step(problem.plain)}
    if problem.spec.differentiable:
        steps["with"] = step(problem.leaves)
    return Contender(name, steps["without"], exact=False, steps=steps, forward_only="it gives no gradient")


def ours(problem: Problem) -> Contender:
    return _contender(OURS, problem.spec.ours(problem.dtype), problem)


def peer(problem: Problem) -> Contender:
    if problem.spec.torch is None:
        raise Unavailable("no single call of torch's comes near")
    return _contender("torch", problem.spec.torch(problem.dtype), problem)


CONTENDERS: dict[str, Callable[[Any], Contender]] = {OURS: ours, "torch": peer}
