"""The compiled modules: what they link, what they export, and that code for a newer CPU cannot leak into the rest."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch  # noqa: F401  (its libgomp is loaded first, as in every real process)

from ofakern import _cpu

ROOT = Path(__file__).resolve().parents[2]
MODULE = Path(_cpu.__file__)
OBJECTS = ROOT / "build/editable/CMakeFiles"

pytestmark = pytest.mark.skipif(shutil.which("readelf") is None, reason="binutils (readelf, nm) is not installed")


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def needed(module: Path) -> list[str]:
    return re.findall(r"\(NEEDED\).*\[(.+)\]", run("readelf", "-d", str(module)))


def compiled_modules() -> list[Path]:
    return [MODULE, *MODULE.parent.glob("_cuda*.so")]


def test_no_module_links_torch() -> None:
    for module in compiled_modules():
        assert not [name for name in needed(module) if re.search(r"torch|c10|python", name)], module


def test_the_cuda_runtime_is_static() -> None:
    for module in compiled_modules():
        assert not [name for name in needed(module) if "cuda" in name], module


def test_openmp_is_libgomp_by_its_plain_name() -> None:
    assert "libgomp.so.1" in needed(MODULE)


def test_only_the_module_entry_is_exported() -> None:
    for module in compiled_modules():
        lines = run("nm", "-D", "--defined-only", str(module)).splitlines()
        names = {line.split()[-1] for line in lines}
        assert names == {f"PyInit_{module.name.split('.')[0]}"}, module


@pytest.mark.parametrize("order", ["torch, ofakern._cpu", "ofakern._cpu, torch"])
def test_the_process_holds_one_libgomp(order: str) -> None:
    code = f"import {order}; print(*{{l.split()[-1] for l in open('/proc/self/maps') if 'libgomp' in l}})"
    libraries = run(sys.executable, "-c", code).split()
    assert len(libraries) == 1, libraries


def isa_objects(isa: str) -> list[Path]:
    return sorted((OBJECTS / f"ofakern_cpu_{isa}.dir").rglob("*.o"))


@pytest.mark.skipif(not OBJECTS.is_dir(), reason="no build tree here: the package was installed from a wheel")
@pytest.mark.parametrize("isa", _cpu.compiled_isas())
def test_isa_objects_export_their_own_namespace_and_nothing_weak(isa: str) -> None:
    objects = isa_objects(isa)
    assert objects
    for path in objects:
        for line in run("nm", "-C", "--defined-only", str(path)).splitlines():
            kind, name = line.split(maxsplit=2)[-2:]
            if kind.islower() and kind not in "uvw":
                continue  # local: no other object can see it
            assert kind not in "uvVwW", f"{path.name} ({isa}) has the weak symbol {name}"
            assert name.startswith(f"ofakern::{isa}::"), f"{path.name} ({isa}) exports {name}"


@pytest.mark.skipif(not OBJECTS.is_dir(), reason="no build tree here: the package was installed from a wheel")
def test_the_baseline_has_no_wide_vectors() -> None:
    disassembly = "".join(run("objdump", "-d", str(path)) for path in (OBJECTS / "_cpu.dir").rglob("*.o"))
    assert "%xmm" in disassembly or sys.platform != "linux" or "aarch64" in disassembly
    assert not re.search(r"%[yz]mm|%tmm", disassembly)
