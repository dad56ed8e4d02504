"""Results as text: the table of a run, and a run beside an older one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ofakern.errors import OfakernValueError

_KEY = ("op", "case", "phase", "dtype", "device", "backend")


def load(path: Path) -> dict[str, Any]:
    """A file that `--json` wrote. Raises OfakernValueError when it is something else."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise OfakernValueError(f"bench: {path} must be JSON, got {error}") from error
    if not isinstance(results, dict) or not {"machine", "roofline", "records"} <= results.keys():
        raise OfakernValueError(f"bench: {path} must hold machine, roofline and records, got something else")
    return results


def peak(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def render(results: dict[str, Any]) -> str:
    """Every record in a line, ratios (peer time / our time) on our rows, then the roofline and what did not run."""
    widths = f"{'case':<22}{'phase':<9}{'dtype':<7}{'backend':<13}"
    lines = [f"{widths}{'p50 ms':>10}{'p20':>10}{'p80':>10}{'MiB':>9}{'GFLOP/s':>9}{'GB/s':>7}{'roof %':>8}  peer/ours"]
    for r in results["records"]:
        ms, versus = r["ms"], r.get("versus", {})
        numbers = f"{ms['p50']:>10.3f}{ms['p20']:>10.3f}{ms['p80']:>10.3f}{peak(r['peak_mib']):>9}"
        numbers += f"{r['tflops'] * 1e3:>9.1f}{r['gbps']:>7.2f}{r['roofline_pct']:>8.1f}"
        ratios = ", ".join(f"{name} {ratio:.2f}" for name, ratio in versus.items())
        lines.append(f"{r['case']:<22}{r['phase']:<9}{r['dtype']:<7}{r['backend']:<13}{numbers}  {ratios}".rstrip())
    lines += ["", *roofline_lines(results["roofline"])]
    lines += sorted({f"{s['backend']} did not run {s['case']} {s['phase']}: {s['reason']}" for s in results["skipped"]})
    return "\n".join(lines)


def roofline_lines(roof: dict[str, Any]) -> list[str]:
    lines = []
    for name, label in (("gemm_tflops", "GEMM"), ("gemm_no_amx_tflops", "GEMM without AMX")):
        for dtype, rates in roof.get(name, {}).items():
            lines.append(f"{label} {dtype}: {rates['best'] * 1e3:.0f} GFLOP/s")
    for band in roof["bandwidth"].values():
        rates = f"copy {band['copy_gbps']:.1f}, read {band['read_gbps']:.1f} GB/s"
        lines.append(f"bandwidth over {band['mib']:.3g} MiB: {rates}")
    return lines


def compare(new: dict[str, Any], old: dict[str, Any]) -> str:
    """Old time / new time of each record in both (above 1: faster now), with the roofline shares of both runs."""
    before = {tuple(r[k] for k in _KEY): r for r in old["records"]}
    lines = [
        f"{'case':<22}{'phase':<9}{'dtype':<7}{'backend':<13}{'old ms':>10}{'new ms':>10}{'old/new':>9}{'roof %':>15}"
    ]
    for r in new["records"]:
        was = before.get(tuple(r[k] for k in _KEY))
        if was is None:
            continue
        past, now = was["ms"]["p50"], r["ms"]["p50"]
        shares = f"{was['roofline_pct']:.1f} -> {r['roofline_pct']:.1f}"
        names = f"{r['case']:<22}{r['phase']:<9}{r['dtype']:<7}{r['backend']:<13}"
        lines.append(f"{names}{past:>10.3f}{now:>10.3f}{past / now:>9.2f}{shares:>15}")
    if len(lines) == 1:
        lines.append("no record of this run is in the old file")
    for field in ("cpu", "isa", "threads"):
        if old["machine"].get(field) != new["machine"].get(field):
            lines.append(f"note: {field} was {old['machine'].get(field)}, is {new['machine'].get(field)}")
    return "\n".join(lines)
