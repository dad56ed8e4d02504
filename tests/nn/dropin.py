"""What the drop-in layers' tests share: a layer and the one it replaces, on the same weights and inputs.

Three runs: the original in float64 (the truth), the original in the dtype under test (the peer) and ours, which may be
at most twice as far from the truth as the peer, plus a few roundings. In float64 ours must be equal to rounding.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ofakern.nn.dropin import DropIn

Call = Callable[[nn.Module, Mapping[str, Tensor]], Tensor]


@contextmanager
def float64_throughout() -> Iterator[None]:
    """Originals take scores to float32 for their softmax, even in float64; for the truth they must not."""
    softmax, narrow = F.softmax, torch.Tensor.float

    def keep(x: Tensor, dim: int, dtype: torch.dtype | None = None, **rest: object) -> Tensor:
        return softmax(x, dim, dtype=None if x.dtype == torch.float64 else dtype)

    with (
        mock.patch.object(F, "softmax", keep),
        mock.patch.object(torch.Tensor, "float", lambda x: x if x.dtype == torch.float64 else narrow(x)),
    ):
        yield


def results(module: nn.Module, call: Call, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The output and the gradient of every input and parameter, for one fixed random loss."""
    module.zero_grad()
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in inputs.items()}
    out = call(module, leaves)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    (out * weights.to(out.dtype)).sum().backward()
    found = {"out": out.detach()}
    found |= {f"d {name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    found |= {f"d {name}": p.grad for name, p in module.named_parameters() if p.grad is not None}
    return found


def assert_all_like_peer(
    have: Mapping[str, Tensor], exact: Mapping[str, Tensor], peer: Mapping[str, Tensor], dtype: torch.dtype
) -> None:
    """Every result, by the rule of `assert_like_peer`."""
    assert have.keys() == exact.keys()
    for name, value in exact.items():
        # A bias' gradient adds up what its weight's adds up; of keys it cancels to zero and only roundings are left.
        summands = exact.get(name.removesuffix("bias") + "weight", value) if name.endswith("bias") else value
        assert_like_peer(name, have[name], value, peer[name], dtype, float(summands.abs().max()))


def assert_like_peer(
    name: str, have: Tensor, exact: Tensor, peer: Tensor, dtype: torch.dtype, size: float = 0.0
) -> None:
    """|have - exact| <= 2 |peer - exact| + 8 roundings of the largest value (or of size), in maximum and L2."""
    assert have.shape == exact.shape, f"{name}: shape {list(have.shape)} instead of {list(exact.shape)}"
    error, peer_error = have.double() - exact, peer.double() - exact
    size = max(size, float(exact.abs().max()))
    floor = 8 * torch.finfo(dtype).eps * size
    assert float(error.abs().max()) <= 2 * float(peer_error.abs().max()) + floor, f"{name}: largest error"
    assert float(error.norm()) <= 2 * float(peer_error.norm()) + floor * error.numel() ** 0.5, f"{name}: L2 error"


def assert_replaces(
    original: nn.Module,
    cls: type[DropIn],
    call: Call,
    inputs: Mapping[str, Tensor],
    dtype: torch.dtype = torch.float32,
) -> None:
    """`cls.replacing(original)` gives the original's outputs and gradients, in float64 and in `dtype`."""
    original = copy.deepcopy(original).to(dtype)
    rounded = {name: tensor.to(dtype) for name, tensor in inputs.items()}
    truth = copy.deepcopy(original).double()
    wide = {name: tensor.double() for name, tensor in rounded.items()}
    with float64_throughout():
        exact = results(truth, call, wide)
    ours_wide = results(cls.replacing(copy.deepcopy(truth)), call, wide)
    ours = results(cls.replacing(copy.deepcopy(original)), call, rounded)
    peer = results(original, call, rounded)
    assert exact.keys() == ours_wide.keys()
    for name, value in exact.items():
        torch.testing.assert_close(ours_wide[name], value, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")
    assert_all_like_peer(ours, exact, peer, dtype)


def assert_same_state(original: nn.Module, ours: nn.Module) -> None:
    """Equal keys in the same order and shapes; each loads the other's state."""
    mine, theirs = ours.state_dict(), original.state_dict()
    assert list(mine) == list(theirs)
    assert [v.shape for v in mine.values()] == [v.shape for v in theirs.values()]
    ours.load_state_dict(theirs)
    original.load_state_dict(ours.state_dict())


def parameters_of(function: Callable[..., object]) -> list[tuple[str, object, object]]:
    """Name, kind and default of every parameter: what "the same signature" means."""
    signature = inspect.signature(function)
    return [(p.name, p.kind, p.default) for p in signature.parameters.values()]


def assert_shares(original: nn.Module, ours: nn.Module) -> None:
    """The very same parameters, buffers and submodules, and the same mode."""
    for (name, mine), (other, theirs) in zip(ours.named_parameters(), original.named_parameters(), strict=True):
        assert name == other and mine is theirs
    for mine, theirs in zip(ours.children(), original.children(), strict=True):
        assert mine is theirs
    assert ours.training == original.training


def replace_all(model: nn.Module, *classes: type[DropIn]) -> nn.Module:
    """A copy of `model` in which every module that one of `classes` names is replaced."""
    model = copy.deepcopy(model)
    by_name = {name: cls for cls in classes for name in cls.replaced_names}
    found = 0
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__ in by_name:
                setattr(module, name, by_name[type(child).__name__].replacing(child))
                found += 1
    assert found, "nothing was replaced"
    return model


def randomize(module: nn.Module, std: float = 0.3) -> nn.Module:
    """Every parameter drawn anew, so that no initial zero hides a wrong use."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return module
