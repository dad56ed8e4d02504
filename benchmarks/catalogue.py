"""Which benchmarks there are, and the tests' modules that prove an op."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

from benchmarks.core import OpBench
from ofakern.errors import OfakernRuntimeError, OfakernValueError

ROOT = Path(__file__).resolve().parents[1]
_FOLDERS = ("ops", "model")


def names() -> list[str]:
    """Every benchmark, ops before models."""
    return [name for folder in _FOLDERS for name in _in_folder(folder)]


def load(name: str) -> OpBench:
    """Raises OfakernValueError for a name that is none."""
    for folder in _FOLDERS:
        if name in _in_folder(folder):
            return OpBench.of(import_module(f"benchmarks.{folder}.bench_{name}"))
    raise OfakernValueError(f"bench: OP must be one of {', '.join([*names(), 'all'])}, got {name!r}")


def _in_folder(folder: str) -> list[str]:
    return sorted(path.stem.removeprefix("bench_") for path in (ROOT / "benchmarks" / folder).glob("bench_*.py"))


def load_harness(name: str = "rule") -> ModuleType:
    """A module of tests/ops: what the op's tests prove a kernel with."""
    folder = ROOT / "tests/ops"
    if not (folder / f"{name}.py").is_file():
        raise OfakernRuntimeError(
            f"bench: the op tests' rule must be at {folder / name}.py, got nothing\nTry: run from a complete checkout."
        )
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    return import_module(name)
