"""What a patched model must keep: outputs and gradients within the tolerance rule, the same bits after undo."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

import ofakern
from tests.ops.rule import assert_kept

Forward = Callable[[nn.Module], Tensor]


def without_dropout(model: nn.Module) -> nn.Module:
    """Every dropout rate of the model set to 0, so that training mode is deterministic."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attn_dropout_p", "hidden_dropout", "attention_dropout", "drop_prob", "dropout_p"):
            if isinstance(vars(module).get(name), float):
                setattr(module, name, 0.0)
    return model


def outcome(model: nn.Module, forward: Forward) -> dict[str, Tensor]:
    """The output that `forward` gives (real tokens only) and the gradient of every parameter that gets one."""
    model.zero_grad()
    out = forward(model)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out.dtype)
    (out * weights).sum().backward()
    found = {f"gradient of {name}": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"output": out.detach().clone()} | found


def assert_patch_keeps(
    model: nn.Module, forward: Forward, dtype: torch.dtype = torch.float32
) -> ofakern.patching.PatchReport:
    """Patches (and restores) the model in dtype: errors at most twice the unpatched model's own, beside float64."""
    have, peer, exact, report = _patched(model, forward, dtype)
    if dtype == torch.float32:
        _assert_each_kept(have, peer, exact)
    else:
        found, bound = _relative_error(have, exact), 2 * _relative_error(peer, exact) + torch.finfo(dtype).eps
        assert found <= bound, f"relative error {found:.3e} above {bound:.3e}"
    return report


def relative_errors(model: nn.Module, forward: Forward, dtype: torch.dtype) -> tuple[float, float]:
    """Of the patched and of the unpatched model: the root mean square of all tensors' relative errors, beside float64
    (single tensors of a small model in half precision differ by more than a factor of two either way)."""
    have, peer, exact, _ = _patched(model, forward, dtype)
    return _relative_error(have, exact), _relative_error(peer, exact)


Tensors = dict[str, Tensor]


def _patched(
    model: nn.Module, forward: Forward, dtype: torch.dtype
) -> tuple[Tensors, Tensors, Tensors, ofakern.patching.PatchReport]:
    """Outcomes of the patched model, of the unpatched one and of float64; undone, it gives the very same bits."""
    exact = outcome(_cast(model, torch.float64), forward)
    mine = _cast(model, dtype)
    peer = outcome(mine, forward)
    with ofakern.patch(mine) as report:
        assert report.replaced, str(report)
        have = outcome(mine, forward)
    assert have.keys() == peer.keys() == exact.keys()
    again = outcome(mine, forward)
    assert all(torch.equal(again[name], value) for name, value in peer.items()), "undo must restore the very same bits"
    return have, peer, exact, report


def _assert_each_kept(have: dict[str, Tensor], peer: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    usual = _usual_size(exact)
    for name, want in exact.items():
        # What a gradient adds up is not known from outside. Its summands, about a thousand (query, key) pairs of either
        # sign, have absolute values whose sum is about sqrt(1000) times the result; where they cancel to nothing (a
        # key's bias under the softmax), one rounding of the usual gradient.
        size = (32 * want.abs().max()).clamp(min=usual).expand_as(want)
        assert_kept(name, have[name], want, peer[name], size, torch.float32)


def _relative_error(have: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    nothing = 1e-9 * _usual_size(exact)
    off = [
        float((have[name].double() - want).norm() / want.norm())
        for name, want in exact.items()
        if float(want.abs().max()) > nothing
    ]
    return float(torch.tensor(off).square().mean().sqrt())


def _usual_size(exact: dict[str, Tensor]) -> float:
    sizes = sorted(float(value.abs().max()) for value in exact.values())
    return sizes[len(sizes) // 2]


def _cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    return copy.deepcopy(model).to(dtype)
