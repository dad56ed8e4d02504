"""The tolerance rule of every op: what an error is compared with, and nothing about any op.

The error of every output and every gradient is at most twice that of plain torch in the same dtype plus one rounding,
in the maximum and in the L2 norm. "One rounding" is eps times the sum of the absolute values that a result adds up (a
sum that cancels to zero still carries the roundings of its summands).
"""

from __future__ import annotations

import torch
from torch import Tensor


def assert_kept(name: str, have: Tensor, exact: Tensor, peer: Tensor, size: Tensor, dtype: torch.dtype) -> float:
    """Raises AssertionError unless `have` keeps the rule; returns the larger of error / bound in both norms.

    exact: the reference in float64 on the same (rounded) inputs; peer: plain torch in `dtype`; size: for every element
    the sum of the absolute values it adds up (at least |exact|), in float64. Infinities must be equal, and an element
    to which nothing contributes (size 0) must be exactly 0.
    """
    assert have.shape == exact.shape, f"{name}: shape {list(have.shape)} instead of {list(exact.shape)}"
    infinite = torch.isinf(exact)
    assert torch.equal(have[infinite].double(), exact[infinite]), f"{name}: infinities differ"
    finite = ~infinite
    error = (have.double() - exact)[finite].abs()
    peer_error = (peer.double() - exact)[finite].abs()
    floor = torch.finfo(dtype).eps * size[finite]
    worst = 0.0
    for norm in (torch.inf, 2):
        if error.numel():
            found, bound = _norm(error, norm), 2 * _norm(peer_error, norm) + _norm(floor, norm)
            # Written so that NaN fails.
            assert found <= bound, f"{name}: error {found:.3e} above {bound:.3e} (norm {norm})"
            worst = max(worst, found / bound if bound else 0.0)
    still = finite & (size == 0)
    assert not torch.any(have[still]), f"{name}: must be exactly 0 where nothing contributes"
    return worst


def _norm(x: Tensor, order: float) -> float:
    return float(torch.linalg.vector_norm(x, ord=order))
