"""A stand-in for CUDA graphs on the CPU: it records the ops of a step and runs them again.

It has a GPU's semantics, and breaks what a GPU would break:
- recording computes nothing: tensors and random numbers are as before, results hold NaN until the first replay;
- a replay runs the same ops on the same tensors with the same Python numbers, draws new random numbers, and writes its
  results where the recorded ones are; results of the recorder's other graphs are overwritten (they share memory);
- what waits for the device (`item`, `tolist`, `numpy`, `cpu`, sizes that depend on values) is refused, and so is what
  would be made on the host (`torch.tensor(...)`, a factory without `device=`).
What it cannot see (a value read through a pointer, say) is frozen, as on a GPU: replay with other inputs and compare.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ofakern.ops import graph

T = TypeVar("T")
_READS = {
    *(Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.item, Tensor.cpu, Tensor.__bool__),
    *(Tensor.__int__, Tensor.__float__, Tensor.__index__, Tensor.__contains__),
}
_FROM_HOST = {torch.tensor, torch.as_tensor, torch.from_numpy, torch.asarray, torch.frombuffer}
_FACTORIES = {
    *(torch.arange, torch.linspace, torch.zeros, torch.ones, torch.full, torch.empty, torch.eye),
    *(torch.rand, torch.randn, torch.randint, torch.randperm, torch.tril_indices, torch.triu_indices),
}

_INDEXED = {torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_}


def _refuse(what: str) -> None:
    raise RuntimeError(f"operation not permitted when stream is capturing: {what}")


def _no_state() -> None:
    _refuse("the generator's state waits for the device")


class _Calls(TorchFunctionMode):
    """Refuses calls of torch that reach past the dispatcher for the host's memory."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _READS:
            _refuse(f"{resolve_name(func)} waits for the device")
        if func in _FROM_HOST:
            _refuse(f"{resolve_name(func)} copies from the host")
        if func in _FACTORIES and kwargs.get("device") is None:
            _refuse(f"{resolve_name(func)} without device= makes a tensor on the host")
        return func(*args, **kwargs)


@dataclass
class _Op:
    call: Any
    args: Any
    kwargs: Any
    results: list[Tensor]  # those whose memory the op itself made; None stands for the others

    def run(self) -> None:
        fresh = tree_leaves(self.call(*self.args, **self.kwargs))
        for recorded, new in zip(self.results, fresh, strict=True):
            if recorded is not None:
                assert recorded.shape == new.shape, f"{self.call}: {recorded.shape} when recorded, now {new.shape}"
                recorded.copy_(new)


class _Ops(TorchDispatchMode):
    """Notes every op, which tensors a recording made, and how the others were before it."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[_Op] = []
        self.made: dict[int, Tensor] = {}
        self._before: dict[int, tuple[Any, Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        _check(func, args, kwargs)
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        for tensor in given:
            self._keep(tensor)
        with torch._C.DisableTorchFunction():
            out = func(*args, **kwargs)
        results = [self._note(x) for x in tree_leaves(out)]
        self.ops.append(_Op(func, args, kwargs, results))
        return out

    def _keep(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.made and storage._cdata not in self._before:
            self._before[storage._cdata] = storage, storage.clone()

    def _note(self, result: Any) -> Tensor | None:
        if not isinstance(result, Tensor):
            return None
        key = result.untyped_storage()._cdata
        if key in self.made or key in self._before:
            return None  # a view, or written in place
        self.made[key] = result
        return result

    def undo(self) -> None:
        for storage, before in self._before.values():
            storage.copy_(before)

    def poison(self) -> None:
        for tensor in self.made.values():
            if tensor.is_floating_point():
                tensor.fill_(torch.nan)
            elif tensor.dtype != torch.bool:
                tensor.fill_(torch.iinfo(tensor.dtype).max)


def _check(func: Any, args: Any, kwargs: Any) -> None:
    name = func.name()
    if func is torch.ops.aten.lift_fresh.default:
        _refuse(f"{name} copies from the host")
    if torch.Tag.data_dependent_output in func.tags:
        _refuse(f"{name} waits for the device")
    if func.overloadpacket in _INDEXED:  # by numbers the size is known
        if any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]):
            _refuse(f"{name} by a mask has a size that depends on values")
    elif torch.Tag.dynamic_output_shape in func.tags and kwargs.get("output_size") is None:
        _refuse(f"{name} has a size that depends on values")
    if kwargs.get("generator") is not None:
        _refuse(f"{name} draws from a generator that the graph does not know")


class Replayer:
    """A `graph.Recorder` of the CPU."""

    def __init__(self, device: torch.device) -> None:
        self._graphs: list[_Ops] = []

    def warm_up(self, function: Callable[[], object], times: int) -> None:
        for _ in range(times):
            function()

    def record(self, function: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        noted, state = _Ops(), torch.get_rng_state()
        try:
            with patch.object(torch, "get_rng_state", _no_state), _Calls(), noted:
                result = function()
        finally:
            with torch.inference_mode():
                noted.undo()
            torch.set_rng_state(state)
        self._graphs.append(noted)

        @torch.inference_mode()
        def replay() -> None:
            for other in self._graphs:
                other.poison()
            for op in noted.ops:
                op.run()

        with torch.inference_mode():
            noted.poison()
        return result, replay


@contextmanager
def stand_in() -> Iterator[None]:
    """CUDA graphs on the CPU's tensors, inside."""
    graph.RECORDERS["cpu"] = Replayer
    try:
        yield
    finally:
        del graph.RECORDERS["cpu"]
