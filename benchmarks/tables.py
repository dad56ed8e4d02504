"""Results as text: the table of a run, and a run beside an older one."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

from ofakern.errors import OfakernValueError

_KEY = ("op", "case", "phase", "dtype", "device", "backend")
_LARGE_MIB = 16  # arrays from here on are beyond the second-level caches


def load(path: Path) -> dict[str, Any]:
    """A file that `--json` wrote. Raises OfakernValueError when it is something else."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise OfakernValueError(f"bench: {path} must be JSON, got {error}") from error
    if not isinstance(results, dict) or not {"machine", "roofline", "records"} <= results.keys():
        raise OfakernValueError(f"bench: {path} must hold machine, roofline and records, got something else")
    return results


def cut_off(results: dict[str, Any]) -> bool:
    """Whether the run did not get to its end."""
    return not results.get("complete", True)


def peak(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def render(results: dict[str, Any]) -> str:
    """The roofline, every record in a line, ratios (peer time / our time) on our rows, then what did not run."""
    lines = roofline_lines(results["roofline"])
    for op in dict.fromkeys(r["op"] for r in results["records"]):
        lines += ["", op, *_op_lines([r for r in results["records"] if r["op"] == op])]
    lines.append("")
    lines += sorted(
        {f"{s['backend']} did not run {s['op']} {s['case']} {s['phase']}: {s['reason']}" for s in results["skipped"]}
    )
    if cut_off(results):
        lines.append("the run was cut off: this is what it had measured")
    return "\n".join(lines).rstrip()


def _op_lines(records: list[dict[str, Any]]) -> list[str]:
    head = _names({"case": "case", "phase": "phase", "dtype": "dtype", "backend": "backend"})
    numbers = f"{'p50 ms':>10}{'p20':>10}{'p80':>10}{'MiB':>9}{'GFLOP/s':>9}{'GB/s':>7}{'roof %':>8}"
    lines = [f"{head}{numbers}  peer/ours"]
    for r in records:
        ms, versus = r["ms"], r.get("versus", {})
        numbers = f"{ms['p50']:>10.3f}{ms['p20']:>10.3f}{ms['p80']:>10.3f}{peak(r['peak_mib']):>9}"
        numbers += f"{r['tflops'] * 1e3:>9.1f}{r['gbps']:>7.2f}{r['roofline_pct']:>8.1f}"
        ratios = ", ".join(f"{name} {ratio:.2f}" for name, ratio in versus.items())
        lines.append(f"{_names(r)}{numbers}  {ratios}".rstrip())
    return lines


def _names(record: dict[str, Any]) -> str:
    return f"{record['case']:<22}{record['phase']:<13}{record['dtype']:<7}{record['backend']:<15}"


def roofline_lines(roof: dict[str, Any]) -> list[str]:
    """What the machine did in the run: GEMM per dtype, other kinds of work, bandwidth over large and small arrays."""
    lines = []
    for name, label in (("gemm_tflops", "GEMM"), ("gemm_no_amx_tflops", "GEMM without AMX")):
        for dtype, rates in roof.get(name, {}).items():
            lines.append(f"{label} {dtype}: {rates['best'] * 1e3:.0f} GFLOP/s")
    units = {"vector": "float32 GFLOP/s", "erf": "G evaluations/s", "exp": "G evaluations/s"}
    lines += [f"{kind}: {rate:.3g} {units[kind]}" for kind, rate in roof.get("other_gops", {}).items()]
    for label, large in ((f"from {_LARGE_MIB} MiB on", True), (f"below {_LARGE_MIB} MiB", False)):
        bands = [band for band in roof["bandwidth"].values() if (band["mib"] >= _LARGE_MIB) == large]
        if bands:
            rates = ", ".join(f"{word} {_span([band[f'{word}_gbps'] for band in bands])}" for word in ("copy", "read"))
            lines.append(f"bandwidth over arrays {label}: {rates} GB/s")
    return lines


def _span(values: list[float]) -> str:
    low, high = f"{min(values):.0f}", f"{max(values):.0f}"
    return low if low == high else f"{low} to {high}"


def compare(new: dict[str, Any], old: dict[str, Any]) -> str:
    """Old time / new time of each record in both (above 1: faster now), its noise band, and both roofline shares.

    The band is from old p20 / new p80 to old p80 / new p20; a ratio is called slower or faster when 1 lies outside it.
    What the peers' median did is the machine's drift, not the kernel's.
    """
    before = {tuple(r[k] for k in _KEY): r for r in old["records"]}
    lines = []
    for op in dict.fromkeys(r["op"] for r in new["records"]):
        records = [r for r in new["records"] if r["op"] == op and tuple(r[k] for k in _KEY) in before]
        if records:
            head = _names({"case": "case", "phase": "phase", "dtype": "dtype", "backend": "backend"})
            lines += [
                op + _drift(before, records),
                f"{head}{'old ms':>10}{'new ms':>10}{'old/new':>9}{'band':>14}{'roof %':>16}",
            ]
            lines += [_compared(before[tuple(r[k] for k in _KEY)], r) for r in records]
    if not lines:
        lines.append("no record of this run is in the old file")
    lines += [f"note: the {age} run was cut off" for age, one in (("old", old), ("new", new)) if cut_off(one)]
    for field in ("cpu", "isa", "threads"):
        if old["machine"].get(field) != new["machine"].get(field):
            lines.append(f"note: {field} was {old['machine'].get(field)}, is {new['machine'].get(field)}")
    return "\n".join(lines)


def _drift(before: dict[tuple[Any, ...], dict[str, Any]], records: list[dict[str, Any]]) -> str:
    ratios = [before[tuple(r[k] for k in _KEY)]["ms"]["p50"] / r["ms"]["p50"] for r in records if "versus" not in r]
    return f" (its peers, median old/new: {median(ratios):.2f})" if ratios else ""


def _compared(was: dict[str, Any], now: dict[str, Any]) -> str:
    past, present = was["ms"], now["ms"]
    low, high = past["p20"] / present["p80"], past["p80"] / present["p20"]
    verdict = "faster" if low > 1 else "slower" if high < 1 else ""
    shares = f"{was['roofline_pct']:.1f} -> {now['roofline_pct']:.1f}"
    times = f"{past['p50']:>10.3f}{present['p50']:>10.3f}{past['p50'] / present['p50']:>9.2f}"
    return f"{_names(now)}{times}{f'{low:.2f}..{high:.2f}':>14}{shares:>16}  {verdict}".rstrip()
