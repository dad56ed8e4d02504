"""The runner: check the op, then time it and its peers in turn, and relate both to this machine's roofline.

`python benchmarks/run.py attention ...` is `ofakern bench attention ...`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # as a script only benchmarks/ itself is on the path
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from tqdm import tqdm  # noqa: E402

from benchmarks import catalogue, machine, roofline, timing  # noqa: E402
from benchmarks.core import DTYPES, Contender, OpBench, Phase, Unavailable, Work  # noqa: E402
from benchmarks.cutoff import Keep, keep_nothing, terminable  # noqa: E402
from benchmarks.memory import MemoryMeter  # noqa: E402
from ofakern.errors import OfakernRuntimeError, OfakernValueError  # noqa: E402


@dataclass(frozen=True)
class Options:
    """ops: names, or ("all",); dtypes and cases: None for what each op has as its default."""

    ops: Sequence[str]
    dtypes: Sequence[str] | None = None
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
    rates: Mapping[str, float]  # of the machine, measured in turn
    peak_mib: float | None = None
    details: Mapping[str, float] = field(default_factory=dict)


@dataclass
class _Run:
    """All that a run has found; its results can be told at any time."""

    quick: bool
    keep: Keep
    about: dict[str, Any]
    roof: dict[str, Any]
    sessions: list[_Session] = field(default_factory=list)

    def results(self, complete: bool) -> dict[str, Any]:
        return {
            "complete": complete,
            "machine": self.about,
            "roofline": self.roof,
            "records": [record for session in self.sessions for record in _records(session, self.roof)],
            "skipped": [entry for session in self.sessions for entry in session.skipped],
        }

    def measure_rates(self, work: Work) -> None:
        """What the roofline of this work needs and no work before it needed."""
        key = band_of(work)
        if key not in self.roof["bandwidth"]:
            self.roof["bandwidth"][key] = roofline.bandwidth(_spread(work))
        for kind in work.other:
            rates = self.roof.setdefault("other_gops", {})
            if kind not in rates:
                rates[kind] = roofline.other(kind)


@dataclass
class _Session:
    """One op's part of a run."""

    op: OpBench
    whole: _Run
    meter: MemoryMeter | None
    harness: ModuleType
    timings: list[_Timing] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)

    @property
    def quick(self) -> bool:
        return self.whole.quick

    def save(self) -> None:
        self.whole.keep(self.whole.results(complete=False))


@dataclass(frozen=True)
class _Job:
    """An op with the cases and dtypes that this run takes of it."""

    op: OpBench
    specs: list[Any]
    dtypes: tuple[str, ...]


def run(options: Options, keep: Keep = keep_nothing) -> dict[str, Any]:
    """The results: {"complete", "machine", "roofline", "records", "skipped"}; records as in docs/BENCHMARKS.md.

    keep: gets what there is after every phase. Cut off by Ctrl-C or SIGTERM, the run returns what was measured with
    "complete": False, or raises KeyboardInterrupt when that is nothing. Raises OfakernRuntimeError when an op gives a
    wrong result on a case: a wrong kernel is not timed.
    """
    jobs = _jobs(options)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    dtypes = list(dict.fromkeys(dtype for job in jobs for dtype in job.dtypes))
    with terminable():
        whole = _Run(options.quick, keep, machine.describe(), _roof(dtypes))
        try:
            for job in jobs:
                _run_job(job, whole)
            gemms = whole.roof["gemm_tflops"]
            gemms.update({dtype: roofline.merge(rates, roofline.gemm(dtype)) for dtype, rates in gemms.items()})
        except KeyboardInterrupt:
            found = whole.results(complete=False)
            if not found["records"]:
                raise
            return found
    return whole.results(complete=True)


def _roof(dtypes: list[str]) -> dict[str, Any]:
    """The rates of matrix products; `_Run.measure_rates` adds the others."""
    roof: dict[str, Any] = {"gemm_tflops": {dtype: roofline.gemm(dtype) for dtype in dtypes}, "bandwidth": {}}
    low = [dtype for dtype in dtypes if dtype != "f32"]
    if roofline.has_amx() and low:
        roof["gemm_no_amx_tflops"] = {dtype: roofline.gemm_no_amx(dtype) for dtype in low}
    return roof


