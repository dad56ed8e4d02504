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

from benchmarks import tables  # noqa: E402
from ofakern.errors import DataError  # noqa: E402

RESULTS = ROOT / "benchmarks/results"
PAGE = ROOT / "docs/BENCHMARKS.md"

_INTRO = """# Benchmarks

Written by `python -m benchmarks.report` from `benchmarks/results/*.json`; those come from `ofakern bench`.

How it is measured: the op is first checked on the very cases (the rule of its tests). Then our kernel and its peers run
in turn in one process on the same random inputs. Shares are of p50 times.

- *roofline*: the least time that the case's flops (at torch's GEMM rate of that dtype) or bytes (at the faster of copy
  and read, over arrays of the case's size) allow on this machine, over our time. Both are measured in the same run.
- *of GEMM without AMX*: our rate over torch's GEMM held to AVX512_BF16 (`ONEDNN_MAX_CPU_ISA`), where the CPU has AMX.
- *against a peer*: its time over ours, above 1 we are faster. `-`: it did not run, the reason is below the table.
- *extra memory*: growth of the resident set during the call, in a process of its own, beyond inputs, output and
  gradients (which every way to compute it needs).
- Flops are the case's own (`benchmarks/ops/bench_attention.py`, `work`), the same for every contender.

Peers of attention: `sdpa_plain` SDPA on q, k, v alone (no bias: not the same function); `sdpa_mask` SDPA with the dense
bias built from q_pos, k_pos and the table in the timed region, gradients to all of them; `sdpa_concat` SDPA on
concatenated (q, q_pos), v padded; `flex` compiled FlexAttention, forward only on CPU; `ofasys` OFASys' formula.
"""


def page(files: list[Path]) -> str:
    """The Markdown page of some result files. Raises DataError when there are none."""
    if not files:
        raise DataError(f"benchmarks.report: {RESULTS} must hold at least one .json result, got none")
    return _INTRO + "".join(_section(path.name, tables.load(path)) for path in files)


def _section(name: str, results: dict[str, Any]) -> str:
    machine = results["machine"]
    versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items() if k in ("ofakern", "python", "torch"))
    lines = [
        "",
        f"## {name}",
        "",
        f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, kernels for `{machine['isa']}`; "
        f"{versions}; commit {machine['commit'] or 'unknown'}, {machine['date'][:10]}.",
        "",
        *(f"- {line}" for line in tables.roofline_lines(results["roofline"])),
    ]
    records = results["records"]
    for dtype, phase in dict.fromkeys((r["dtype"], r["phase"]) for r in records):
        lines += ["", f"### {phase}, {dtype}", ""]
        lines += _table([r for r in records if (r["dtype"], r["phase"]) == (dtype, phase)], results["roofline"], dtype)
    reasons = sorted({f"- `{s['backend']}`, {s['case']}, {s['phase']}: {s['reason']}" for s in results["skipped"]})
    if reasons:
        lines += ["", "What did not run:", "", *reasons]
    return "\n".join(lines) + "\n"


def _table(records: list[dict[str, Any]], roof: dict[str, Any], dtype: str) -> list[str]:
    ours = [r for r in records if "versus" in r]
    memory = {(r["case"], r["backend"]): r["peak_mib"] for r in records}
    peers = list(dict.fromkeys(name for r in ours for name in r["versus"]))
    low = roof.get("gemm_no_amx_tflops", {}).get(dtype)
    heads = ["case", "roofline"] + (["of GEMM without AMX"] if low else []) + [f"against {p}" for p in peers]
    heads += ["extra memory, MiB", "sdpa_mask's, MiB"]
    rows = ["| " + " | ".join(heads) + " |", "|---" + "|--:" * (len(heads) - 1) + "|"]
    for r in ours:
        cells = [r["case"], f"{r['roofline_pct']:.0f} %"]
        cells += [f"{100 * r['tflops'] / low['best']:.0f} %"] if low else []
        cells += [f"{r['versus'][p]:.2f}" if p in r["versus"] else "-" for p in peers]
        cells += [tables.peak(r["peak_mib"]), tables.peak(memory.get((r["case"], "sdpa_mask")))]
        rows.append("| " + " | ".join(cells) + " |")
    return rows


if __name__ == "__main__":
    try:
        PAGE.write_text(page(sorted(RESULTS.glob("*.json"))), encoding="utf-8")
    except DataError as error:
        sys.exit(str(error))
    print(PAGE)
