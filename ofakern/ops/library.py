"""What the registered ops share: the `ofakern` library, and the refusal of what a compiled kernel cannot do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from ofakern.errors import OfakernRuntimeError
from ofakern.ops import log, native

STRAIGHT = "straight"  # a backend's name inside the ops only: the CPU kernel, past torch's dispatcher
_CPU = ("auto", "cpu") if native.cpu is not None else ()
_PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None)))
# Found once: a small call asks them all.
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_transforms_active = torch._C._are_functorch_transforms_active
_tracing_state = torch._C._get_tracing_state
_profiling = torch._C._autograd._profiler_enabled
_kernels: dict[str, Callable[..., Any]] = {}
_cuda_kernels: dict[str, Callable[..., Any]] = {}
LIBRARY: Any = torch.library.Library("ofakern", "FRAGMENT")  # type: ignore[no-untyped-call]


def define(
    name: str,
    schema: str,
    *,
    cpu: Callable[..., Any],
    fake: Callable[..., Any],
    cuda: Callable[..., Any] | None = None,
    triton: Callable[..., Any] | None = None,
) -> Any:
    """Registers `ofakern::<name><schema>`, e.g. `("log_mel", "(Tensor wave) -> Tensor", ...)`, with its CPU kernel.

    Returns the op to call: an OpOverload, which skips the choice among overloads that `torch.ops.ofakern.<name>` makes.
    With `triton`, a second kernel for a device's tensors, there is also the op `ofakern::<name>_triton`.

    `cpu` (and `cuda`, the CUDA C++ kernel of the same op, on tensors of a GPU) takes and returns what the schema says
    and never falls back; `fake` gives results of the right shape and dtype without data. Under vmap the op raises;
    gradients are an autograd.Function outside (half the call overhead of register_autograd), whose backward calls
    `differentiate_once`.
    """
    LIBRARY.define(f"{name}{schema}")
    LIBRARY.impl(name, cpu, "CPU")
    _kernels[name] = cpu
    if cuda is not None:
        LIBRARY.impl(name, cuda, "CUDA")
        _cuda_kernels[name] = cuda
    torch.library.register_fake(f"ofakern::{name}", fake, lib=LIBRARY)
    torch.library.register_vmap(f"ofakern::{name}", refuse_vmap(name), lib=LIBRARY)
    if triton is not None:
        define_triton(f"{name}_triton", schema, triton, fake)
    return getattr(torch.ops.ofakern, name).default


def define_triton(name: str, schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """The dispatcher picks by device, so that a device's second kernel has an op of its own. CPU: the interpreter."""
    LIBRARY.define(f"{name}{schema}")
    for device in ("CUDA", "CPU"):
        LIBRARY.impl(name, kernel, device)
    torch.library.register_fake(f"ofakern::{name}", fake, lib=LIBRARY)
    torch.library.register_vmap(f"ofakern::{name}", refuse_vmap(name), lib=LIBRARY)


def ops_of(name: str) -> dict[str, Any]:
    """What to call by backend: the ops that `define` registered, and under STRAIGHT the CPU kernel itself."""
    ops = torch.ops.ofakern
    named = {"cpu": name} | ({"cuda": name} if name in _cuda_kernels else {})
    named |= {"triton": f"{name}_triton"} if hasattr(ops, f"{name}_triton") else {}
    return {backend: getattr(ops, op).default for backend, op in named.items()} | {STRAIGHT: _kernels[name]}


def cuda_kernels() -> dict[str, Callable[..., Any]]:
    """The CUDA kernels by the name of their op, for who puts an emulated GPU in a GPU's place."""
    return dict(_cuda_kernels)


def suffix_of(backend: str) -> str:
    return "_triton" if backend == "triton" else ""


def straight(backend: str, *tensors: Any) -> bool:
    """Whether a call may go to the CPU kernel past Python's checks and the dispatcher, which take most of a small one.

    So it is where nothing of torch's stands between (compilation, transforms, modes, tracing, a profiler) and all are
    plain tensors or None (attention's binding looks at their types itself). The binding checks a call as strictly; one
    that it refuses goes the other way, where Python has words for what is wrong with it, or casts what can be cast.
    """
    if backend not in _CPU or torch.compiler.is_compiling():  # first: nothing below traces
        return False
    for tensor in tensors:
        if type(tensor) not in _PLAIN:
            return False
    return not (
        _dispatch_modes()
        or _function_modes()
        or _transforms_active()
        or _tracing_state()
        or _profiling()
        or log.ENABLED
    )


def readable(tensor: Tensor) -> bool:
    """Whether the host may look at a tensor's values: it need not wait for them, and no mode of torch's, which may be
    recording the step, would lose that what follows depends on them."""
    return tensor.device.type == "cpu" and not (torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack())


def apply_function(function: Any, *arguments: Any) -> Any:
    """`function.apply(*arguments)` of an autograd.Function, at less than half its overhead where no transform runs.

    Function.apply inspects and binds the signature of `forward` on every call, which costs more than all the rest, and
    then does what stands here. Under torch.func's transforms and torch.compile it is left to torch.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*arguments)
    return super(torch.autograd.Function, function).apply(*arguments)


def refuse_vmap(name: str) -> Callable[..., NoReturn]:
    """A vmap rule that raises; an autograd.Function takes it as its `vmap` static method."""
    op = name.removesuffix("_triton").removesuffix("_fwd").removesuffix("_bwd")

    def refuse(info: Any, in_dims: Any, *inputs: Any) -> NoReturn:
        raise OfakernRuntimeError(
            f"{op}: a compiled backend must not be called under vmap, got a batched tensor\n"
            "Try: fold the mapped dimension into the rows, or backend='reference'."
        )

    return refuse


def differentiate_once(name: str, *arguments: Any) -> Any:
    """Calls the gradient op `ofakern::<name>`; under create_graph=True its results refuse a second derivative."""
    # Gradients are enabled inside a backward only under create_graph=True.
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _Once.apply(name, *arguments)  # type: ignore[no-untyped-call]
    return getattr(torch.ops.ofakern, name)(*arguments)


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(name: str, *arguments: Any) -> Any:
        results = getattr(torch.ops.ofakern, name)(*arguments)
        return tuple(results) if isinstance(results, list) else results  # autograd tracks tuples

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.op = inputs[0].removesuffix("_triton").removesuffix("_bwd")

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> NoReturn:
        raise OfakernRuntimeError(
            f"{ctx.op}: a compiled backend's gradient must not be differentiated again, got a double backward\n"
            "Try: backend='reference', which differentiates any number of times."
        )


def autocast(tensor: Tensor) -> Tensor:
    """As torch's own products take an argument under autocast; float64 is left alone."""
    kind = tensor.device.type
    # Some devices (meta) know no autocast.
    if tensor.dtype != torch.float64 and torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return tensor.to(torch.get_autocast_dtype(kind))
    return tensor


def draw_seed(device: torch.device) -> Tensor:
    """A dropout seed int64 `[2]` (seed, offset) from torch's default generator."""
    return torch.randint(0, 2**63 - 1, (2,), device=device)


def kernel_ready(tensor: Tensor) -> Tensor:
    """Row-major and without a lazy negation: DLPack would hand over a negative view's bits silently wrong."""
    return tensor.resolve_neg().contiguous()
