"""The tensor boundary: every tensor that C++ must not read is refused, each with its own words."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode

from ofakern import _cpu
from ofakern.errors import OfakernTypeError, OfakernValueError


@pytest.mark.parametrize(
    ("tensor", "text"),
    [
        (None, "None"),
        (torch.zeros(2, 3), "float32[2, 3]"),
        (torch.zeros(()), "float32[]"),
        (torch.zeros(0, 4, dtype=torch.bfloat16), "bfloat16[0, 4]"),
        (torch.zeros(3, dtype=torch.float16), "float16[3]"),
        (torch.zeros(3, dtype=torch.float64), "float64[3]"),
        (torch.zeros(3, dtype=torch.int32), "int32[3]"),
        (torch.zeros(3, dtype=torch.int64), "int64[3]"),
        (torch.zeros(3, dtype=torch.uint8), "uint8[3]"),
        (torch.zeros(3, dtype=torch.bool), "uint8[3]"),
        (torch.zeros(3, requires_grad=True), "float32[3]"),
        (torch.nn.Parameter(torch.zeros(3)), "float32[3]"),
        (torch.zeros(4, 6).t()[1:, ::2], "float32[5, 2]"),
    ],
    ids=str,
)
def test_accepted(tensor: torch.Tensor | None, text: str) -> None:
    assert _cpu.describe(tensor) == text


@pytest.mark.parametrize("dtype", [torch.int16, torch.complex64, torch.float8_e4m3fn])
def test_unknown_dtypes_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(OfakernTypeError, match=rf"tensor must be float32, .* or bool, got {dtype}"):
        _cpu.describe(torch.zeros(3, dtype=dtype))


@pytest.mark.parametrize("value", [3, [1.0], np.zeros(3), "x"], ids=["int", "list", "numpy", "str"])
def test_what_is_no_tensor_is_refused(value: object) -> None:
    with pytest.raises(OfakernTypeError, match="describe: tensor must be a torch.Tensor, got"):
        _cpu.describe(value)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_a_fake_tensor_is_refused() -> None:
    with FakeTensorMode():
        fake = torch.empty(3)
    with pytest.raises(OfakernTypeError, match=r"tensor must hold data, got a .*FakeTensor without any"):
        _cpu.describe(fake)


@pytest.mark.parametrize("make", [lambda: torch.empty(3, device="meta"), lambda: torch.eye(2).to_sparse()])
def test_tensors_without_memory_are_refused_in_one_line(make: object) -> None:
    with pytest.raises(OfakernTypeError, match="tensor must be a dense CPU or CUDA tensor, got") as caught:
        _cpu.describe(make())  # type: ignore[operator]
    assert "\n" not in str(caught.value)


def test_a_negative_bit_view_is_refused() -> None:
    with pytest.raises(OfakernValueError, match="tensor must not be a negative-bit view") as caught:
        _cpu.describe(torch._neg_view(torch.ones(3)))
    assert str(caught.value).endswith("Try: tensor.resolve_neg()")
    imaginary = torch.zeros(3, dtype=torch.complex64).conj().imag
    assert imaginary.is_neg()
    with pytest.raises(OfakernValueError, match="negative-bit"):
        _cpu.describe(imaginary)
    assert _cpu.describe(imaginary.resolve_neg()) == "float32[3]"


def test_too_many_dimensions_are_refused() -> None:
    with pytest.raises(OfakernValueError, match="tensor must have at most 8 dimensions, got 9"):
        _cpu.describe(torch.zeros([1] * 9))


def test_tensors_under_vmap_are_refused() -> None:
    def body(x: torch.Tensor) -> torch.Tensor:
        _cpu.describe(x)
        return x

    with pytest.raises(OfakernTypeError, match="must"):
        torch.vmap(body)(torch.zeros(2, 3))


@pytest.mark.parametrize("name", ["forward", "backward", "forward_workspace", "backward_workspace"])
def test_a_wrong_argument_count(name: str) -> None:
    with pytest.raises(TypeError, match=r"attention takes \d+ arguments, got 1"):
        getattr(_cpu, f"attention_{name}")(None)
