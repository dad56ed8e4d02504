"""The registered ops `ofakern::attention_fwd` and `ofakern::attention_bwd`, and the autograd around them.

Schemas are complete on import; the autograd.Function stands outside the ops, because that costs half of what
`register_autograd` costs, and is not used when nothing needs a gradient. Arguments are checked in api.py and again by
the binding, which also brings them into the form that kernels take.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ofakern.errors import OfakernError, OfakernValueError
from ofakern.ops import native
from ofakern.ops.attention import kernel_cuda
from ofakern.ops.attention.layout import AttentionLayout
from ofakern.ops.library import (
    apply_function,
    define,
    differentiate_once,
    draw_seed,
    ops_of,
    refuse_vmap,
    straight,
    suffix_of,
)

_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? q_pos, Tensor? k_pos, "
    "Tensor? table0, Tensor? q_coord0, Tensor? k_coord0, Tensor? same0, "
    "Tensor? table1, Tensor? q_coord1, Tensor? k_coord1, Tensor? same1, "
    "Tensor? head_scale, Tensor? dropout_seed, "
    "Tensor visible, Tensor q_offsets, Tensor k_offsets, Tensor key_seen, Tensor k_range, "
    "Tensor? shared_sets, Tensor? shared_members, "
    "float scale, float dropout_p"
)
# Past pybind11's dispatcher as well: None of a call that it refuses, True of one that needs a gradient (where the first
# flag asks for that); out, with the second flag out and lse.
_attention_of: Any = getattr(native.cpu, "attention_of", None)
_Q, _K, _V, _Q_POS, _K_POS, _TABLE0, _TABLE1, _HEAD_SCALE = 0, 1, 2, 3, 4, 5, 9, 13
_DIFFERENTIABLE = (_Q, _K, _V, _Q_POS, _K_POS, _TABLE0, _TABLE1, _HEAD_SCALE)
_SHARED = slice(20, 22)
_TENSORS = 22  # how many of the inputs are tensors; scale and dropout_p follow


def run(backend: str, *inputs: Any) -> tuple[Tensor, Tensor]:
    """out and lse of `_INPUTS` in that order; differentiable in q, k, v, q_pos, k_pos, the tables and head_scale."""
    made: tuple[Tensor, Tensor]
    if torch.is_grad_enabled() and any(inputs[n] is not None and inputs[n].requires_grad for n in _DIFFERENTIABLE):
        made = apply_function(_Attention, backend, *inputs)
    else:
        made = _FORWARD[backend](*inputs)
    return made


def run_straight(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: AttentionLayout,
    q_pos: Tensor | None,
    k_pos: Tensor | None,
    tables: Sequence[Tensor],
    head_scale: Tensor | None,
    scale: float | None,
    dropout_p: float,
    dropout_seed: Tensor | None,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor] | None:
    """The same past the dispatcher, of a call that only the binding checks: None of one that it refuses.

    out, or with return_lse out and lse.
    """
    count = len(tables)
    if type(layout) is not AttentionLayout or count != len(layout.terms) or (checked := layout.checked) is None:
        return None
    if dropout_p == 0.0:
        dropout_seed = None
    elif dropout_seed is None:
        dropout_seed = draw_seed(layout.device)
    table0, table1 = tables[0] if count else None, tables[1] if count > 1 else None
    made: Tensor | tuple[Tensor, Tensor] | bool | None = _attention_of(
        *(q, k, v, q_pos, k_pos, table0, table1, head_scale, dropout_seed, dropout_p),
        *(torch.get_num_threads(), scale, checked, torch.is_grad_enabled(), return_lse),
    )
    if not isinstance(made, bool):  # True: an input asks for a gradient
        return made
    leaves = (q, k, v, q_pos, k_pos, table0, table1, head_scale)
    try:
        out, lse = _apply_straight(layout, scale, dropout_p, dropout_seed, *leaves)
        return (out, lse) if return_lse else out
    except OfakernError:
        return None


class _Straight(torch.autograd.Function):
    """`_Attention` where no transform runs: autograd is shown only what has a gradient, which is half of its time."""

    @staticmethod
    def forward(
        ctx: Any,
        layout: AttentionLayout,
        scale: float | None,
        dropout_p: float,
        dropout_seed: Tensor | None,
        *leaves: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        threads = torch.get_num_threads()
        made = _attention_of(*leaves, dropout_seed, dropout_p, threads, scale, layout.checked, False, True)
        if made is None:
            raise OfakernValueError("attention: every input must be what the kernel takes as it is, got others")
        out, lse = made
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(out, lse, *leaves)
        ctx.rest = layout, scale, dropout_p, dropout_seed
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        out, lse, *leaves = ctx.saved_tensors
        layout, scale, dropout_p, dropout_seed = ctx.rest
        grads: Sequence[Tensor | None] | None = None
        if dout is not None and not torch.is_grad_enabled() and straight("cpu"):
            threads = torch.get_num_threads()
            grads = native.kernels.attention_gradients_of(
                out, lse, dout, dlse, *leaves, dropout_seed, dropout_p, threads, scale, layout.checked
            )
        if grads is None:  # create_graph, a mode of torch's, or what the kernel does not take as it is
            numbers = leaves[0].shape[2] ** -0.5 if scale is None else scale, dropout_p
            grads = _gradients("", dout, dlse, out, lse, _inputs(layout, leaves, dropout_seed), numbers)
        return None, None, None, None, *grads


def _inputs(
    layout: AttentionLayout, leaves: Sequence[Tensor | None], dropout_seed: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The tensors of `_INPUTS`."""
    *operands, table0, table1, head_scale = leaves
    first, second, fixed = layout.list_arguments()
    return (*operands, table0, *first, table1, *second, head_scale, dropout_seed, *fixed)


