"""The house is as docs/ARCHITECTURE.md section 2 draws it: imports point down, rooms are complete, files stay short."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "ofakern"
MAX_LINES = 700

# A part may import parts of a lower rank, and itself.
RANKS = {
    "errors": 0,
    "_cpu": 0,
    "_cuda": 0,
    "ops": 1,
    "instruction": 2,
    "metrics": 2,
    "nn": 2,
    "text": 2,
    "modality": 3,
    "integrations": 3,
    "patching": 3,
    "model": 4,
    "generate": 5,
    "plan": 5,
    "data": 6,
    "checkpoint": 7,
    "serve": 8,
    "tasks": 9,
    "train": 9,
    "cli": 10,
    "__main__": 11,
}
# Beyond the ranks: the model knows no vocabulary and no language, leaves stay leaves.
FORBIDDEN = {"model": {"text", "instruction"}, "instruction": {"ops"}, "metrics": {"ops"}, "text": {"ops"}}
# The packed batch is what data hands to the model: a leaf of plain tensors inside the data package.
SEAMS = {"ofakern.data.batch"}
# tasks and train are one level that works together.
PEERS = {("train", "tasks"), ("tasks", "train")}


def python_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def running_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those under `if TYPE_CHECKING`: they name types and import nothing when the program runs."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            continue
        yield child
        yield from running_nodes(child)


def imported_modules(path: Path) -> set[str]:
    modules: set[str] = set()
    for node in running_nodes(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:  # `from .x import y`
                base = path.relative_to(ROOT).with_suffix("").parts[: -node.level]
                modules.add(".".join(filter(None, [*base, node.module])))
            elif node.module == "ofakern":
                modules.update(f"ofakern.{alias.name}" for alias in node.names)
            elif node.module:
                modules.add(node.module)
    return modules


def imported_parts(path: Path) -> set[str]:
    modules = {module for module in imported_modules(path) if module.startswith("ofakern.")} - SEAMS
    return {module.split(".")[1] for module in modules} - {"__version__"}


def allowed(part: str, target: str) -> bool:
    if part == target or (part, target) in PEERS:
        return True
    return RANKS[target] < RANKS[part] and target not in FORBIDDEN.get(part, set())


def test_every_part_has_a_rank() -> None:
    parts = {part_of(path) for path in python_files()} - {"__init__"}
    assert parts <= set(RANKS), f"give these a place in the layers: {sorted(parts - set(RANKS))}"


def test_imports_point_down() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports ofakern.{target}"
        for path in python_files()
        if part_of(path) != "__init__"
        for target in sorted(imported_parts(path))
        if not allowed(part_of(path), target)
    ]
    assert not wrong, "\n".join(wrong)


def test_a_seam_imports_errors_only() -> None:
    for module in SEAMS:
        assert imported_parts(ROOT / (module.replace(".", "/") + ".py")) <= {"errors"}


def test_the_layer_check_bites() -> None:
    assert not allowed("ops", "nn")
    assert not allowed("model", "text")
    assert not allowed("data", "train")
    assert allowed("cli", "train")


def test_references_import_torch_and_the_standard_library_only() -> None:
    references = sorted(PACKAGE.glob("ops/*/reference.py"))
    assert references
    for path in references:
        tops = {module.split(".")[0] for module in imported_modules(path)}
        foreign = {top for top in tops if top not in sys.stdlib_module_names and top != "torch"}
        assert not foreign, f"{path.relative_to(ROOT)} imports {sorted(foreign)}"


def test_backends_do_not_import_the_reference() -> None:
    for path in PACKAGE.glob("ops/*/kernel_*.py"):
        assert not [m for m in imported_modules(path) if m.endswith(".reference")], path


def test_kernels_include_no_torch_pybind_or_python() -> None:
    pattern = re.compile(r'#\s*include\s*[<"]([^>"]+)[>"]')
    foreign = re.compile(r"^(torch|ATen|c10|pybind11|Python\.h)")
    for path in [p for p in (ROOT / "csrc").rglob("*") if p.is_file()]:
        for header in pattern.findall(path.read_text(encoding="utf-8")):
            assert not foreign.match(header), f"{path.relative_to(ROOT)} includes {header}"


def op_rooms(side: Path) -> set[str]:
    return {path.name for path in side.iterdir() if path.is_dir() and path.name != "__pycache__"}


def test_both_halves_of_the_house_hold_the_same_ops() -> None:
    assert op_rooms(ROOT / "csrc/ops") == op_rooms(PACKAGE / "ops")


@pytest.mark.parametrize("op", sorted(op_rooms(PACKAGE / "ops")))
def test_an_op_room_is_complete(op: str) -> None:
    expected = [
        f"csrc/ops/{op}/{op}.h",
        f"csrc/ops/{op}/{op}.cpp",
        f"csrc/ops/{op}/{op}_cpu.cpp",
        f"python_bindings/bind_{op}.cpp",
        *(f"ofakern/ops/{op}/{name}.py" for name in ("__init__", "api", "op", "reference")),
        f"benchmarks/ops/bench_{op}.py",
    ]
    missing = [name for name in expected if not (ROOT / name).is_file()]
    assert not missing, f"{op} lacks {missing}"
    assert list((ROOT / "tests/ops").glob(f"test_{op}*.py")), f"{op} has no tests"


def test_no_source_file_is_too_long() -> None:
    suffixes = {".py", ".pyi", ".h", ".cpp", ".cu", ".cuh"}
    folders = ["benchmarks", "csrc", "examples", "ofakern", "python_bindings", "tests"]
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in suffixes]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert not {name: count for name, count in lengths.items() if count > MAX_LINES}


@pytest.mark.parametrize(("folder", "megabytes"), [("tests/golden", 35), ("examples/data", 12)])
def test_carried_data_stays_small(folder: str, megabytes: int) -> None:
    total = sum(path.stat().st_size for path in (ROOT / folder).rglob("*") if path.is_file())
    assert 0 < total <= megabytes * 10**6, f"{folder} has {total} bytes"


def test_carried_data_has_its_licences() -> None:
    bare = [folder.name for folder in (ROOT / "examples/data").iterdir() if not list(folder.glob("LICENSE*"))]
    assert not bare


def test_versions_are_pinned_in_one_place() -> None:
    pin = re.compile(r"\b(torch|triton)\s*==\s*\d")
    files = [ROOT / name for name in ("Makefile", "pyproject.toml", "CMakeLists.txt", ".ci/run")]
    assert not [path.name for path in files if pin.search(path.read_text(encoding="utf-8"))]
    assert pin.search((ROOT / "constraints.txt").read_text(encoding="utf-8"))
