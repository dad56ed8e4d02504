"""`python -m benchmarks.report` writes docs/BENCHMARKS.md from benchmarks/results/*.json.

Ratios are the result: times of a CPU stand in the JSON files only.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # as a script only benchmarks/ itself is on the path
    sys.path.insert(0, str(ROOT))

from benchmarks import catalogue, tables  # noqa: E402
from benchmarks.core import OpBench  # noqa: E402
from ofakern.errors import DataError  # noqa: E402

RESULTS = ROOT / "benchmarks/results"
PAGE = ROOT / "docs/BENCHMARKS.md"

_INTRO = """# Benchmarks

Written by `python -m benchmarks.report` from `benchmarks/results/*.json`; those come from `ofakern bench`.

How it is measured: the op is first checked on the very cases (the rule of its tests). Then our kernel and its peers run
in turn in one process on the same random inputs. Shares are of p50 times.

- *roofline*: the least time that the case allows on this machine, over our time. The least time is the largest of: its
  flops at torch's GEMM rate of that dtype; its bytes at the faster of copy and read, over arrays of the case's size;
  its other work (`vector`: float32 operations outside matrix products, `erf`, `exp`) at that kind's rate. All rates
  are measured in the same run. Those of a case of at least 1 GFLOP or 32 MiB run in turn with its contenders, and the
  medians are compared (`rates` in the file; one without has the run's rates only): on a shared
  machine a rate of another moment says little.
- *bound*: which of these it is.
- Time is wall time; with one thread it is the process's CPU time, which other load on the machine hardly touches.
- *of GEMM without AMX*: our rate over torch's GEMM held to AVX512_BF16 (`ONEDNN_MAX_CPU_ISA`), where the CPU has AMX.
- *against a peer*: its time over ours, above 1 we are faster. `-`: it did not run, the reason is below the table.
- *extra memory*: growth of the resident set during the call, in a process of its own, beyond inputs, output and
  gradients (which every way to compute it needs).
- A run that is cut off (Ctrl-C, SIGTERM) keeps the phases that it has measured; its file says `"complete": false`.
- Work is the case's own (`work` in its `benchmarks/ops/bench_<op>.py`), the same for every contender.
"""


def page(files: list[Path]) -> str:
    """The Markdown page of some result files. Raises DataError when there are none."""
    if not files:
        raise DataError(f"benchmarks.report: {RESULTS} must hold at least one .json result, got none")
    loaded = {path.name: tables.load(path) for path in files}
    found = {record["op"] for results in loaded.values() for record in results["records"]}
    lines = [_INTRO, "## Machines and their rooflines"]
    for name, results in loaded.items():
        lines += _machine(name, results)
    for op in (name for name in catalogue.names() if name in found):
        lines += _op(catalogue.load(op), loaded)
    return "\n".join(lines) + "\n"


def _machine(name: str, results: dict[str, Any]) -> list[str]:
    machine = results["machine"]
    versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items() if k in ("ofakern", "python", "torch"))
    return [
        "",
        f"`{name}`: {machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, kernels for "
        f"`{machine['isa']}`; {versions}; commit {machine['commit'] or 'unknown'}, {machine['date'][:10]}."
        + (" The run was cut off: cases that it did not come to are missing." if tables.cut_off(results) else ""),
        "",
        *(f"- {line}" for line in tables.roofline_lines(results["roofline"])),
    ]


def _op(op: OpBench, loaded: dict[str, dict[str, Any]]) -> list[str]:
    lines = ["", f"## {op.name}"]
    if op.about:
        lines += ["", *(f"- `{peer}`: {text}" for peer, text in op.about.items())]
    for name, results in loaded.items():
        records = [r for r in results["records"] if r["op"] == op.name]
        skipped = [s for s in results["skipped"] if s["op"] == op.name]
        for dtype, phase in dict.fromkeys((r["dtype"], r["phase"]) for r in records):
            lines += ["", f"### {op.name}, {phase}, {dtype} (`{name}`)", ""]
            group = [r for r in records if (r["dtype"], r["phase"]) == (dtype, phase)]
            lines += _table(group, results["roofline"], dtype, op.memory_peer)
        if records:
            lines += _reasons(skipped)
    return lines


def _reasons(skipped: list[dict[str, str]]) -> list[str]:
    """What did not run, one line per contender and reason."""
    groups: dict[tuple[str, str], set[str]] = {}
    for s in skipped:
        groups.setdefault((s["backend"], s["reason"]), set()).add(f"{s['case']} {s['phase']}")
    if not groups:
        return []
    told = [f"- `{peer}`: {reason} ({', '.join(sorted(cases))})" for (peer, reason), cases in sorted(groups.items())]
    return ["", "What did not run:", "", *told]


def _table(records: list[dict[str, Any]], roof: dict[str, Any], dtype: str, memory_peer: str | None) -> list[str]:
    ours = [r for r in records if "versus" in r]
    memory = {(r["case"], r["backend"]): r["peak_mib"] for r in records}
    peers = list(dict.fromkeys(name for r in ours for name in r["versus"]))
    low = roof.get("gemm_no_amx_tflops", {}).get(dtype) if any(r["tflops"] for r in ours) else None
    heads = ["case", "roofline", "bound"] + (["of GEMM without AMX"] if low else [])
    heads += [f"against {p}" for p in peers] + ["extra memory, MiB"]
    heads += [f"{memory_peer}'s, MiB"] if memory_peer in peers else []
    rows = ["| " + " | ".join(heads) + " |", "|---" + "|--:" * (len(heads) - 1) + "|"]
    for r in ours:
        cells = [r["case"], f"{r['roofline_pct']:.0f} %", r["bound"]]
        cells += [f"{100 * r['tflops'] / low['best']:.0f} %"] if low else []
        cells += [f"{r['versus'][p]:.2f}" if p in r["versus"] else "-" for p in peers]
        cells += [tables.peak(r["peak_mib"])]
        cells += [tables.peak(memory.get((r["case"], memory_peer)))] if memory_peer in peers else []
        rows.append("| " + " | ".join(cells) + " |")
    return rows


if __name__ == "__main__":
    try:
        PAGE.write_text(page(sorted(RESULTS.glob("*.json"))), encoding="utf-8")
    except DataError as error:
        sys.exit(str(error))
    print(PAGE)
