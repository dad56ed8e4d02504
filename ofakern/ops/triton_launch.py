"""What launches of Triton kernels share: one launch as data, running a list of them, sizes that GPUs have.

A call of an op is a list of `Launch`es over buffers from torch's allocator, on torch's current stream, without a wait
for the device and without a compilation that depends on lengths. The tests compile the same launches ahead of time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from ofakern.errors import BackendError

_HOPPER_SHARED = 227 * 1024


@dataclass(frozen=True)
class Launch:
    """One kernel launch; `constants` and `options` select the compiled code, `arguments` do not."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    options: dict[str, Any]

    def run(self) -> None:
        self.kernel[self.grid](**self.arguments, **self.constants, **self.options)


def run(op: str, like: Tensor, launches: Sequence[Launch]) -> None:
    """Runs them on `like`'s device, in order; those without a program are left out.

    Raises BackendError when a kernel asks for more than the device has.
    """
    with torch.cuda.device(like.get_device()):  # -1, no device, when interpreted
        for launch in launches:
            if not all(launch.grid):
                continue
            try:
                launch.run()
            except OutOfResources as error:
                raise BackendError(f"{op}: backend 'triton' cannot run this call: {error}") from error


def options(warps: int, stages: int) -> dict[str, Any]:
    """Fusing a * b + c is asked for, not left to Triton's default."""
    return {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}


def shared_memory(like: Tensor) -> int:
    """Bytes of shared memory that a program may use on the tensor's device."""
    if like.device.type == "cpu":  # interpreted
        return _HOPPER_SHARED
    properties: Any = torch.cuda.get_device_properties(like.device)
    return int(properties.shared_memory_per_block_optin)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_2(n: int, least: int = 1) -> int:
    """The smallest power of two that is at least n and at least `least`."""
    return max(least, int(triton.next_power_of_2(n)))
