"""The machine and the versions that a result was measured with."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks import timing
from ofakern.cli import info

_ROOT = Path(__file__).resolve().parents[1]


def describe() -> dict[str, Any]:
    """What stands beside every result: processor, instruction set, threads, clock, versions, commit, date, load."""
    cpu = info.collect()["cpu"]
    return {
        "device": "cpu",
        "cpu": cpu["model"],
        "isa": cpu["isa"],
        "cores": cpu["cores"],
        "threads": torch.get_num_threads(),
        "clock": timing.clock_name(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "load": os.getloadavg()[0],
        "os": platform.platform(),
        "versions": info.collect()["versions"],
        "commit": _commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _commit() -> str | None:
    """The checkout's commit, "+" behind it when kernels or package differ from it; None outside git."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        return head + ("+" if _git("status", "--porcelain", "--", "csrc", "ofakern", "benchmarks") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*arguments: str) -> str:
    result = subprocess.run(["git", "-C", str(_ROOT), *arguments], capture_output=True, text=True, check=True)
    return result.stdout.strip()
