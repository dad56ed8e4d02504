"""The oracle of `rotation_6d` in plain torch; the contract: csrc/ops/rotation_6d/rotation_6d.h. Imports nothing of
ours."""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-12


def rotation_6d_reference(x: Tensor) -> Tensor:
    """`[..., 6]`, two columns end to end, to rotation matrices `[..., 3, 3]` (Gram-Schmidt; the third column is the
    cross product)."""
    stat = torch.promote_types(x.dtype, torch.float32)
    a1, a2 = x.to(stat)[..., :3], x.to(stat)[..., 3:]
    b1 = torch.nn.functional.normalize(a1, dim=-1, eps=EPS)
    b2 = torch.nn.functional.normalize(a2 - (b1 * a2).sum(-1, keepdim=True) * b1, dim=-1, eps=EPS)
    return torch.stack([b1, b2, torch.linalg.cross(b1, b2, dim=-1)], dim=-1).to(x.dtype)
