"""What this machine can do, measured in the same run: torch's GEMM per dtype, copy and read bandwidth.

`python -m benchmarks.roofline DTYPE THREADS` prints one GEMM measurement as JSON; the runner calls it with oneDNN held
below AMX for the row `gemm_no_amx`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.core import DTYPES, Work
from benchmarks.timing import clock, quantiles
from ofakern.errors import OfakernValueError

KINDS = ("vector", "erf", "exp")
_SIZES = (1024, 2048)
LARGEST = 2**30  # bytes: beyond it a bandwidth is that of the memory, whatever the size
_LARGE_WORK = Work(flops=1e9, bytes=2**25)  # from here on the rates are measured in turn with the contenders
_NO_AMX = "AVX512_CORE_BF16"
_ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Yardstick:
    """A call that does `amount` of flops, or moves that many bytes."""

    call: Callable[[], Tensor]
    amount: float

    def rate(self, seconds: float) -> float:
        """The amount per second, median of calls repeated for so long."""
        return self.amount / _median(self.call, seconds)


def _median(call: Callable[[], object], seconds: float) -> float:
    call()
    samples: list[float] = []
    now, end = clock(), time.perf_counter() + seconds
    while len(samples) < 5 or time.perf_counter() < end:
        start = now()
        call()
        samples.append(now() - start)
    return quantiles(samples)["p50"]


def gemm(dtype: str, seconds: float = 0.4) -> dict[str, float]:
    """TFLOP/s of a square matrix product by size, median of repeated calls; "best" is the largest."""
    rates = {str(size): _product(dtype, size).rate(seconds) / 1e12 for size in _SIZES}
    return rates | {"best": max(rates.values())}


def _product(dtype: str, size: int) -> Yardstick:
    a, b = (torch.randn(size, size).to(DTYPES[dtype]) for _ in range(2))
    out = torch.empty(size, size, dtype=DTYPES[dtype])
    return Yardstick(lambda: torch.mm(a, b, out=out), 2 * size**3)


def has_amx() -> bool:
    try:
        return "amx_tile" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False  # not Linux


def gemm_no_amx(dtype: str) -> dict[str, float]:
    """The same GEMM in a process whose oneDNN is limited to AVX512_BF16: what a kernel without AMX is up against."""
    command = [sys.executable, "-m", "benchmarks.roofline", dtype, str(torch.get_num_threads())]
    env = os.environ | {"ONEDNN_MAX_CPU_ISA": _NO_AMX, "PYTHONPATH": str(_ROOT)}
    result = subprocess.run(command, env=env, cwd=_ROOT, capture_output=True, text=True, check=True)
    rates: dict[str, float] = json.loads(result.stdout)
    return rates


def bandwidth(size: float, seconds: float = 0.1) -> dict[str, float]:
    """GB/s of copy (bytes read plus bytes written) and of read (a sum), over arrays of `size` bytes in all."""
    copy, read = _passes(size)
    rates = {"copy_gbps": copy.rate(seconds) / 1e9, "read_gbps": read.rate(seconds) / 1e9}
    return {"mib": copy.amount / 2**20, **rates}


def _passes(size: float) -> tuple[Yardstick, Yardstick]:
    words = max(int(min(size, LARGEST)) // 8, 1024)
    source, target, whole = torch.ones(words), torch.empty(words), torch.ones(2 * words)
    return Yardstick(lambda: target.copy_(source), 8 * words), Yardstick(lambda: whole.sum(), 8 * words)


def in_turn(work: Work, dtype: str, roof: Mapping[str, Any]) -> dict[str, Yardstick]:
    """What runs in turn with the contenders of a large case, so that they and the rates they are held to meet the same
    machine: "gemm_tflops", a matrix product of the size that was the faster one; "copy_gbps" and "read_gbps"."""
    found: dict[str, Yardstick] = {}
    if work.flops >= _LARGE_WORK.flops:
        rates = roof["gemm_tflops"][dtype]
        found["gemm_tflops"] = _product(dtype, max(_SIZES, key=lambda size: float(rates[str(size)])))
    if work.bytes >= _LARGE_WORK.bytes and not work.cold:
        found["copy_gbps"], found["read_gbps"] = _passes(work.bytes)
    return found


def other(kind: str, seconds: float = 0.2) -> float:
    """1e9 per second of a kind of work outside matrix products, all threads, on data that stays in the caches.

    "vector": float32 additions and multiplications, at the rate of the float32 GEMM (fused, two a step: no kernel can
    do more); "erf", "exp": evaluations by torch on float32. Raises OfakernValueError for another kind.
    """
    if kind == "vector":
        return 1e3 * gemm("f32", seconds)["best"]
    if kind not in KINDS:
        raise OfakernValueError(f"bench: a kind of work must be one of {', '.join(KINDS)}, got {kind!r}")
    x = torch.randn(64 * 1024 * torch.get_num_threads())
    out = torch.empty_like(x)
    function = torch.erf if kind == "erf" else torch.exp
    return x.numel() / _median(lambda: function(x, out=out), seconds) / 1e9


def bounds(work: Work, dtype: str, roof: Mapping[str, Any], band: Mapping[str, float]) -> dict[str, float]:
    """Seconds that each part of the work takes at least: "gemm", "bytes", and the other kinds; the floor is the most.

    band: copy and read rates, and the matrix product's where it was measured in turn with the work. The parts may
    overlap (matrix units, vector units, memory), so their sum is no bound.
    """
    found = {
        "gemm": work.flops / (band.get("gemm_tflops", roof["gemm_tflops"][dtype]["best"]) * 1e12),
        "bytes": work.bytes / (max(band["copy_gbps"], band["read_gbps"]) * 1e9),
    }
    return found | {kind: count / (roof["other_gops"][kind] * 1e9) for kind, count in work.other.items()}


def merge(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """The better of two measurements of one thing, number by number."""
    return {key: max(value, second[key]) for key, value in first.items()}


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[2]))
    print(json.dumps(gemm(sys.argv[1])))
