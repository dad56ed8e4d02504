"""The CUDA C++ kernels of 6-D rotations (csrc/ops/rotation_6d/rotation_6d_cuda.cu)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ofakern.ops import native


def forward(x: Tensor) -> Any:
    return native.cuda_kernels.rotation_6d(x)


def backward(dout: Tensor, x: Tensor) -> Any:
    return native.cuda_kernels.rotation_6d_gradient(dout, x)
