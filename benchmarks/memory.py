"""Peak extra memory of one call, each in a process of its own.

A helper process imports torch and the benchmark once, never opens a parallel region (a fork after one can hang), and
forks a child per measurement. The child makes the inputs, runs the contender on the reduced case so that code and
thread stacks are resident, gives freed heap back, resets the high-water mark of its resident set, and makes the call:
the mark minus what was resident before, less the output and the gradients that every contender must return, is the
extra memory.

The helper is `python -m benchmarks.memory`: one JSON request per line of stdin, one JSON answer per line of stdout.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from benchmarks import catalogue
from benchmarks.core import OpBench, Unavailable, tensors
from ofakern.errors import OfakernRuntimeError

_ROOT = Path(__file__).resolve().parents[1]


class MemoryMeter:
    """Asks the helper process; use as a context manager. Linux only (`available`)."""

    available = Path("/proc/self/clear_refs").exists()

    def __init__(self, op: str) -> None:
        env = os.environ | {"PYTHONPATH": str(_ROOT)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.memory", op],
            env=env,
            cwd=_ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for the run, which ends its helper
        )

    def __enter__(self) -> MemoryMeter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:  # what is being measured is not waited for
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        self._process.wait()

    def peak_mib(self, case: str, dtype: str, contender: str, phase: str, threads: int) -> float | None:
        """MiB beyond inputs, output and gradients, or None when the call did not survive (out of memory)."""
        request = {"case": case, "dtype": dtype, "contender": contender, "phase": phase, "threads": threads}
        if self._process.stdin is None or self._process.stdout is None:
            raise OfakernRuntimeError("bench: the memory helper must have its pipes open, got none")
        print(json.dumps(request), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise OfakernRuntimeError("bench: the memory helper must answer, got the end of its output")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            print(f"memory of {contender} on {case} {dtype} {phase}: {answer['error']}", file=sys.stderr)
        return answer.get("mib")


def _status(field: str) -> int:
    """KiB of a field of /proc/self/status."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise OfakernRuntimeError(f"bench: /proc/self/status must have {field}, got none")


def extra_memory(op: OpBench, case: str, dtype: str, contender: str, phase: Any) -> float:
    """MiB beyond inputs, output and gradients; for a process that does nothing else."""
    spec = op.cases[case]
    problem = op.make(spec, dtype)
    entry = op.contenders[contender](problem)
    call = entry.call(phase)
    small = op.reduced(spec)
    if entry.compiled or small is spec:  # making it has run it on the case itself, or there is no smaller one
        call()
    else:
        op.contenders[contender](op.make(small, dtype)).call(phase)()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _status("VmRSS")
    results = [*tensors(call()), *(entry.leaves if phase != "fwd" else ())]  # a gradient is as large as its leaf
    returned = sum(x.numel() * x.element_size() for x in results)
    return max(0.0, (_status("VmHWM") - before) / 1024 - returned / 2**20)


def _answer(op: OpBench, request: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(request.pop("threads"))
    try:
        return {"mib": extra_memory(op, **request)}
    except (Unavailable, RuntimeError, MemoryError) as error:
        return {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}


def _serve(op_name: str) -> None:
    op = catalogue.load(op_name)
    torch.set_num_threads(1)
    answers, stdout = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(stdout, 1)  # what a compiler prints in a child is no answer
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            os.write(answers, (json.dumps(_answer(op, json.loads(line))) + "\n").encode())
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status:
            how = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else f"status {status}"
            os.write(answers, (json.dumps({"error": f"the process ended with {how}"}) + "\n").encode())


if __name__ == "__main__":
    _serve(sys.argv[1])
