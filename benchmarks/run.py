"""The runner: check the op, then time it and its peers in turn, and relate both to this machine's roofline.

`python benchmarks/run.py attention ...` is `ofakern bench attention ...`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # as a script only benchmarks/ itself is on the path
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from tqdm import tqdm  # noqa: E402

from benchmarks import machine, roofline, timing  # noqa: E402
from benchmarks.core import DTYPES, PHASES, Contender, OpBench, Phase, Unavailable, Work  # noqa: E402
from benchmarks.memory import MemoryMeter  # noqa: E402
from ofakern.errors import OfakernRuntimeError, OfakernValueError  # noqa: E402

_AGREEMENT = {"f32": 1e-4, "bf16": 3e-2, "f16": 5e-3}  # relative L2 between contenders of one function


@dataclass(frozen=True)
class Options:
    op: str
    dtypes: Sequence[str] = ("f32", "bf16")
    cases: Sequence[str] | None = None
    quick: bool = False
    threads: int | None = None


@dataclass
class _Timing:
    """One contender's times of one case; becomes a record when the roofline is known."""

    case: str
    phase: Phase
    dtype: str
    backend: str
    seconds: dict[str, float]
    work: Work
    peak_mib: float | None = None


@dataclass
class _Session:
    op: OpBench
    options: Options
    meter: MemoryMeter | None
    harness: ModuleType
    timings: list[_Timing] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)
    bands: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def ours(self) -> str:
        return next(iter(self.op.CONTENDERS))


def run(options: Options) -> dict[str, Any]:
    """The results: {"machine", "roofline", "records", "skipped"}; records as in docs/BENCHMARKS.md.

    Raises OfakernRuntimeError when the op gives a wrong result on a case: a wrong kernel is not timed.
    """
    op = load_op(options.op)
    specs = _chosen(op, options)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    about = machine.describe()
    gemms = {dtype: roofline.gemm(dtype) for dtype in options.dtypes}
    meter = MemoryMeter(options.op) if MemoryMeter.available else None
    session = _Session(op, options, meter, load_harness())
    try:
        _run_cases(session, specs)
    finally:
        if meter is not None:
            meter.__exit__()
    gemms = {dtype: roofline.merge(rates, roofline.gemm(dtype)) for dtype, rates in gemms.items()}
    roof: dict[str, Any] = {"gemm_tflops": gemms, "bandwidth": session.bands}
    low = [dtype for dtype in options.dtypes if dtype != "f32"]
    if roofline.has_amx() and low:
        roof["gemm_no_amx_tflops"] = {dtype: roofline.gemm_no_amx(dtype) for dtype in low}
    return {"machine": about, "roofline": roof, "records": _records(session, gemms), "skipped": session.skipped}


def load_op(name: str) -> OpBench:
    found = sorted(path.stem.removeprefix("bench_") for path in (ROOT / "benchmarks/ops").glob("bench_*.py"))
    if name not in found:
        raise OfakernValueError(f"bench: OP must be one of {', '.join(found)}, got {name!r}")
    module: Any = import_module(f"benchmarks.ops.bench_{name}")
    loaded: OpBench = module
    return loaded


def _chosen(op: OpBench, options: Options) -> list[Any]:
    wrong = [dtype for dtype in options.dtypes if dtype not in DTYPES]
    if wrong:
        raise OfakernValueError(f"bench: --dtype must be one of {', '.join(DTYPES)}, got {wrong[0]!r}")
    if options.threads is not None and options.threads < 1:
        raise OfakernValueError(f"bench: --threads must be at least 1, got {options.threads}")
    if options.cases is None:
        return [spec for spec in op.CASES.values() if (spec.quick if options.quick else spec.default)]
    for name in options.cases:
        if name not in op.CASES:
            raise OfakernValueError(f"bench: --case must be one of {', '.join(op.CASES)}, got {name!r}")
    return [op.CASES[name] for name in options.cases]


def load_harness(name: str = "harness") -> ModuleType:
    """A module of tests/ops: what the op's tests prove a kernel with."""
    folder = ROOT / "tests/ops"
    if not (folder / f"{name}.py").is_file():
        raise OfakernRuntimeError(
            f"bench: the op tests' rule must be at {folder / name}.py, got nothing\nTry: run from a complete checkout."
        )
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    return import_module(name)


def _run_cases(session: _Session, specs: list[Any]) -> None:
    steps = [(spec, dtype) for dtype in session.options.dtypes for spec in specs]
    with tqdm(total=len(steps) * (1 + len(PHASES)), unit="step", disable=None) as bar:
        for spec, dtype in steps:
            bar.set_description(f"{spec.name} {dtype}: check")
            check(session.op, spec, dtype, session.harness)
            bar.update()
            for line in _run_case(session, spec, dtype, bar):
                tqdm.write(line)


