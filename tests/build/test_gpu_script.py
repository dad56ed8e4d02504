"""benchmarks/gpu.sh without a GPU: it says so for each part that needs one, and outlives any part that fails."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks/gpu.sh"
GPU_PARTS = ("gpu_tests", "memcheck", "racecheck", "bench")

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")


def visit(out: Path, *parts: str, **environment: str) -> tuple[int, dict[str, str]]:
    """Exit code and the table's rows by part."""
    env = {**os.environ, "PYTHON": sys.executable, "OUT": str(out), **environment}
    result = subprocess.run([SCRIPT, *parts], env=env, capture_output=True, text=True, check=False)
    table = result.stdout[result.stdout.index("part ") :].splitlines()
    assert table[-1].startswith(f"results: {out}"), result.stdout
    return result.returncode, {line.split()[0]: line for line in table[1:-1]}


@pytest.mark.parametrize("tool", ["bash", "shellcheck"])
def test_the_script_is_sound(tool: str) -> None:
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed")
    subprocess.run([tool, *(["-n"] if tool == "bash" else []), SCRIPT], check=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is said without a GPU")
def test_without_a_gpu_every_such_part_says_so(tmp_path: Path) -> None:
    code, rows = visit(tmp_path, *GPU_PARTS)
    assert code == 2
    assert {part: "no GPU" in row and "torch sees no GPU here" in row for part, row in rows.items()} == dict.fromkeys(
        GPU_PARTS, True
    )
    assert "cores" in (tmp_path / "report.txt").read_text(encoding="utf-8")


def test_a_part_that_fails_stops_no_other(tmp_path: Path) -> None:
    code, rows = visit(tmp_path, PYTHON="false")
    assert code == 1
    assert "FAILED (1)" in rows["build"] and "FAILED (1)" in rows["cpu_tests"]
    assert all("torch does not import" in rows[part] for part in GPU_PARTS)
    assert len(list(tmp_path.iterdir())) <= 8


def test_no_part_begins_when_the_time_is_over(tmp_path: Path) -> None:
    code, rows = visit(tmp_path, "build", "cpu_tests", SECONDS_ALLOWED="5")
    assert code == 1
    assert all("not run" in row and "no time was left" in row for row in rows.values())


def test_an_unknown_part_is_told() -> None:
    result = subprocess.run([SCRIPT, "dance"], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "a part must be one of build gpu_tests" in result.stderr
