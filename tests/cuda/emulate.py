"""The CUDA kernels without a GPU: the emulated module, built when needed, in the place of `ofakern._cuda`."""

from __future__ import annotations

import fcntl
import importlib.util
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import torch

from ofakern.ops import library, native

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build/editable"
NAME = "ofakern_cuda_emulated"


def unavailable() -> str | None:
    """Why the kernels cannot be emulated here, or None."""
    rules = BUILD / "build.ninja"
    if not rules.is_file():
        return "no build tree here: the package was not installed by `make setup`"
    if NAME not in rules.read_text(encoding="utf-8"):
        return "the CUDA toolkit was not there when the build was configured"
    return None


@cache
def module() -> ModuleType:
    """The emulated module, up to date with the sources. Fails the test when it does not compile."""
    with open(BUILD / ".lock", "w", encoding="utf-8") as lock:  # the Makefile's builds take the same one
        fcntl.flock(lock, fcntl.LOCK_EX)
        command = ["cmake", "--build", str(BUILD), "--target", NAME]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        pytest.fail(f"the emulated CUDA kernels do not compile:\n{result.stdout}{result.stderr}")
    (path,) = BUILD.glob(f"{NAME}*.so")
    spec = importlib.util.spec_from_file_location(NAME, path)
    assert spec is not None and spec.loader is not None
    sys.modules[NAME] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[NAME])
    return sys.modules[NAME]


@contextmanager
def emulated() -> Iterator[ModuleType]:
    """Inside, backend "cuda" takes CPU tensors to the emulated kernels: in `native`, and under torch's CPU key."""
    kernels = module()
    kept = native.cuda_kernels, native.cuda_device
    overrides = torch.library.Library("ofakern", "IMPL")
    native.cuda_kernels, native.cuda_device = kernels, "cpu"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name, kernel in library.cuda_kernels().items():
                overrides.impl(name, kernel, "CPU", allow_override=True)
        yield kernels
    finally:
        overrides._destroy()
        native.cuda_kernels, native.cuda_device = kept
