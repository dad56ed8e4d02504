"""6-D rotations in CUDA C++: the rule of the CPU's kernel, on an emulated GPU and on a real one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rotation_6d_rule import assert_rule, run
from torch import Tensor

import ofakern
from ofakern.errors import BackendError, OfakernRuntimeError
from ofakern.ops import native
from ofakern.ops.rotation_6d import rotation_6d
from ofakern.ops.rotation_6d.reference import rotation_6d_reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def on(device: torch.device, *tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.to(device) for tensor in tensors)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0,), (1,), (127,), (128,), (129,), (3, 100)], ids=str)
def test_kernel_keeps_the_rule(cuda_device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    torch.manual_seed(len(shape))
    x, dout = torch.randn(*shape, 6).to(dtype), torch.randn(*shape, 3, 3).to(dtype)
    out, dx = run(rotation_6d, *on(cuda_device, x, dout), backend="cuda")
    assert_rule(out.cpu(), dx.cpu(), x, dout)


def test_no_direction_is_finite(cuda_device: torch.device) -> None:
    x = torch.tensor([[0.0, 0, 0, 1, 0, 0], [1, 0, 0, 0, 0, 0], [1, 0, 0, 2, 0, 0], [0, 0, 0, 0, 0, 0]])
    x, dout = on(cuda_device, x, torch.ones(4, 3, 3))
    for have, want in zip(run(rotation_6d, x, dout, backend="cuda"), run(rotation_6d_reference, x, dout), strict=True):
        torch.testing.assert_close(have, want)


def test_the_same_bits_every_time(cuda_device: torch.device) -> None:
    x, dout = on(cuda_device, torch.randn(1000, 6), torch.randn(1000, 3, 3))
    first = run(rotation_6d, x, dout, backend="cuda")
    for seed in (2, 3):
        if cuda_device.type == "cpu":
            native.cuda_kernels.set_seed(seed)
        assert all(torch.equal(a, b) for a, b in zip(first, run(rotation_6d, x, dout, backend="cuda"), strict=True))


def test_strides_and_negative_views(cuda_device: torch.device) -> None:
    (x,) = on(cuda_device, torch.randn(6, 9).t())
    want = rotation_6d(x.contiguous(), backend="cuda")
    assert torch.equal(rotation_6d(x, backend="cuda"), want)
    assert torch.equal(rotation_6d(torch._neg_view(-x), backend="cuda"), want)


def test_opcheck_and_compile(cuda_device: torch.device) -> None:
    (x,) = on(cuda_device, torch.randn(5, 6))
    torch.library.opcheck(torch.ops.ofakern.rotation_6d_fwd, (x,))

    def function(x: Tensor) -> Tensor:
        return rotation_6d(x, backend="cuda") * 2

    leaf = x.clone().requires_grad_()
    have: Any = torch.compile(function, fullgraph=True, backend="aot_eager")(leaf)
    assert torch.equal(have, function(x))
    have.sum().backward()
    torch.testing.assert_close(leaf.grad, run(rotation_6d, x, torch.full_like(have, 2.0), backend="cuda")[1])


def test_a_failed_launch_returns_nothing(cuda_device: torch.device) -> None:
    if cuda_device.type != "cpu":
        pytest.skip("failures are made by the emulator")
    native.cuda_kernels.fail_next_launch(700)
    with pytest.raises(OfakernRuntimeError, match="CUDA kernel rotation_forward<float>: not launched: an earlier"):
        rotation_6d(torch.randn(4, 6), backend="cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is said without a GPU")
def test_without_a_gpu_the_reason_is_told() -> None:
    with pytest.raises(BackendError, match="backend 'cuda' cannot run this call: "):
        rotation_6d(torch.randn(4, 6), backend="cuda")
    assert "cuda" in ofakern.explain("rotation_6d", torch.randn(4, 6))
