"""The scalar path compiles for aarch64, every object of it, with the cross compiler that PyPI's ziglang carries."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.aarch64
ROOT = Path(__file__).resolve().parents[2]
OF_THE_GPU_MODULES = ("cuda_error", "simt_host")  # as in CMakeLists.txt: they need the toolkit's headers
CORE = [path for path in (ROOT / "csrc/core").glob("*.cpp") if path.stem not in OF_THE_GPU_MODULES]
SOURCES = sorted([*CORE, *(ROOT / "csrc/ops").glob("*/*.cpp")])
FLAGS = "-std=c++17 -O2 -fPIC -Wall -Wextra -fno-math-errno -fno-trapping-math -ffp-contract=fast -fopenmp".split()
EM_AARCH64 = 183


@pytest.fixture(scope="session")
def openmp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with gcc's omp.h and nothing else: the header is the same for every CPU, and zig brings none."""
    folder = tmp_path_factory.mktemp("openmp")
    found = subprocess.run(["g++", "-print-file-name=include/omp.h"], capture_output=True, text=True, check=True)
    shutil.copy(found.stdout.strip(), folder)
    return folder


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_compiles_for_aarch64(source: Path, openmp: Path, tmp_path: Path) -> None:
    per_isa = "_cpu" in source.stem  # as in CMakeLists.txt
    command = [sys.executable, "-m", "ziglang", "c++", "-target", "aarch64-linux-gnu", *FLAGS]
    command += [f"-I{ROOT / 'csrc'}", "-isystem", str(openmp), "-DOFAKERN_HAS_SCALAR"]
    command += ["-DOFAKERN_ISA=scalar", "-fno-exceptions"] if per_isa else []
    out = tmp_path / "a.o"
    environment = os.environ | {"ZIG_GLOBAL_CACHE_DIR": str(ROOT / "build/zig")}
    command += ["-c", str(source), "-o", str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    header = out.read_bytes()[:20]
    assert header[:4] == b"\x7fELF" and struct.unpack_from("<H", header, 18) == (EM_AARCH64,)
