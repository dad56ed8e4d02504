"""decode_linear: packed weights against float64 products on every instruction set, and its refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rule import assert_kept
from torch import Tensor

import ofakern
from ofakern.errors import BackendError, OfakernRuntimeError, OfakernTypeError, OfakernValueError
from ofakern.ops.decode_linear import PackedWeight, decode_linear, prepack_weight
from ofakern.ops.decode_linear.reference import decode_linear_reference, quantize_rows

pytestmark = pytest.mark.usefixtures("cpu")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = (
    (1, 1, 1),
    (5, 100, 33),
    (6, 64, 64),
    (7, 130, 257),
    (20, 48, 768),
    (80, 200, 96),
    (97, 70, 40),
    (200, 65, 64),
)


def draw(dtype: torch.dtype, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(dtype)


def check(x: Tensor, weight: Tensor, bias: Tensor | None, int8: bool) -> None:
    got = decode_linear(x, prepack_weight(weight, bias, int8=int8))
    assert isinstance(got, Tensor) and got.dtype == x.dtype
    stored, scale = quantize_rows(weight) if int8 else (weight, None)
    wide = stored if int8 else stored.double()
    scale = None if scale is None else scale.double()
    exact = decode_linear_reference(x.double(), wide, scale, None if bias is None else bias.double())
    peer = decode_linear_reference(x, stored, None if scale is None else scale.float(), bias)
    values = stored.double().abs() if scale is None else stored.double().abs() * scale[:, None]
    size = x.double().abs() @ values.T + (0.0 if bias is None else bias.double().abs())
    # In half precision the result is rounded, not the running sum: its own size counts, about K**0.5 times smaller.
    rounded = size if x.dtype == torch.float32 else torch.maximum(size / x.shape[1] ** 0.5, exact.abs())
    assert_kept("out", got, exact, peer, rounded, x.dtype)


@pytest.mark.parametrize("int8", [False, True], ids=["own dtype", "int8"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products(isa: str, shape: tuple[int, int, int], dtype: torch.dtype, int8: bool) -> None:
    rows, width, depth = shape
    bias = draw(torch.float32, width) if rows % 2 else None
    check(draw(dtype, rows, depth), draw(dtype, width, depth), bias, int8)


def test_a_row_of_zeros_has_a_scale() -> None:
    weight = draw(torch.float32, 4, 8)
    weight[2] = 0
    stored, scale = quantize_rows(weight)
    assert scale[2] == 1 and not stored[2].any()
    assert ((stored * scale[:, None] - weight).abs() <= scale[:, None] / 2 + 1e-7).all()


@pytest.mark.parametrize("int8", [False, True])
def test_several_weights_share_one_product(int8: bool) -> None:
    weights, x = [draw(torch.bfloat16, n, 40) for n in (30, 64, 7)], draw(torch.bfloat16, 5, 40)
    biases = [draw(torch.float32, 30), None, draw(torch.float32, 7)]
    parts = decode_linear(x, prepack_weight(weights, biases, int8=int8))
    assert isinstance(parts, tuple)
    for part, weight, bias in zip(parts, weights, biases, strict=True):
        alone = decode_linear(x, prepack_weight(weight, bias, int8=int8))
        assert isinstance(alone, Tensor) and torch.equal(part, alone)


@pytest.mark.parametrize("rows", [5, 120])
def test_bits_do_not_depend_on_threads(rows: int) -> None:
    x, weight = draw(torch.bfloat16, rows, 200), prepack_weight(draw(torch.bfloat16, 300, 200))
    first = decode_linear(x, weight)
    torch.set_num_threads(3)
    assert isinstance(first, Tensor) and torch.equal(first, decode_linear(x, weight))  # type: ignore[arg-type]


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    """A beam's numbers stay the same when other beams join the batch."""
    x, weight = draw(torch.float32, 20, 64), prepack_weight(draw(torch.float32, 100, 64))
    whole = decode_linear(x, weight)
    for rows in (1, 5, 13):
        assert torch.equal(decode_linear(x[:rows], weight), whole[:rows])  # type: ignore[arg-type,index]


def test_views_and_empty_rows() -> None:
    weight = prepack_weight(draw(torch.float32, 9, 12))
    x = draw(torch.float32, 6, 24)
    for view in (x[:, 12:], x[::2, :12], x[:, ::2], x.T[:12].T):
        assert torch.equal(decode_linear(view, weight), decode_linear(view.contiguous(), weight))  # type: ignore[arg-type]
    assert tuple(decode_linear(x[:0, :12], weight).shape) == (0, 9)  # type: ignore[union-attr]


def test_poisoned_outputs_are_all_written(cpu: Any) -> None:
    weight = prepack_weight(draw(torch.float32, 70, 12))
    for rows in (3, 100):
        x = draw(torch.float32, rows, 12)
        arguments = (x, weight.data, None, None, 1)
        out = torch.full((rows, 70), torch.nan)
        scratch = torch.full((cpu.decode_linear_workspace(*arguments),), 255, dtype=torch.uint8)
        cpu.decode_linear_forward(out, scratch, *arguments)
        assert torch.isfinite(out).all()
        with pytest.raises(OfakernValueError, match="workspace"):
            cpu.decode_linear_forward(out, scratch[:64], *arguments)


