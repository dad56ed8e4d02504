"""Launches of Triton kernels compiled for a named GPU without one, by the assembler that triton's package carries."""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import triton

ROOT = Path(__file__).resolve().parents[2]
# Keyed by source and options, so that a second run is quick; inside the clone, as everything that is built.
CACHE = ROOT / "build/triton"
OTHER_COMPILERS_SPILL = 32  # bytes a thread: 8 registers of 255
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# What shows in the machine code that products run on the tensor cores meant for 16-bit types.
PRODUCT = {80: ("sass", "HMMA"), 90: ("sass", "HGMMA"), 100: ("ptx", "tcgen05.mma")}
POINTERS = {F32: "*fp32", F16: "*fp16", BF16: "*bf16", torch.int32: "*i32", torch.uint8: "*u8", torch.int64: "*i64"}


def compiled(launch: Any, capability: int) -> Any:
    """What triton compiles when this launch meets aligned tensors on a GPU."""
    constants, signature, attributes = dict(launch.constants), {}, {}
    for n, name in enumerate(launch.kernel.arg_names):
        value = launch.arguments.get(name)
        if value is None:
            signature[name] = "constexpr"
            constants.setdefault(name, None)
            continue
        if isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
        strided = name.endswith(("_stride", "_head")) and value % 16 == 0
        if isinstance(value, torch.Tensor) or strided:
            attributes[(n,)] = [["tt.divisibility", 16]]
    source = triton.compiler.ASTSource(launch.kernel, signature, constants, attributes)
    target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options=dict(launch.options))


def cuobjdump(cubin: Path, *options: str) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([tool, *options, cubin], capture_output=True, text=True, check=True).stdout


def resources(launch: Any, capability: int, product: bool, folder: Path) -> dict[str, int]:
    """Registers, spilled bytes (a kernel's stack) and shared memory; a kernel with products must have their
    instructions, and every kernel must fit."""
    binary, name = compiled(launch, capability), launch.kernel.__name__
    cubin = folder / f"{name}.cubin"
    cubin.write_bytes(binary.asm["cubin"])
    usage = re.search(r"REG:(\d+) STACK:(\d+)", cuobjdump(cubin, "-res-usage"))
    assert usage is not None, name
    found = {"registers": int(usage[1]), "stack": int(usage[2]), "shared": int(binary.metadata.shared)}
    assert found["shared"] <= SHARED_MEMORY[capability], f"{name} does not fit: {found}"
    if product:
        where, instruction = PRODUCT[capability]
        text = binary.asm["ptx"] if where == "ptx" else cuobjdump(cubin, "-sass")
        assert instruction in text, f"{name} has no {instruction}"
    return found


def assert_no_more(found: dict[str, dict[str, int]], record: dict[str, Any], case: str) -> None:
    """Spills and shared memory of a case's kernels are at most the recorded ones. Another compiler than the record's
    allocates otherwise: of it a kernel recorded without a spill may have one of a few registers, no more."""
    kept = record["kernels"][case]
    assert found.keys() == kept.keys()
    same_compiler = triton.__version__ == record["triton"]
    for name, used in found.items():
        for resource in ("stack", "shared"):
            have, most = used[resource], kept[name][resource]
            if same_compiler or (resource == "stack" and most == 0):
                slack = 0 if same_compiler else OTHER_COMPILERS_SPILL
                assert have <= most + slack, f"{name}: {resource} {have} bytes above the recorded {most}"


def write_record(path: Path, cases: Sequence[Any], label: Callable[[Any], str], measure: Callable[..., Any]) -> None:
    os.environ["TRITON_CACHE_DIR"] = str(CACHE)
    with tempfile.TemporaryDirectory() as folder:
        kernels = {label(case): measure(case, Path(folder)) for case in cases}
    path.write_text(json.dumps({"triton": triton.__version__, "kernels": kernels}, indent=1) + "\n", encoding="utf-8")


class TargetDriver:
    """As much of triton's driver as a launch asks for before it compiles: a GPU to compile for."""

    def get_current_target(self) -> Any:
        return triton.backends.compiler.GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0
