"""`ofakern bench OP...`: time ops against their peers. The benchmarks live in the repository, not in the package."""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import ofakern
from ofakern.errors import OfakernRuntimeError, OfakernValueError

INTERRUPTED = 130  # what a shell gives for Ctrl-C

_EPILOG = """examples:
  ofakern bench attention --quick
  ofakern bench attention --json benchmarks/results/attention_cpu.json --plot bench-plots
  ofakern bench attention --case ofa_base_enc_1024 --dtype bf16 --threads 1
  ofakern bench attention --case long_16384 --dtype f32
  ofakern bench attention --quick --compare old.json
  ofakern bench patch --case t5_base_enc_1024 --dtype bf16
  ofakern bench all --quick --json now.json
  ofakern bench attention --device cuda --case ofa_base_enc_1024_b32

--json is written after every phase of a case: cut off (Ctrl-C, SIGTERM; exit code 130), a run keeps what it has, marked
"complete": false.

Needs a checkout of the repository (benchmarks/ and tests/ops/): the op's own tests decide whether it may be timed."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "bench",
        help="time ops against their peers",
        description="Check an op on its benchmark cases, then time it and its peers in turn in one process: time, "
        "peak memory, FLOP/s, GB/s and the share of this machine's measured roofline.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("ops", nargs="+", metavar="OP", help="ops (benchmarks/ops/bench_OP.py), or all")
    parser.add_argument(
        "--device", default="cpu", help="cpu (default) or cuda: the Triton kernels, which `auto` does not take yet"
    )
    parser.add_argument("--dtype", nargs="+", metavar="D", help="f32 bf16 f16 (default: f32 and bf16)")
    parser.add_argument("--case", nargs="+", metavar="NAME", help="only these cases (default: all but the longest)")
    parser.add_argument("--quick", action="store_true", help="few cases, few rounds, no compiled peer: under a minute")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of torch and of ofakern")
    parser.add_argument("--json", type=Path, metavar="F", help="write machine, roofline and records to this file")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="draw SVG and PNG files into this folder")
    parser.add_argument("--compare", type=Path, metavar="OLD.json", help="print the ratios to an older --json file")


def run(args: argparse.Namespace) -> int:
    if args.device not in ("cpu", "cuda"):
        raise OfakernValueError(f"bench: --device must be cpu or cuda, got {args.device!r}")
    root = str(_checkout())
    if root not in sys.path:
        sys.path.insert(0, root)
    try:
        runner, tables = import_module("benchmarks.run"), import_module("benchmarks.tables")
    except ModuleNotFoundError as error:
        raise OfakernRuntimeError(
            f"bench: {error.name} must be installed, got none\nTry: pip install 'ofakern[bench]'"
        ) from error
    old = None if args.compare is None else tables.load(args.compare)
    options = runner.Options(args.ops, args.dtype, args.case, args.quick, args.threads)

    def keep(results: dict[str, Any]) -> None:
        if args.json is not None:
            runner.write_json(results, args.json)

    results = (runner if args.device == "cpu" else import_module("benchmarks.gpu")).run(options, keep)
    keep(results)
    print(tables.render(results))
    if args.plot is not None:
        for path in import_module("benchmarks.plots").plot(results, args.plot):
            print(path)
    if old is not None:
        print(f"\nagainst {args.compare}:\n{tables.compare(results, old)}")
    wrong = results.get("wrong", [])
    for line in wrong:
        print(f"WRONG {line}")
    if not results["complete"]:
        return INTERRUPTED
    return 1 if wrong else 0


def _checkout() -> Path:
    """The repository: around this package when it is installed editable, else the current directory."""
    package = Path(ofakern.__file__).resolve().parent
    for folder in (package.parent, Path.cwd()):
        if (folder / "benchmarks/run.py").is_file() and (folder / "ofakern").is_dir():
            return folder
    raise OfakernRuntimeError(
        f"bench: the command must run in a checkout of the ofakern repository, got {Path.cwd()}\n"
        "Try: git clone the repository, cd into it, and run the command again; the installed package has no benchmarks."
    )