def check(op: OpBench, spec: Any, dtype: str, harness: Any) -> None:
    """Raises OfakernRuntimeError unless our kernel keeps the op tests' rule on the case."""
    try:
        op.verify(spec, dtype, harness)
    except AssertionError as error:
        raise OfakernRuntimeError(
            f"bench: {op.OP} must be right before it is timed, got a wrong result on {spec.name} {dtype}: {error}\n"
            f"Try: pytest tests/ops -k {op.OP}"
        ) from error


def _run_case(session: _Session, spec: Any, dtype: str, bar: Any) -> Iterator[str]:
    contenders = _contenders(session, spec, dtype)
    expected = _agreed(contenders, session.ours, spec, dtype)
    for phase in PHASES:
        bar.set_description(f"{spec.name} {dtype} {phase}")
        work = session.op.work(spec, dtype, phase)
        key = f"{work.bytes / 2**20:.3g} MiB"
        if key not in session.bands:
            session.bands[key] = roofline.bandwidth(work.bytes)
        calls = {}
        for name, entry in contenders.items():
            try:
                calls[name] = entry.call(phase)
            except Unavailable as reason:
                _skip(session, spec, dtype, phase, name, str(reason))
        samples, last = timing.in_turn(calls, timing.QUICK if session.options.quick else timing.FULL)
        if not torch.equal(contenders[session.ours].packed(last[session.ours]), expected):
            raise OfakernRuntimeError(f"bench: {spec.name} {dtype} must give the same bits in every call, got others")
        del last
        for name in calls:
            seconds = timing.quantiles(samples[name])
            peak = _peak(session, spec, dtype, name, phase)
            session.timings.append(_Timing(spec.name, phase, dtype, name, seconds, work, peak))
        bar.update()
        yield _progress_line(session, spec.name, dtype, phase)


def _contenders(session: _Session, spec: Any, dtype: str) -> dict[str, Contender]:
    problem = session.op.make(spec, dtype)
    made = {}
    for name, build in session.op.CONTENDERS.items():
        try:
            if session.options.quick and name in session.op.SLOW_CONTENDERS:
                raise Unavailable("left out by --quick: it compiles for many seconds")
            made[name] = build(problem)
        except Unavailable as reason:
            for phase in PHASES:
                _skip(session, spec, dtype, phase, name, str(reason))
    return made


def _skip(session: _Session, spec: Any, dtype: str, phase: str, name: str, reason: str) -> None:
    entry = {"op": session.op.OP, "case": spec.name, "phase": phase, "dtype": dtype, "backend": name, "reason": reason}
    session.skipped.append(entry)


def _agreed(contenders: dict[str, Contender], ours: str, spec: Any, dtype: str) -> Tensor:
    """Our (checked) output on the timed inputs; a peer that computes another function than it claims is an error."""
    expected = contenders[ours].packed(contenders[ours].call("fwd")())
    for name, entry in contenders.items():
        if name == ours or not entry.exact:
            continue
        got = entry.packed(entry.call("fwd")())
        error = ((got.double() - expected.double()).norm() / expected.double().norm()).item()
        if not error <= _AGREEMENT[dtype]:
            raise OfakernRuntimeError(
                f"bench: {name} must agree with {ours} on {spec.name} {dtype} to {_AGREEMENT[dtype]:g}, got {error:.2g}"
            )
    return expected


def _peak(session: _Session, spec: Any, dtype: str, name: str, phase: Phase) -> float | None:
    if session.meter is None or (session.options.quick and phase == "fwd"):
        return None
    return session.meter.peak_mib(spec.name, dtype, name, phase, torch.get_num_threads())


def _progress_line(session: _Session, case: str, dtype: str, phase: str) -> str:
    group = [t for t in session.timings if (t.case, t.dtype, t.phase) == (case, dtype, phase)]
    times = ", ".join(f"{t.backend} {t.seconds['p50'] * 1e3:.3g}" for t in group)
    return f"{case} {dtype} {phase}, ms: {times}"


def _records(session: _Session, gemms: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    median = {(t.case, t.phase, t.dtype, t.backend): t.seconds["p50"] for t in session.timings}
    records = []
    for t in session.timings:
        p50 = t.seconds["p50"]
        band = session.bands[f"{t.work.bytes / 2**20:.3g} MiB"]
        record: dict[str, Any] = {
            "op": session.op.OP,
            "case": t.case,
            "phase": t.phase,
            "dtype": t.dtype,
            "device": "cpu",
            "backend": t.backend,
            "ms": {name: seconds * 1e3 for name, seconds in t.seconds.items()},
            "peak_mib": t.peak_mib,
            "tflops": t.work.flops / p50 / 1e12,
            "gbps": t.work.bytes / p50 / 1e9,
            "roofline_pct": 100 * roofline.least_seconds(t.work, gemms[t.dtype]["best"], band) / p50,
        }
        if t.backend == session.ours:
            peers = [key for key in median if key[:3] == (t.case, t.phase, t.dtype) and key[3] != session.ours]
            record["versus"] = {key[3]: median[key] / p50 for key in peers}
        records.append(record)
    return records


def write_json(results: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    from ofakern.cli.main import main

    sys.exit(main(["bench", *sys.argv[1:]]))
