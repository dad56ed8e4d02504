"""Every CPU kernel on a build with AddressSanitizer and UndefinedBehaviorSanitizer: `make sanitize`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ofakern import _cpu

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build/sanitize"
# Tests of Python alone, of other devices' kernels, or with a process of their own.
LEFT_OUT = ("triton", "cuda", "gpu", "process", "harness", "reference", "sanitizers", "torch", "graph")
# Minutes of tracing and nothing new for a kernel; and what measures time.
NOT = "not compile and not opcheck and not explain and not forked and not triton and not export and not quick"


@pytest.mark.sanitize
def test_kernels_under_sanitizers() -> None:
    """Builds ofakern._cpu for the scalar path and this machine's newest instruction set; runs the op tests on it, the
    short run of short.py: every test, every pair of its parameters' values."""
    module = _build(_cpu.supported_isas()[-1])
    tests = [p for p in sorted((ROOT / "tests/ops").glob("test_*.py")) if not any(x in p.stem for x in LEFT_OUT)]
    # The runtimes must be there before Python itself, hence a process of its own.
    preload = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so")
    ]
    environment = os.environ | {
        "OFAKERN_TEST_CPU_MODULE": str(module),
        "OFAKERN_TEST_SHORT": "1",
        "LD_PRELOAD": ":".join(preload),
        # Python and torch never free what lives as long as the process: leaks are not what is looked for; and each of
        # their many allocations would have its callers listed.
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1:malloc_context_size=4:quarantine_size_mb=64",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    }
    files = [str(path) for path in [*tests, ROOT / "tests/build/test_bindings.py"]]
    # A process that a sanitizer ends would take along what pytest has captured of its descriptors.
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "-p", "no:cacheprovider", "--capture=sys"]
    subprocess.run([*command, "--durations=10", "-k", NOT, *files], env=environment, cwd=ROOT, check=True)


def _build(isa: str) -> Path:
    options = ["-DOFAKERN_SANITIZE=ON", "-DOFAKERN_CUDA=OFF", f"-DOFAKERN_ISAS={isa}"]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PATH": path}
    configure = ["cmake", "-S", str(ROOT), "-B", str(BUILD), "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}"]
    subprocess.run([*configure, *options], env=environment, check=True)
    subprocess.run(["cmake", "--build", str(BUILD), "--target", "_cpu"], env=environment, check=True)
    (module,) = BUILD.glob("_cpu.*.so")
    return module
