"""Forcing an instruction set: what works, and the three ways in which it does not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ofakern import _cpu
from ofakern.errors import BackendError

ROOT = Path(__file__).resolve().parents[2]
NAMES = ["scalar", "avx2", "avx512", "avx512_bf16", "avx512_amx"]
USABLE = [name for name in _cpu.compiled_isas() if name in _cpu.supported_isas()]


def fastest() -> str:
    """The last one, but for bf16 products of Intel's cores, which are slower than their f32 ones."""
    cpuinfo = Path("/proc/cpuinfo")
    intel = cpuinfo.is_file() and "GenuineIntel" in cpuinfo.read_text()
    return [name for name in USABLE if not (intel and name == "avx512_bf16")][-1]


@pytest.fixture(autouse=True)
def restore() -> Iterator[None]:
    before = _cpu.isa()
    yield
    _cpu.set_isa(before)


def isa_with(forced: str) -> subprocess.CompletedProcess[str]:
    code = "from ofakern import _cpu; print(_cpu.isa())"
    env = {**os.environ, "OFAKERN_CPU_ISA": forced}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)


def test_scalar_is_always_there() -> None:
    assert _cpu.compiled_isas()[0] == _cpu.supported_isas()[0] == "scalar"


@pytest.mark.skipif("OFAKERN_CPU_ISA" in os.environ, reason="OFAKERN_CPU_ISA forces an instruction set")
def test_the_best_usable_one_is_active() -> None:
    _cpu.set_isa("")
    assert _cpu.isa() == fastest()


@pytest.mark.parametrize("name", USABLE)
def test_set_isa(name: str) -> None:
    _cpu.set_isa(name)
    assert _cpu.isa() == name


def test_the_environment_forces_one() -> None:
    assert isa_with("scalar").stdout.strip() == "scalar"
    assert isa_with("").stdout.strip() == fastest()


def test_an_unknown_name_in_the_environment() -> None:
    result = isa_with("avx3")
    assert result.returncode != 0
    assert (
        "BackendError: OFAKERN_CPU_ISA: the instruction set must be one of "
        "scalar, avx2, avx512, avx512_bf16, avx512_amx, got 'avx3'" in result.stderr
    )


def test_an_unknown_name() -> None:
    with pytest.raises(BackendError, match=r"set_isa: the instruction set must be one of scalar, .*, got 'AVX2'"):
        _cpu.set_isa("AVX2")


@pytest.mark.parametrize("name", [name for name in _cpu.compiled_isas() if name not in _cpu.supported_isas()])
def test_one_that_this_cpu_lacks(name: str) -> None:
    with pytest.raises(BackendError, match=rf"must be supported by this CPU \(.*\), got {name}"):
        _cpu.set_isa(name)


def test_a_refused_name_changes_nothing() -> None:
    _cpu.set_isa("scalar")
    with pytest.raises(BackendError):
        _cpu.set_isa("none")
    assert _cpu.isa() == "scalar"


PROGRAM = """
#include <cstdio>
#include "core/check.h"
#include "core/isa.h"
namespace ofakern {
OFAKERN_DECLARE_FOR_EACH_ISA(int answer(int x);)
namespace scalar { int answer(int x) { return x + 1; } }
}
int main() {
  try { ofakern::set_isa("avx2"); } catch (const ofakern::BackendError& error) { std::puts(error.what()); }
  using namespace ofakern;
  std::printf("%d\\n", OFAKERN_DISPATCH(answer, 41));
}
"""


def test_a_build_with_scalar_only(tmp_path: Path) -> None:
    """The core alone, as on aarch64: no framework and no OFAKERN_HAS_<ISA>."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed")
    source, binary = tmp_path / "main.cpp", tmp_path / "main"
    source.write_text(PROGRAM)
    core = [str(ROOT / "csrc/core" / name) for name in ("isa.cpp", "check.cpp")]
    command = [compiler, "-std=c++17", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'csrc'}", str(source), *core]
    subprocess.run([*command, "-o", str(binary)], check=True)
    env = {name: value for name, value in os.environ.items() if name != "OFAKERN_CPU_ISA"}
    output = subprocess.run([str(binary)], check=True, capture_output=True, text=True, env=env).stdout
    assert output == "set_isa: the instruction set must be compiled into this build (scalar), got avx2\n42\n"