# What apply_function calls, found once.
_apply_straight: Any = super(torch.autograd.Function, _Straight).apply


def _gradients(
    suffix: str,
    dout: Tensor | None,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    tensors: Sequence[Tensor | None],
    numbers: Sequence[float],
) -> list[Tensor | None]:
    """One for each of `_DIFFERENTIABLE`: None of what is None, and of all where there is no gradient to begin with."""
    if dout is None and dlse is None:
        return [None] * len(_DIFFERENTIABLE)
    if dout is None:
        dout = torch.zeros_like(out)
    results = differentiate_once("attention_bwd" + suffix, dout, dlse, out, lse, *tensors, *numbers)
    return [None if tensors[n] is None else result for n, result in zip(_DIFFERENTIABLE, results, strict=True)]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(backend: str, *inputs: Any) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = _FORWARD[backend](*inputs)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.set_materialize_grads(False)
        ctx.backend, *arguments = inputs
        ctx.save_for_backward(*output, *arguments[:_TENSORS])
        ctx.numbers = arguments[_TENSORS:]

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        grads: list[Tensor | None] = [None] * (_TENSORS + len(ctx.numbers))
        out, lse, *tensors = ctx.saved_tensors
        for n, grad in zip(
            _DIFFERENTIABLE, _gradients(suffix_of(ctx.backend), dout, dlse, out, lse, tensors, ctx.numbers), strict=True
        ):
            grads[n] = grad
        return None, *grads

    vmap = staticmethod(refuse_vmap("attention"))


def _kernel_ready(tensor: Tensor) -> Tensor:
    """Kernels take any strides but the last one, and DLPack would hand over a negative view's bits silently wrong."""
    tensor = tensor.resolve_neg()
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _prepare(inputs: tuple[Any, ...]) -> list[Any]:
    """What the Triton kernels take: every token has its own row of q_pos and k_pos (api.py spells them out)."""
    ready = list(inputs)
    if any(tensor is not None for tensor in ready[_SHARED]):
        raise OfakernValueError("attention: layout.shared must be None for this backend, got shared positions")
    del ready[_SHARED]
    for n in (_Q, _K, _V, _Q_POS, _K_POS):
        if ready[n] is not None:
            ready[n] = _kernel_ready(ready[n])
    for n in range(_TABLE0, _SHARED.start):
        if ready[n] is not None:
            ready[n] = ready[n].resolve_neg().contiguous()
    return ready


def _forward_cpu(*inputs: Any) -> Any:
    return native.kernels.attention(*inputs, torch.get_num_threads())


def _backward_cpu(dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, *inputs: Any) -> Any:
    grads = native.kernels.attention_gradients(out, lse, dout, dlse, *inputs, torch.get_num_threads())
    return tuple(torch.empty(0) if grad is None else grad for grad in grads)


def _forward_triton(*inputs: Any) -> tuple[Tensor, Tensor]:
    # Imported by the first call: it takes a second, and CPU users may not have triton.
    from ofakern.ops.attention import kernel_triton

    return kernel_triton.attention_forward_triton(*_prepare(inputs))


def _backward_triton(dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    from ofakern.ops.attention import kernel_triton

    ready = _prepare(inputs)
    grads = kernel_triton.attention_backward_triton(
        _kernel_ready(dout),
        None if dlse is None else dlse.resolve_neg().contiguous(),
        out.contiguous(),
        lse.contiguous(),
        *ready,
    )
    return tuple(torch.empty(0, device=out.device) if grad is None else grad for grad in grads)


def _forward_fake(*inputs: Any) -> tuple[Tensor, Tensor]:
    q, v = inputs[_Q], inputs[_V]
    shape = (q.shape[0], q.shape[1])
    return q.new_empty((*shape, v.shape[2])), q.new_empty(shape, dtype=torch.float32)


def _backward_fake(dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    absent = {"dtype": torch.float32, "device": inputs[_Q].device}
    return tuple(
        torch.empty(0, **absent) if inputs[n] is None else inputs[n].new_empty(inputs[n].shape) for n in _DIFFERENTIABLE
    )


define(
    "attention_fwd",
    f"({_INPUTS}) -> (Tensor out, Tensor lse)",
    cpu=_forward_cpu,
    cuda=kernel_cuda.forward,
    fake=_forward_fake,
    triton=_forward_triton,
)
# An absent input's gradient is a tensor without elements: a schema cannot return `Tensor?`.
define(
    "attention_bwd",
    f"(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, {_INPUTS}) -> "
    "(Tensor dq, Tensor dk, Tensor dv, Tensor dq_pos, Tensor dk_pos, "
    "Tensor dtable0, Tensor dtable1, Tensor dhead_scale)",
    cpu=_backward_cpu,
    cuda=kernel_cuda.backward,
    fake=_backward_fake,
    triton=_backward_triton,
)
_FORWARD = ops_of("attention_fwd")
