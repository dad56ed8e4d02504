"""Triton kernels compile ahead of time for each architecture; spills and shared memory are held to a record.

No GPU is needed: the launches of kernel_triton.py are compiled for a named target with the assembler that triton's
package carries. `python tests/build/test_triton_compile.py` writes the record anew.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ofakern.ops.attention import AttentionLayout, RelativeTerm, intervals

triton = pytest.importorskip("triton")

from ofakern.ops.attention import kernel_triton  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
RECORD = Path(__file__).with_name("triton_resources.json")
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# (architecture, dtype, (K, V, P), terms, dropout)
CASES = [
    (80, F16, (64, 64, 64), 1, 0.0),
    (80, BF16, (128, 128, 0), 1, 0.0),
    (90, F16, (64, 64, 64), 2, 0.0),
    (90, BF16, (64, 64, 64), 1, 0.0),
    (90, BF16, (128, 128, 0), 1, 0.1),
    (90, F32, (64, 64, 64), 1, 0.0),
    (100, BF16, (64, 64, 64), 1, 0.0),
]
# What shows in the machine code that products run on the tensor cores meant for 16-bit types.
PRODUCT = {80: ("sass", "HMMA"), 90: ("sass", "HGMMA"), 100: ("ptx", "tcgen05.mma")}
POINTERS = {F32: "*fp32", F16: "*fp16", BF16: "*bf16", torch.int32: "*i32", torch.uint8: "*u8", torch.int64: "*i64"}


def launches(case: tuple[Any, ...], lengths: tuple[int, ...] = (200,)) -> Iterator[Any]:
    """The launches of one forward and backward; nothing runs."""
    capability, dtype, (width, value, pos), terms, p = case
    n, heads = sum(lengths), 2
    visible, position = intervals.full(lengths), torch.arange(n, dtype=torch.int32)
    built = [RelativeTerm(position + n, position, visible, 2 * n)] * terms
    layout = AttentionLayout.build(visible, lengths, lengths, built)

    def tokens(last: int) -> torch.Tensor | None:
        return torch.empty(n, heads, last, dtype=dtype) if last else None

    tables = [x for t in built for x in (torch.empty(heads, t.rows), t.q_coord, t.k_coord, t.same)]
    inputs = (
        *(tokens(last) for last in (width, width, value, pos, pos)),
        *[*tables, *[None] * (8 - len(tables))],
        torch.empty(heads),
        torch.empty(2, dtype=torch.int64) if p else None,
        *(layout.visible, layout.q_offsets, layout.k_offsets, layout.key_seen, layout.k_range),
        *(width**-0.5, p),
    )
    shared = SHARED_MEMORY[capability]
    (out, lse), forward = kernel_triton.forward_call(inputs, shared)
    dout = tokens(value)
    assert dout is not None
    _, backward, _ = kernel_triton.backward_call(dout, torch.empty(n, heads), out, lse, inputs, shared)
    seen = set()
    for launch in [*forward, *backward]:
        key = (launch.kernel.__name__, str(launch.constants))
        if key not in seen:
            seen.add(key)
            yield launch


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


def measure(case: tuple[Any, ...], folder: Path) -> dict[str, dict[str, int]]:
    """Registers, spilled bytes (a kernel's stack) and shared memory per kernel; checks the products' instructions."""
    capability, dtype, *_ = case
    found = {}
    for launch in launches(case):
        binary = compiled(launch, capability)
        name = launch.kernel.__name__ + (f"[{launch.constants['OWN']}]" if "OWN" in launch.constants else "")
        cubin = folder / f"{name}.cubin"
        cubin.write_bytes(binary.asm["cubin"])
        usage = re.search(r"REG:(\d+) STACK:(\d+)", cuobjdump(cubin, "-res-usage"))
        assert usage is not None, name
        found[name] = {"registers": int(usage[1]), "stack": int(usage[2]), "shared": int(binary.metadata.shared)}
        assert found[name]["shared"] <= SHARED_MEMORY[capability], f"{name} does not fit: {found[name]}"
        if dtype != F32 and name.startswith("attention"):
            where, instruction = PRODUCT[capability]
            text = binary.asm["ptx"] if where == "ptx" else cuobjdump(cubin, "-sass")
            assert instruction in text, f"{name} has no {instruction}"
    return found


def label(case: tuple[Any, ...]) -> str:
    capability, dtype, widths, terms, p = case
    kind = str(dtype).removeprefix("torch.")
    return f"sm_{capability} {kind} K{widths[0]} V{widths[1]} P{widths[2]} terms{terms} dropout{p:g}"


# Keyed by source and options, so that a second run is quick; inside the clone, as everything that is built.
CACHE = ROOT / "build/triton"


@pytest.mark.parametrize("case", CASES, ids=label)
def test_compiles_without_new_spills(case: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(CACHE))
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    found, kept = measure(case, tmp_path), record["kernels"][label(case)]
    assert found.keys() == kept.keys()
    if triton.__version__ != record["triton"]:
        return  # another compiler allocates otherwise
    for name, resources in found.items():
        for resource in ("stack", "shared"):
            have, most = resources[resource], kept[name][resource]
            assert have <= most, f"{name}: {resource} {have} bytes above the recorded {most}"


class TargetDriver:
    """As much of triton's driver as a launch asks for before it compiles: a GPU to compile for."""

    def get_current_target(self) -> Any:
        return triton.backends.compiler.GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def test_other_lengths_compile_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What triton specialises on, asked of its own launcher: lengths, samples and table rows are not in it."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(CACHE))
    monkeypatch.setattr(triton.runtime.driver, "_active", TargetDriver())
    case = (90, F16, (16, 16, 0), 1, 0.1)

    def warm(lengths: tuple[int, ...]) -> list[Any]:
        return [
            launch.kernel.warmup(grid=launch.grid, **launch.arguments, **launch.constants, **launch.options)
            for launch in launches(case, lengths)
        ]

    first = warm((200,))
    for lengths in ((16, 128, 33), (1,), (64, 64)):
        for known, again in zip(first, warm(lengths), strict=True):
            assert again is known, again.name


def main() -> None:
    import tempfile

    os.environ["TRITON_CACHE_DIR"] = str(CACHE)
    with tempfile.TemporaryDirectory() as folder:
        kernels = {label(case): measure(case, Path(folder)) for case in CASES}
    record = {"triton": triton.__version__, "kernels": kernels}
    RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
