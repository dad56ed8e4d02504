"""`ofakern bench --device cuda`: the same cases and peers on a GPU, timed by CUDA events.

Ours are the op's CUDA C++ and Triton kernels, each where it has one, and its reference: what `auto` takes without them.

Records are those of benchmarks/run.py with device "cuda". Our kernels' have a "size" for benchmarks/dispatch.py:
width (last dimension) and length (all others) of the tensor that the choice among backends looks at. A wrong kernel is
not timed and a peer that fails is left out with its reason, but neither ends the run: a visit to a GPU is short.
`results["wrong"]` names what was wrong.

A sample is one call between two events; before it a kernel overwrites the second-level cache and another one spins, so
that the call's launches are queued before the first of them starts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks import catalogue, machine, roofline
from benchmarks.core import DTYPES, Contender, OpBench, Output, Unavailable, Work, tensors
from benchmarks.cutoff import Keep, keep_nothing, terminable
from benchmarks.moved import moved
from benchmarks.timing import quantiles
from ofakern.errors import BackendError, OfakernError, OfakernRuntimeError, OfakernValueError
from ofakern.ops.selection import Backends

BACKENDS = ("cuda", "triton")
REFERENCE = "reference"
_DEVICE = "cuda"
_ROUNDS, _QUICK_ROUNDS = 30, 10
_SPIN = 4_000_000  # clock cycles, about 2 ms
_FLUSH = 256 * 2**20  # bytes: several times any second-level cache
_GEMM = 8192
_LARGEST = 2**31  # bytes of a bandwidth's arrays


@dataclass
class _Session:
    """What a run gathers."""

    quick: bool
    keep: Keep
    about: dict[str, Any]
    records: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    gemms: dict[str, Any] = field(default_factory=dict)
    bands: dict[str, Any] = field(default_factory=dict)

    def skip(self, op: OpBench, case: str, dtype: str, phase: str, backend: str, reason: str) -> None:
        entry = {"op": op.name, "case": case, "phase": phase, "dtype": dtype, "backend": backend}
        self.skipped.append(entry | {"reason": reason})

    def results(self, complete: bool) -> dict[str, Any]:
        return {
            "complete": complete,
            "machine": self.about,
            "roofline": {"gemm_tflops": self.gemms, "bandwidth": self.bands},
            "records": self.records,
            "skipped": self.skipped,
            "wrong": self.wrong,
        }


def names() -> list[str]:
    """The benchmarks whose op has a kernel for GPUs."""
    return [name for name in catalogue.names() if "cuda" in catalogue.load(name).devices]


def run(options: Any, keep: Keep = keep_nothing) -> dict[str, Any]:
    """{"complete", "machine", "roofline", "records", "skipped", "wrong"} of `run.Options`; keep and a run that is cut
    off as in benchmarks/run.py.

    Raises OfakernRuntimeError without a GPU, OfakernValueError for an op, case or dtype that is none.
    """
    ops = _ops(options)
    if not torch.cuda.is_available():
        raise OfakernRuntimeError("bench: --device cuda must find a GPU, got none that torch can use")
    about = machine.describe() | {"device": "cuda", "gpu": torch.cuda.get_device_name(), "clock": "cuda events"}
    session = _Session(options.quick, keep, about)
    with terminable():
        try:
            for op in ops:
                harness = catalogue.load_harness(op.harness)
                for dtype in _dtypes(op, options):
                    for spec in _specs(op, options):
                        _case(session, op, spec, dtype, harness)
                        keep(session.results(complete=False))
        except KeyboardInterrupt:
            if not session.records:
                raise
            return session.results(complete=False)
    return session.results(complete=True)


def _ops(options: Any) -> list[OpBench]:
    ready = names()
    wanted = ready if "all" in options.ops else list(dict.fromkeys(options.ops))
    for name in wanted:
        catalogue.load(name)
        if name not in ready:
            raise OfakernValueError(
                f"bench: OP must have a GPU kernel with --device cuda ({', '.join(ready)}), got {name!r}"
            )
    for dtype in options.dtypes or ():
        if dtype not in DTYPES:
            raise OfakernValueError(f"bench: --dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    ops = [catalogue.load(name) for name in wanted]
    known = [case for op in ops for case in op.cases]
    for case in options.cases or ():
        if case not in known:
            raise OfakernValueError(f"bench: --case must be one of {', '.join(known)}, got {case!r}")
    return ops


def _dtypes(op: OpBench, options: Any) -> list[str]:
    """What was asked for, as far as the op has it; else its own: half precision, or float32 where there is no other."""
    allowed = (*op.dtypes, "f16") if "bf16" in op.dtypes else op.dtypes
    own = [dtype for dtype in op.dtypes if dtype != "f32"] or list(op.dtypes)
    return [dtype for dtype in options.dtypes or () if dtype in allowed] or own


def _specs(op: OpBench, options: Any) -> list[Any]:
    if options.cases is not None:
        return [op.cases[name] for name in options.cases if name in op.cases]
    return [spec for spec in op.cases.values() if (spec.quick if options.quick else spec.default)]


def _case(session: _Session, op: OpBench, spec: Any, dtype: str, harness: ModuleType) -> None:
    right = [backend for backend in BACKENDS if _verified(session, op, spec, dtype, harness, backend)]
    if not right:
        return
    entries = _agreeing(session, op, spec, dtype, _contenders(session, op, spec, dtype, right))
    for phase in op.phases_of(spec):
        calls = {}
        for name, entry in entries.items():
            try:
                calls[name] = entry.call(phase)
            except Unavailable as reason:
                session.skip(op, spec.name, dtype, phase, name, str(reason))
        _phase(session, op, spec, dtype, phase, calls, entries)
    torch.cuda.empty_cache()


def _verified(session: _Session, op: OpBench, spec: Any, dtype: str, harness: ModuleType, backend: str) -> bool:
    """Whether a kernel may be timed: it can run the case and keeps the rule."""
    try:
        op.verify(spec, dtype, harness, backend)
    except BackendError as reason:
        session.skip(op, spec.name, dtype, "fwd", backend, str(reason).splitlines()[0])
        return False
    except (AssertionError, OfakernError, RuntimeError) as error:
        line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        session.wrong.append(f"{op.name} {spec.name} {dtype} {backend}: {line}")
        session.skip(op, spec.name, dtype, "fwd", backend, f"wrong, so not timed: {line}")
        return False
    return True


def _contenders(session: _Session, op: OpBench, spec: Any, dtype: str, right: list[str]) -> dict[str, Contender]:
    """Ours first. Peers make their own tensors (masks, rows) on the device."""
    problem, made = moved(op.make(spec, dtype), _DEVICE), {}
    ours = op.contenders[op.ours]
    builders: dict[str, Callable[[], Contender]] = {b: partial(ours, problem, b) for b in (*right, REFERENCE)}
    builders |= {name: partial(build, problem) for name, build in op.contenders.items() if name != op.ours}
    with torch.device(_DEVICE):
        for name, build in builders.items():
            try:
                if session.quick and name in op.slow:
                    raise Unavailable("left out by --quick: it compiles for many seconds")
                made[name] = build()
            except (Unavailable, RuntimeError) as reason:
                session.skip(op, spec.name, dtype, "fwd", name, str(reason).splitlines()[0])
    return made


def _agreeing(
    session: _Session, op: OpBench, spec: Any, dtype: str, entries: dict[str, Contender]
) -> dict[str, Contender]:
    """Without the peers that cannot run, or that compute another function than they claim."""
    kept, expected = {}, None
    for name, entry in entries.items():
        try:
            got = entry.comparable(entry.call("fwd")()).double()
        except RuntimeError as reason:
            session.skip(op, spec.name, dtype, "fwd", name, str(reason).splitlines()[0])
            continue
        expected = got if expected is None else expected
        error = float((got - expected).norm() / expected.norm())
        if entry.exact and not error <= op.agreement[dtype]:
            session.skip(op, spec.name, dtype, "fwd", name, f"disagrees with {next(iter(entries))}: {error:.2g}")
            continue
        kept[name] = entry
    return kept


def _phase(
    session: _Session,
    op: OpBench,
    spec: Any,
    dtype: str,
    phase: str,
    calls: dict[str, Callable[[], Output]],
    entries: Mapping[str, Contender],
) -> None:
    samples: dict[str, list[float]] = {}
    peaks = {}
    for name in list(calls):
        try:
            for _ in range(2):
                calls[name]()
            peaks[name] = _peak_mib(calls[name], entries[name].leaves if phase != "fwd" else ())
            samples[name] = []
        except RuntimeError as error:  # out of memory, or a peer that cannot run on this GPU
            session.skip(op, spec.name, dtype, phase, name, str(error).splitlines()[0])
            del calls[name]
    flush = torch.empty(_FLUSH, dtype=torch.uint8, device=_DEVICE)
    for _ in range(_QUICK_ROUNDS if session.quick else _ROUNDS):
        for name, call in calls.items():
            samples[name].append(_sample(call, flush))
    work = Work(*(getattr(op.work(spec, dtype, phase), part) for part in ("flops", "bytes")))
    times = {name: quantiles(found) for name, found in samples.items()}
    for name, seconds in times.items():
        record = _record(session, op, spec.name, phase, dtype, name, seconds, work, peaks[name])
        if name in BACKENDS:
            record["size"] = _size(calls[name])
            record["versus"] = {peer: other["p50"] / seconds["p50"] for peer, other in times.items() if peer != name}
        session.records.append(record)
        print(f"{op.name} {spec.name} {dtype} {phase} {name}: {seconds['p50'] * 1e3:.3f} ms", flush=True)


def _record(
    session: _Session,
    op: OpBench,
    case: str,
    phase: str,
    dtype: str,
    backend: str,
    seconds: dict[str, float],
    work: Work,
    peak_mib: float,
) -> dict[str, Any]:
    if dtype not in session.gemms:
        session.gemms[dtype] = _gemm(dtype)
    key = f"{work.bytes / 2**20:.3g} MiB"
    if key not in session.bands:
        session.bands[key] = _bandwidth(work.bytes)
    bounds = roofline.bounds(work, dtype, {"gemm_tflops": session.gemms}, session.bands[key])
    bound, p50 = max(bounds, key=lambda kind: bounds[kind]), seconds["p50"]
    return {
        **{"op": op.name, "case": case, "phase": phase, "dtype": dtype, "device": "cuda", "backend": backend},
        "ms": {name: value * 1e3 for name, value in seconds.items()},
        "peak_mib": peak_mib,
        "tflops": work.flops / p50 / 1e12,
        "gbps": work.bytes / p50 / 1e9,
        "bound": bound,
        "roofline_pct": 100 * bounds[bound] / p50,
    }


def _size(call: Callable[[], object]) -> list[int]:
    """Width and length of the tensor that the op's choice among backends sees."""
    seen: list[Tensor] = []
    select = Backends.select

    def watched(self: Backends, backend: str, tensor: Tensor, limit: str | None = None) -> str:
        seen.append(tensor)
        return select(self, backend, tensor, limit)

    with patch.object(Backends, "select", watched):
        call()
    width = seen[0].shape[-1] if seen[0].ndim else 1
    return [width, seen[0].numel() // max(width, 1)]


def _sample(call: Callable[[], object], flush: Tensor) -> float:
    """Seconds of one call on the device."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flush.zero_()
    torch.cuda._sleep(_SPIN)
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def _peak_mib(call: Callable[[], Output], leaves: tuple[Tensor, ...]) -> float:
    """MiB beyond inputs, output and gradients."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = [*tensors(call()), *leaves]  # a gradient is as large as its leaf
    torch.cuda.synchronize()
    returned = sum(x.numel() * x.element_size() for x in results)
    return max(0.0, (torch.cuda.max_memory_allocated() - before - returned) / 2**20)


def _median(call: Callable[[], object]) -> float:
    call()
    flush = torch.empty(_FLUSH, dtype=torch.uint8, device=_DEVICE)
    return quantiles([_sample(call, flush) for _ in range(7)])["p50"]


def _gemm(dtype: str) -> dict[str, float]:
    a, b = (torch.randn(_GEMM, _GEMM, device=_DEVICE).to(DTYPES[dtype]) for _ in range(2))
    rate = 2 * _GEMM**3 / _median(lambda: a @ b) / 1e12
    return {str(_GEMM): rate, "best": rate}


def _bandwidth(size: float) -> dict[str, float]:
    """GB/s of a copy (read and written) and of a sum over arrays of `size` bytes in all."""
    words = max(int(min(size, _LARGEST)) // 8, 1024)
    source, target = torch.ones(words, device=_DEVICE), torch.empty(words, device=_DEVICE)
    whole = torch.ones(2 * words, device=_DEVICE)
    copy = 8 * words / _median(lambda: target.copy_(source)) / 1e9
    read = 8 * words / _median(lambda: whole.sum()) / 1e9
    return {"mib": 8 * words / 2**20, "copy_gbps": copy, "read_gbps": read}
