"""Every CUDA source compiles for each architecture without a warning; registers and spills are kept under build/."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "csrc").rglob("*_cuda.cu"))


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed: CUDA sources cannot be compiled here")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_compiles_without_warnings(source: Path, architecture: str, tmp_path: Path) -> None:
    command = ["nvcc", "-std=c++17", "-O3", f"-arch={architecture}", "-Xptxas", "-v", "-Werror", "all-warnings"]
    command += ["-Xcompiler", "-Wall,-Wextra", f"-I{ROOT / 'csrc'}", "-c", str(source), "-o", str(tmp_path / "a.o")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    report = result.stdout + result.stderr
    assert result.returncode == 0, report
    assert "warning" not in report.lower(), report
    kept = ROOT / "build/ptxas" / f"{source.stem}.{architecture}.txt"
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(report)
