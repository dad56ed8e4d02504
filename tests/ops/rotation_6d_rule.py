"""The rule of `rotation_6d` on any backend."""

from __future__ import annotations

from typing import Any

import torch
from rule import assert_kept
from torch import Tensor

from ofakern.ops.rotation_6d.reference import rotation_6d_reference


def run(function: Any, x: Tensor, dout: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    leaf = x.detach().requires_grad_()
    out = function(leaf, **options)
    (dx,) = torch.autograd.grad(out, leaf, dout)
    return out.detach(), dx


def plain(x: Tensor) -> Tensor:
    """Every step in x's own dtype."""
    a1, a2 = x[..., :3], x[..., 3:]
    b1 = torch.nn.functional.normalize(a1, dim=-1)
    b2 = torch.nn.functional.normalize(a2 - (b1 * a2).sum(-1, keepdim=True) * b1, dim=-1)
    return torch.stack([b1, b2, torch.linalg.cross(b1, b2)], dim=-1)


def assert_rule(out: Tensor, dx: Tensor, x: Tensor, dout: Tensor) -> None:
    """Raises AssertionError unless results and gradients of CPU tensors keep the rule."""
    dtype = x.dtype
    exact, exact_dx = run(rotation_6d_reference, x.double(), dout.double())
    peer, peer_dx = run(plain, x, dout)
    # A column subtracts its part along the other one: what cancels is as long as a2, over the length that is left.
    a1, a2 = x.double()[..., :3].norm(dim=-1), x.double()[..., 3:].norm(dim=-1)
    rest = a2 * torch.linalg.cross(exact[..., 0], x.double()[..., 3:] / a2[..., None]).norm(dim=-1)
    growth = 1 + a2 / rest
    assert_kept("out", out, exact, peer, growth[..., None, None] * torch.ones_like(exact), dtype)
    size = (growth**2 * dout.double().abs().sum((-1, -2)) * (1 / a1 + 1 / rest))[..., None] * torch.ones_like(exact_dx)
    assert_kept("dx", dx, exact_dx, peer_dx, size, dtype)
