"""`ofakern parity DIR`: recompute recorded cases of the OFASys implementation and compare every number."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch

from ofakern.checkpoint.golden import load_model, read_json
from ofakern.checkpoint.golden_case import Case
from ofakern.checkpoint.golden_variants import is_variants, run_variant
from ofakern.checkpoint.parity import BACKBONE_TOLERANCE, TOLERANCE, CaseResult, Check, run_case
from ofakern.errors import DataError

_EPILOG = """examples:
  ofakern parity tests/golden/ofasys/main
  ofakern parity tests/golden/ofasys/main --case caption --case closed_set --json parity.json
  ofakern parity tests/golden/ofasys/main --markdown docs/PARITY.md

exit code 0: everything agrees; 1: something differs, or a case named with --case cannot run; 2: unreadable input."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "parity",
        help="recompute recorded cases of OFASys and compare",
        description="Recompute the recorded cases of a directory with our model: adaptor outputs, biases, layer "
        "states, logits, loss, gradients, packed, in any order of the batch and one token at a time.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "directory",
        type=Path,
        metavar="DIR",
        help="folder with index.json, config.json, state_dict.* and the cases' files",
    )
    parser.add_argument("--case", action="append", metavar="NAME", help="only this case (may be repeated)")
    parser.add_argument(
        "--backend", default="auto", help="backend of the attention op: auto, cpu or reference (default: auto)"
    )
    parser.add_argument("--json", type=Path, metavar="F", help="write every comparison to this file")
    parser.add_argument("--markdown", type=Path, metavar="F", help="write the table as a Markdown page")


def run(args: argparse.Namespace) -> int:
    names = _case_names(args.directory, args.case)
    run_one, missing = _runner(args.directory, args.backend)
    results = []
    print(_HEADER)
    for name in names:
        result = run_one(name)
        results.append(result)
        print(_case_lines(result), flush=True)
    failed = [r.name for r in results if r.unavailable is None and not r.passed]
    failed += [r.name for r in results if r.unavailable is not None and args.case]
    print(_summary(results, failed))
    if missing:
        print(f"adaptors of this checkpoint that are not available yet: {', '.join(missing)}")
    if args.json:
        args.json.write_text(json.dumps(_as_data(results, not failed), indent=1) + "\n", encoding="utf-8")
    if args.markdown:
        args.markdown.write_text(_markdown(args.directory, args.backend, results), encoding="utf-8")
    return 1 if failed else 0


def _runner(directory: Path, backend: str) -> tuple[Callable[[str], CaseResult], list[str]]:
    """What recomputes one case of a folder, whichever layout it has, and the adaptors that are missing here."""
    if is_variants(directory):
        return lambda name: run_variant(directory, name, backend), []
    model, missing = load_model(directory, backend)
    return lambda name: run_case(model, Case(directory, name, model)), missing


_HEADER = f"{'case':<26}{'what':<24}{'values':>9}{'rel. L2':>11}{'max/max':>11}  result"


def _case_names(directory: Path, wanted: list[str] | None) -> list[str]:
    if not directory.is_dir():
        raise DataError(f"parity: DIR must be a directory, got {directory}")
    index = directory / "index.json"
    if index.is_file():
        keep = is_variants(directory)  # there, an entry that is not ok is a recorded error, worth a line
        names = [
            name
            for name, entry in read_json(index).items()
            if keep or not isinstance(entry, dict) or entry.get("ok", True)
        ]
    else:
        names = sorted(path.stem for path in directory.glob("*.npz") if path.with_suffix(".json").is_file())
    if not wanted:
        return names
    unknown = sorted(set(wanted) - set(names))
    if unknown:
        raise DataError(f"parity: --case must be one of {names}, got {unknown}")
    return wanted


def _worst(checks: list[Check]) -> tuple[float, float]:
    """The largest deviations that count: those under the absolute floor are rounding of an exact zero."""
    counted = [c for c in checks if not (c.passed and c.max_abs <= c.floor)]
    return max((c.rel_l2 for c in counted), default=0.0), max((c.max_rel for c in counted), default=0.0)


def _case_lines(result: CaseResult) -> str:
    if result.unavailable is not None:
        return f"{result.name:<26}not available yet: {result.unavailable}"
    lines: list[str] = []
    for group, checks in result.groups().items():
        rel_l2, max_rel = _worst(checks)
        failed = [c for c in checks if not c.passed]
        values = sum(c.count for c in checks)
        name = result.name if not lines else ""
        verdict = f"DIFFERS ({len(failed)} of {len(checks)})" if failed else "ok"
        lines.append(f"{name:<26}{group:<24}{values:>9}{rel_l2:>11.1e}{max_rel:>11.1e}  {verdict}")
        lines += [f"{'':<28}{c.name}: rel. L2 {c.rel_l2:.2e}, max/max {c.max_rel:.2e}" for c in failed[:5]]
    return "\n".join(lines)


def _summary(results: list[CaseResult], failed: list[str]) -> str:
    ran = [r for r in results if r.unavailable is None]
    text = f"{sum(r.passed for r in ran)} of {len(ran)} cases agree to {TOLERANCE:g}"
    if len(ran) < len(results):
        text += f"; {len(results) - len(ran)} not available yet"
    return text + (f"; failed: {', '.join(failed)}" if failed else "")


def _as_data(results: list[CaseResult], passed: bool) -> dict[str, Any]:
    return {
        "tolerance": TOLERANCE,
        "passed": passed,
        "torch": torch.__version__,
        "cases": {
            r.name: {
                "passed": r.passed,
                "unavailable": r.unavailable,
                "checks": [vars(c) | {"passed": c.passed} for c in r.checks],
            }
            for r in results
        },
    }


def _markdown(directory: Path, backend: str, results: list[CaseResult]) -> str:
    lines = [
        "# Parity with OFASys",
        "",
        f"Written by `ofakern parity {directory} --markdown docs/PARITY.md` on {date.today().isoformat()} with torch",
        f"{torch.__version__}, float32, attention backend `{backend}`. A quantity agrees when its relative L2 error",
        f"and its largest error over the largest recorded value are both at most {TOLERANCE:g}, at positions that are",
        "not padding.",
        "",
        "- *adaptors*: embeddings, positions and the bias matrices that tables and coordinates stand for;",
        "- *encoder*, *decoder*: the states before, between and after all layers;",
        "- *any order*: each sample alone and the batch reversed, against the same recording;",
        "- *incremental*: one token at a time over the key-value cache;",
        "- *gradients*, *gradient norms*: of the smoothed loss per token, for every parameter. Key biases have the",
        "  exact gradient 0 (the recording holds rounding noise): they count as equal below 1e-7 of the largest norm.",
        f"  *backbone*: inside the vision trunk the bound is {BACKBONE_TOLERANCE:g}, because the recording's own",
        "  float32 rounding is up to 2.6e-4 there (against a float64 run of the same weights).",
        "",
        "| case | what | quantities | values | relative L2 | max error / max value | |",
        "|---|---|--:|--:|--:|--:|---|",
    ]
    for result in results:
        if result.unavailable is not None:
            lines.append(f"| {result.name} | not available yet: {result.unavailable} | | | | | |")
        for group, checks in result.groups().items():
            rel_l2, max_rel = _worst(checks)
            verdict = "ok" if all(c.passed for c in checks) else "**differs**"
            values = sum(c.count for c in checks)
            row = f"| {result.name} | {group} | {len(checks)} | {values} | {rel_l2:.1e} | {max_rel:.1e} | {verdict} |"
            lines.append(row)
    return "\n".join(lines) + "\n"
