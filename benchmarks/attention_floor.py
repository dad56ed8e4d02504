"""What attention's forward pass cannot take less than on a CPU, part by part, beside what the kernel takes.

`python -m benchmarks.attention_floor` compiles `benchmarks/native/attention_floor.cpp` against the kernel's own
products and exponential, runs the parts with their operands in the first-level cache of one core, then torch's matrix
product and the whole kernel with one thread. All is in nanoseconds per 16 scores, the least of many runs (what a
neighbour on the machine does not disturb); shares are of torch's product for the same flops.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import roofline
from benchmarks.ops.bench_attention import CASES, make, ours, work
from benchmarks.timing import Budget, in_turn
from ofakern.errors import OfakernRuntimeError

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "benchmarks/native/attention_floor.cpp"
_FLAGS = (
    "-O3",
    "-DNDEBUG",
    "-std=c++17",
    "-march=native",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
)
_RUNS = 4  # of the program, seconds apart: a neighbour that disturbs one may rest in the next
_PARTS = ("scores", "softmax", "values", "sequence", "interleaved")
_WHOLE = {64: "plain_1024", 128: "ofa_base_enc_1024"}  # by the depth of q.k, the second with a table


@dataclass(frozen=True)
class Floor:
    """Nanoseconds per 16 scores: of the parts; of torch's product for as many flops; of the kernel."""

    dtype: str
    depth: int
    parts: dict[str, float]
    gemm: float
    kernel: float


def parts() -> dict[tuple[str, int], dict[str, float]]:
    """The parts' times by dtype and depth. Raises OfakernRuntimeError when the program does not compile or run."""
    compiler = os.environ.get("CXX", "c++")
    with tempfile.TemporaryDirectory() as folder:
        program = str(Path(folder) / "attention_floor")
        include = f"-I{ROOT / 'csrc'}"
        _run([compiler, *_FLAGS, "-DOFAKERN_ISA=native", include, str(SOURCE), "-o", program])
        lines = [line for _ in range(_RUNS) for line in _run([program]).splitlines()]
    found: dict[tuple[str, int], dict[str, float]] = {}
    for line in lines:
        name, time = line.split()
        dtype, depth, part = name.split(".")
        times = found.setdefault((dtype, int(depth)), {})
        times[part] = min(float(time), times.get(part, float("inf")))
    return found


def _run(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", None) or error
        raise OfakernRuntimeError(
            f"attention_floor: {command[0]} must succeed, got {str(said).strip()[-2000:]}"
        ) from None


def measure(budget: Budget) -> list[Floor]:
    """Every dtype and depth that the compiler's target has. Torch's product and the kernel run in turn, one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [_floor(dtype, depth, times, budget) for (dtype, depth), times in parts().items()]
    finally:
        torch.set_num_threads(threads)


def _floor(dtype: str, depth: int, times: dict[str, float], budget: Budget) -> Floor:
    spec = CASES[_WHOLE[depth]]
    done, vectors = work(spec, dtype, "fwd"), spec.heads * spec.pairs / 16
    product = roofline.in_turn(done, dtype, {"gemm_tflops": {dtype: roofline.gemm(dtype)}})["gemm_tflops"]
    calls = {"kernel": ours(make(spec, dtype)).call("fwd"), "gemm": product.call}
    samples, _ = in_turn(calls, budget)
    least = {name: min(found) for name, found in samples.items()}
    gemm = least["gemm"] / product.amount * done.flops
    return Floor(dtype, depth, times, gemm / vectors * 1e9, least["kernel"] / vectors * 1e9)


def render(floors: list[Floor]) -> str:
    """A column of each dtype and depth."""
    heads = [f"{floor.dtype}, depth {floor.depth}" for floor in floors]
    lines = [f"{'ns per 16 scores':<28}" + "".join(f"{head:>18}" for head in heads)]

    def row(name: str, cells: list[str]) -> None:
        lines.append(f"{name:<28}" + "".join(f"{cell:>18}" for cell in cells))

    def share(floor: Floor, time: float | None) -> str:
        return "-" if time is None else f"{time:.2f} ({100 * floor.gemm / time:.0f} %)"

    for part in _PARTS[:3]:
        row(part, [f"{floor.parts[part]:.2f}" for floor in floors])
    for part in _PARTS[3:]:
        row(f"all three, {part}", [share(floor, floor.parts.get(part)) for floor in floors])
    row("torch's matrix product", [f"{floor.gemm:.2f}" for floor in floors])
    row("the kernel", [share(floor, floor.kernel) for floor in floors])
    return "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(__doc__)
        sys.exit(0 if sys.argv[1] in ("-h", "--help") else 2)
    try:
        print(render(measure(Budget(4.0, 5, 200))))
    except OfakernRuntimeError as error:
        sys.exit(str(error))
