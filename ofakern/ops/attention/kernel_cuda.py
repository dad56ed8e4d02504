"""The CUDA C++ kernels of attention (csrc/ops/attention/attention_cuda.cu, attention_backward_cuda.cu)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ofakern.errors import OfakernValueError
from ofakern.ops import native
from ofakern.ops.library import kernel_ready

MAX_WIDTH = 128  # of q, v and q_pos each
_OPERANDS = 5  # q, k, v, q_pos, k_pos come first, then tensors that kernels read row-major
_SHARED = slice(20, 22)


def forward(*inputs: Any) -> Any:
    """out and lse; inputs as op.py's schema orders them."""
    return native.cuda_kernels.attention(*_prepare(inputs))


def backward(dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    """Every gradient in the schema's order; a tensor without elements where an input is absent."""
    incoming = None if dlse is None else kernel_ready(dlse)
    grads = native.cuda_kernels.attention_gradients(
        kernel_ready(out), kernel_ready(lse), _rows_ready(dout), incoming, *_prepare(inputs)
    )
    return tuple(torch.empty(0, device=out.device) if grad is None else grad for grad in grads)


def _prepare(inputs: tuple[Any, ...]) -> list[Any]:
    ready = list(inputs)
    if any(tensor is not None for tensor in ready[_SHARED]):
        raise OfakernValueError("attention: layout.shared must be None for this backend, got shared positions")
    del ready[_SHARED]  # every token has its own row of q_pos and k_pos (api.py spells them out)
    for n in range(_SHARED.start):
        if ready[n] is not None:
            ready[n] = _rows_ready(ready[n]) if n < _OPERANDS else kernel_ready(ready[n])
    return ready


def _rows_ready(tensor: Tensor) -> Tensor:
    """Rows that start at multiples of 16 bytes, which asynchronous copies need; other views are copied."""
    tensor = tensor.resolve_neg()
    elements = 16 // tensor.element_size()
    aligned = tensor.data_ptr() % 16 == 0 and tensor.stride(-1) == 1
    if aligned and all(stride % elements == 0 for stride in tensor.stride()[:-1]):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)