def _jobs(options: Options) -> list[_Job]:
    """Raises OfakernValueError for an op, dtype or case that is none. A named case or dtype need not be in every op."""
    if options.threads is not None and options.threads < 1:
        raise OfakernValueError(f"bench: --threads must be at least 1, got {options.threads}")
    for dtype in options.dtypes or ():
        if dtype not in DTYPES:
            raise OfakernValueError(f"bench: --dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    names = catalogue.names() if "all" in options.ops else options.ops
    ops = [catalogue.load(name) for name in dict.fromkeys(names)]
    known = [case for op in ops for case in op.cases]
    for case in options.cases or ():
        if case not in known:
            raise OfakernValueError(f"bench: --case must be one of {', '.join(known)}, got {case!r}")
    jobs = [_Job(op, _specs(op, options), _dtypes(op, options)) for op in ops]
    jobs = [job for job in jobs if job.specs and job.dtypes]
    if not jobs:
        choices = ", ".join(dict.fromkeys(dtype for op in ops for dtype in _allowed(op)))
        raise OfakernValueError(f"bench: --dtype must be one of {choices}, got {' '.join(options.dtypes or ())}")
    return jobs


def _specs(op: OpBench, options: Options) -> list[Any]:
    if options.cases is not None:
        return [op.cases[name] for name in options.cases if name in op.cases]
    return [spec for spec in op.cases.values() if (spec.quick if options.quick else spec.default)]


def _allowed(op: OpBench) -> tuple[str, ...]:
    return op.dtypes if "bf16" not in op.dtypes else tuple(dict.fromkeys([*op.dtypes, "f16"]))


def _dtypes(op: OpBench, options: Options) -> tuple[str, ...]:
    return op.dtypes if options.dtypes is None else tuple(d for d in options.dtypes if d in _allowed(op))


def _run_job(job: _Job, whole: _Run) -> None:
    with MemoryMeter(job.op.name) if MemoryMeter.available else nullcontext() as meter:
        session = _Session(job.op, whole, meter, catalogue.load_harness(job.op.harness))
        whole.sessions.append(session)
        _run_cases(session, job)


def _run_cases(session: _Session, job: _Job) -> None:
    steps = [(spec, dtype) for dtype in job.dtypes for spec in job.specs]
    with tqdm(total=sum(1 + len(job.op.phases_of(spec)) for spec, _ in steps), unit="step", disable=None) as bar:
        for spec, dtype in steps:
            bar.set_description(f"{job.op.name} {spec.name} {dtype}: check")
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
            f"bench: {op.name} must be right before it is timed, got a wrong result on {spec.name} {dtype}: {error}\n"
            f"Try: pytest tests/ops -k {op.name}"
        ) from error


def _run_case(session: _Session, spec: Any, dtype: str, bar: Any) -> Iterator[str]:
    contenders = _contenders(session, spec, dtype)
    expected = _agreed(session, contenders, spec, dtype)
    ours = contenders[session.op.ours]
    for phase in session.op.phases_of(spec):
        bar.set_description(f"{session.op.name} {spec.name} {dtype} {phase}")
        work = session.op.work(spec, dtype, phase)
        session.whole.measure_rates(work)
        calls = {}
        for name, entry in contenders.items():
            try:
                calls[name] = entry.call(phase)
            except Unavailable as reason:
                _skip(session, spec, dtype, phase, name, str(reason))
        yardsticks = roofline.in_turn(work, dtype, session.whole.roof)
        turn = calls | {name: stick.call for name, stick in yardsticks.items()}
        samples, last = timing.in_turn(turn, timing.QUICK if session.quick else timing.FULL)
        if expected is not None and not torch.equal(ours.comparable(last[ours.name]), expected):
            raise OfakernRuntimeError(f"bench: {spec.name} {dtype} must give the same bits in every call, got others")
        del last
        rates = {name: _rate(name, stick, samples[name]) for name, stick in yardsticks.items()}
        timings = []
        for name in calls:
            seconds = {key: t / contenders[name].share for key, t in timing.quantiles(samples[name]).items()}
            details = contenders[name].details
            numbers = {} if details is None else dict(details())
            timings.append(_Timing(spec.name, phase, dtype, name, seconds, work, rates, details=numbers))
        session.timings += timings
        session.save()
        for one in timings:
            one.peak_mib = _peak(session, spec, dtype, one.backend, phase)
        session.save()
        bar.update()
        yield _progress_line(session, spec.name, dtype, phase)


def _rate(name: str, stick: roofline.Yardstick, samples: Sequence[float]) -> float:
    """In the unit that the name ends with: TFLOP/s or GB/s."""
    return stick.amount / timing.quantiles(samples)["p50"] / (1e12 if name.endswith("tflops") else 1e9)


