"""Why a GPU cannot run the CUDA C++ kernels, told in words: no GPU, an old driver, another architecture."""

from __future__ import annotations

import re
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch

Capability = tuple[int, int]


def unavailable() -> str | None:
    """Why `ofakern._cuda` is not loaded here, or None: nobody waits for a module they cannot use."""
    if find_spec("ofakern._cuda") is None:
        return "this build has no CUDA kernels (no nvcc when it was installed). Try: pip install . where nvcc is"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    return None


def driver_refusal(module: ModuleType | Any) -> str | None:
    """What keeps every GPU of this machine from running `module` (ofakern._cuda), or None."""
    driver, runtime = module.driver_version(), module.runtime_version()
    if driver == 0:
        return "no NVIDIA driver is installed"
    if driver // 1000 < runtime // 1000:
        return (
            f"the driver must be as new as CUDA {_version(runtime)}, got one of CUDA {_version(driver)}. "
            "Try: a newer NVIDIA driver, or ofakern built with an older toolkit"
        )
    if not torch.cuda.is_available():
        return "torch sees no GPU here (CUDA_VISIBLE_DEVICES may hide it)"
    return None


def architecture_refusal(architectures: str, capability: Capability, name: str) -> str | None:
    """Why a GPU cannot run what was built for `architectures` ("80, 90a, 100"), or None."""
    if any(_runs(entry.strip(), capability) for entry in architectures.split(",")):
        return None
    return (
        f"the GPU must be one that ofakern was built for ({architectures}), "
        f"got {name} of {capability[0]}.{capability[1]}. "
        "Try: pip install . -Ccmake.define.OFAKERN_CUDA_ARCHITECTURES=native"
    )


def _runs(architecture: str, capability: Capability) -> bool:
    """Code for 80 comes with PTX, which any newer GPU compiles for itself; code for 90a is for 9.0 alone."""
    match = re.fullmatch(r"(\d+)(\d)([af]?)(-\w+)?", architecture)
    if match is None:
        return False
    built = (int(match[1]), int(match[2]))
    return built == capability if match[3] else built <= capability


def _version(number: int) -> str:
    """CUDA writes 13.0 as 13000."""
    return f"{number // 1000}.{number % 1000 // 10}"