def test_a_packed_weight_belongs_to_its_instruction_set(cpu: Any) -> None:
    before = cpu.isa()
    weight = prepack_weight(draw(torch.float32, 4, 4))
    try:
        cpu.set_isa("scalar" if before != "scalar" else "avx2")
        with pytest.raises(OfakernValueError, match="packed must be packed for the active instruction set"):
            decode_linear(draw(torch.float32, 1, 4), weight)
    finally:
        cpu.set_isa(before)


def test_what_is_no_packed_weight_is_refused(cpu: Any) -> None:
    weight = prepack_weight(draw(torch.float32, 4, 4))
    x = draw(torch.float32, 1, 4)
    for data, message in (
        (torch.zeros(128, dtype=torch.uint8), "come from prepack_weight"),
        (weight.data[:-1].clone(), "be whole"),
        (weight.data[:8].clone(), "come from prepack_weight"),
    ):
        with pytest.raises(OfakernValueError, match=message):
            cpu.decode_linear_workspace(x, data, None, None, 1)
    with pytest.raises(OfakernValueError, match="packed for x's dtype"):
        cpu.decode_linear_workspace(x.bfloat16(), weight.data, None, None, 1)


@pytest.mark.parametrize("int8", [False, True])
def test_opcheck_and_compile(int8: bool) -> None:
    weight = prepack_weight(draw(torch.float32, 9, 12), draw(torch.float32, 9), int8=int8)
    x = draw(torch.float32, 3, 12)
    inputs = (x, weight.data, 9, weight.scale, weight.bias)
    torch.library.opcheck(torch.ops.ofakern.decode_linear_fwd.default, inputs)
    torch._dynamo.reset()
    compiled = torch.compile(lambda rows: decode_linear(rows * 2, weight), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), decode_linear(x * 2, weight))
    with pytest.raises(OfakernRuntimeError, match="under vmap"):
        torch.vmap(lambda rows: decode_linear(rows, weight))(x.expand(2, 3, 12))


def test_explain_names_the_backend() -> None:
    weight = prepack_weight(draw(torch.float32, 4, 4))
    text = ofakern.explain("decode_linear", draw(torch.float32, 1, 4), weight)
    assert "runs on 'cpu'" in text and "takes no packed weight" in text


W = torch.ones(4, 6)
REFUSED_WEIGHTS: list[tuple[str, type[Exception], Any, Any]] = [
    ("weights must not be empty", OfakernValueError, [], None),
    ("weights\\[0\\] must be a tensor", OfakernTypeError, [3], None),
    ("weights\\[0\\] must be float32", OfakernTypeError, W.double(), None),
    ("weights\\[0\\] must have shape", OfakernValueError, W[0], None),
    ("weights\\[1\\] must have weights\\[0\\]'s dtype", OfakernTypeError, [W, W.half()], None),
    ("weights\\[1\\] must have weights\\[0\\]'s K", OfakernValueError, [W, W[:, 1:]], None),
    ("biases must be one per weight", OfakernValueError, [W, W], [None]),
    ("biases\\[0\\] must have shape", OfakernValueError, W, torch.ones(3)),
]


@pytest.mark.parametrize(("message", "error", "weights", "biases"), REFUSED_WEIGHTS)
def test_refused_weights(message: str, error: type[Exception], weights: Any, biases: Any) -> None:
    with pytest.raises(error, match=message):
        prepack_weight(weights, biases)


REFUSED: list[tuple[str, type[Exception], dict[str, Any]]] = [
    ("weight must be a PackedWeight", OfakernTypeError, {"weight": W}),
    ("x must be a tensor", OfakernTypeError, {"x": 1}),
    ("x must have the packed weight's dtype", OfakernTypeError, {"x": torch.ones(2, 6).half()}),
    ("x must have shape \\[M,K=6\\]", OfakernValueError, {"x": torch.ones(2, 5)}),
    ("x must not need a gradient", OfakernRuntimeError, {"x": torch.ones(2, 6, requires_grad=True)}),
    ("takes no packed weight", BackendError, {"backend": "reference"}),
    ("no CUDA kernel for decode_linear", BackendError, {"backend": "cuda"}),
]


@pytest.mark.parametrize(("message", "error", "changes"), REFUSED)
def test_refusals(message: str, error: type[Exception], changes: dict[str, Any]) -> None:
    packed: PackedWeight = prepack_weight(W)
    with pytest.raises(error, match=message):
        decode_linear(**({"x": torch.ones(2, 6), "weight": packed} | changes))


@pytest.mark.parametrize("int8", [False, True])
def test_weights_that_are_not_packed_take_torchs_products(int8: bool) -> None:
    """As they stand on a GPU; here by name."""
    g = torch.Generator().manual_seed(5)
    x, weights = torch.randn(3, 8, generator=g), [torch.randn(n, 8, generator=g) for n in (4, 6)]
    biases = [None, torch.randn(6, generator=g)]
    plain = prepack_weight(weights, biases, int8=int8, backend="reference")
    packed = prepack_weight(weights, biases, int8=int8)
    for have, want in zip(decode_linear(x, plain), decode_linear(x, packed), strict=True):
        torch.testing.assert_close(have, want, atol=1e-5, rtol=1e-5)
    text = ofakern.explain("decode_linear", x, plain)
    assert "runs on 'reference'" in text and "not packed for the CPU" in text
    with pytest.raises(BackendError, match="not packed for the CPU"):
        decode_linear(x, plain, backend="cpu")
