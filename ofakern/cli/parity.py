"""`ofakern parity DIR ...`: recompute recorded cases of OFASys and OFA and compare every number."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ofakern.checkpoint.golden import load_model, read_json
from ofakern.checkpoint.golden_answers import answer_checks
from ofakern.checkpoint.golden_case import Case
from ofakern.checkpoint.golden_extra import EXTRA_CASES, extra_runner, is_extra
from ofakern.checkpoint.golden_hf import case_names, is_hf, load_hf_model, run_hf_case
from ofakern.checkpoint.golden_variants import is_variants, run_variant
from ofakern.checkpoint.parity import TOLERANCE, CaseResult, run_case
from ofakern.cli.parity_page import markdown, worst
from ofakern.errors import DataError

_EPILOG = """examples:
  ofakern parity tests/golden/ofasys/main
  ofakern parity tests/golden/ofasys/main --case caption --case closed_set --json parity.json
  ofakern parity tests/golden/ofasys/variants tests/golden/ofa_hf --markdown parity.md

A folder holds cases of one OFASys model (config.json, state_dict.*, index.json), variants of its flags (inputs.npz,
index.json), OFASys's parts beside its model (vqgan.npz, ...; `main` stands beside the folder) or cases of OFA's Hugging
Face port (model.fp16.safetensors, config.json, generate.json).
exit code 0: everything agrees; 1: something differs, or a case named with --case cannot run; 2: unreadable input."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "parity",
        help="recompute recorded cases of OFASys and OFA and compare",
        description="Recompute the recorded cases of directories with our model: adaptor outputs, biases, layer "
        "states, logits, loss, gradients, packed, in any order of the batch and one token at a time.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "directory",
        type=Path,
        nargs="+",
        metavar="DIR",
        help="folder of recorded cases, in any of the four layouts",
    )
    parser.add_argument("--case", action="append", metavar="NAME", help="only this case (may be repeated)")
    parser.add_argument(
        "--backend", default="auto", help="backend of the attention op: auto, cpu or reference (default: auto)"
    )
    parser.add_argument("--json", type=Path, metavar="F", help="write every comparison to this file")
    parser.add_argument("--markdown", type=Path, metavar="F", help="write the table as a Markdown page")


def run(args: argparse.Namespace) -> int:
    reports = {directory: _case_names(directory, args.case) for directory in args.directory}
    results: dict[Path, list[CaseResult]] = {}
    failed: list[str] = []
    print(_HEADER)
    for directory, names in reports.items():
        run_one, missing = _runner(directory, args.backend)
        results[directory] = found = []
        for name in names:
            result = run_one(name)
            found.append(result)
            print(_case_lines(result), flush=True)
        bad = [r.name for r in found if r.unavailable is None and not r.passed]
        bad += [r.name for r in found if r.unavailable is not None and args.case]
        print(_summary(found, bad))
        if missing:
            print(f"adaptors of this checkpoint that are not available yet: {', '.join(missing)}")
        failed += bad
    if args.json:
        data = {str(directory): _as_data(found, not failed) for directory, found in results.items()}
        whole = next(iter(data.values())) if len(data) == 1 else {"passed": not failed, "directories": data}
        args.json.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    if args.markdown:
        args.markdown.write_text(markdown(results, args.backend), encoding="utf-8")
    return 1 if failed else 0


def _runner(directory: Path, backend: str) -> tuple[Callable[[str], CaseResult], list[str]]:
    """What recomputes one case of a folder, whichever layout it has, and the adaptors that are missing here."""
    if is_variants(directory):
        return lambda name: run_variant(directory, name, backend), []
    if is_extra(directory):
        return extra_runner(directory, backend), []
    if is_hf(directory):
        port = load_hf_model(directory, backend)
        return lambda name: run_hf_case(directory, name, port), []
    model, missing = load_model(directory, backend)

    def run_recorded(name: str) -> CaseResult:
        case = Case(directory, name, model)
        result = run_case(model, case)
        if result.unavailable is None:
            result.checks += answer_checks(model, case, directory)
        return result

    return run_recorded, missing


_HEADER = f"{'case':<44}{'what':<24}{'values':>9}{'rel. L2':>11}{'max/max':>11}  result"


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
    elif is_extra(directory):
        names = list(EXTRA_CASES)
    elif is_hf(directory):
        names = case_names(directory)
    else:
        names = sorted(path.stem for path in directory.glob("*.npz") if path.with_suffix(".json").is_file())
    if not wanted:
        return names
    unknown = sorted(set(wanted) - set(names))
    if unknown:
        raise DataError(f"parity: --case must be one of {names}, got {unknown}")
    return wanted


def _case_lines(result: CaseResult) -> str:
    if result.unavailable is not None:
        return f"{result.name:<44}not available yet: {result.unavailable}"
    lines: list[str] = []
    for group, checks in result.groups().items():
        rel_l2, max_rel = worst(checks)
        failed = [c for c in checks if not c.passed]
        values = sum(c.count for c in checks)
        name = result.name if not lines else ""
        verdict = f"DIFFERS ({len(failed)} of {len(checks)})" if failed else "ok"
        lines.append(f"{name:<44}{group:<24}{values:>9}{rel_l2:>11.1e}{max_rel:>11.1e}  {verdict}")
        lines += [f"{'':<46}{c.name}: rel. L2 {c.rel_l2:.2e}, max/max {c.max_rel:.2e}" for c in failed[:5]]
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