def band_of(work: Work) -> str:
    """The key of the bandwidth measured over arrays of the work's size, of cold work over the largest."""
    return f"{_spread(work) / 2**20:.3g} MiB"


def _spread(work: Work) -> float:
    return roofline.LARGEST if work.cold else work.bytes


def _contenders(session: _Session, spec: Any, dtype: str) -> dict[str, Contender]:
    problem = session.op.make(spec, dtype)
    made = {}
    for name, build in session.op.contenders.items():
        try:
            if session.quick and name in session.op.slow:
                raise Unavailable("left out by --quick: making it takes many seconds")
            made[name] = build(problem)
        except Unavailable as reason:
            for phase in session.op.phases_of(spec):
                _skip(session, spec, dtype, phase, name, str(reason))
    return made


def _skip(session: _Session, spec: Any, dtype: str, phase: str, name: str, reason: str) -> None:
    entry = {"op": session.op.name, "case": spec.name, "phase": phase, "dtype": dtype, "backend": name}
    session.skipped.append(entry | {"reason": reason})


def _agreed(session: _Session, contenders: Mapping[str, Contender], spec: Any, dtype: str) -> Tensor | None:
    """Our (checked) output on the timed inputs; a peer that computes another function than it claims is an error.

    None where the op has no phase of its own output (a training step changes its state): `verify` alone stands there.
    """
    if "fwd" not in session.op.phases:
        return None
    ours, limit = contenders[session.op.ours], session.op.agreement[dtype]
    expected = ours.comparable(ours.call("fwd")())
    for name, entry in contenders.items():
        if entry is ours or not entry.exact:
            continue
        got = entry.comparable(entry.call("fwd")())
        error = ((got.double() - expected.double()).norm() / expected.double().norm()).item()
        if not error <= limit:
            raise OfakernRuntimeError(
                f"bench: {name} must agree with {ours.name} on {spec.name} {dtype} to {limit:g}, got {error:.2g}"
            )
    return expected


def _peak(session: _Session, spec: Any, dtype: str, name: str, phase: Phase) -> float | None:
    if session.meter is None or (session.quick and phase != session.op.phases_of(spec)[-1]):
        return None
    return session.meter.peak_mib(spec.name, dtype, name, phase, torch.get_num_threads())


def _progress_line(session: _Session, case: str, dtype: str, phase: str) -> str:
    group = [t for t in session.timings if (t.case, t.dtype, t.phase) == (case, dtype, phase)]
    times = ", ".join(f"{t.backend} {t.seconds['p50'] * 1e3:.3g}" for t in group)
    return f"{session.op.name} {case} {dtype} {phase}, ms: {times}"


def _records(session: _Session, roof: dict[str, Any]) -> list[dict[str, Any]]:
    median = {(t.case, t.phase, t.dtype, t.backend): t.seconds["p50"] for t in session.timings}
    records = []
    for t in session.timings:
        p50 = t.seconds["p50"]
        bounds = roofline.bounds(t.work, t.dtype, roof, {**roof["bandwidth"][band_of(t.work)], **t.rates})
        bound = max(bounds, key=lambda kind: bounds[kind])
        record: dict[str, Any] = {
            "op": session.op.name,
            "case": t.case,
            "phase": t.phase,
            "dtype": t.dtype,
            "device": "cpu",
            "backend": t.backend,
            "ms": {name: seconds * 1e3 for name, seconds in t.seconds.items()},
            "peak_mib": t.peak_mib,
            "tflops": t.work.flops / p50 / 1e12,
            "gbps": t.work.bytes / p50 / 1e9,
            "bound": bound,
            "roofline_pct": 100 * bounds[bound] / p50,
            "rates": dict(t.rates),
            **t.details,
        }
        if t.backend == session.op.ours:
            peers = [key for key in median if key[:3] == (t.case, t.phase, t.dtype) and key[3] != t.backend]
            record["versus"] = {key[3]: median[key] / p50 for key in peers}
        records.append(record)
    if session.op.extras is not None:
        for record in records:
            record.update(session.op.extras(record, records, roof))
    return records


def write_json(results: dict[str, Any], path: Path) -> None:
    """The file is whole at any time: the new one takes the old one's place at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".new")
    new.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    os.replace(new, path)


if __name__ == "__main__":
    from ofakern.cli.main import main

    sys.exit(main(["bench", *sys.argv[1:]]))
