"""Runs pytest with the ASan+UBSan build of ofakern._cpu: python tests/build/run_sanitized.py BUILD_DIR PYTEST_ARGS...

The sanitizers' runtimes must be loaded before Python itself, so this starts a second process with LD_PRELOAD.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

INSIDE = "OFAKERN_SANITIZED"


def runtimes() -> str:
    found = (
        subprocess.run(["g++", f"-print-file-name={name}"], check=True, capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so.6")
    )
    return ":".join(found)


def start(arguments: list[str]) -> int:
    # Python and torch never free what lives as long as the process: leaks are not what is looked for.
    options = {"ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1", "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1"}
    env = {**os.environ, **options, "LD_PRELOAD": runtimes(), INSIDE: "1"}
    return subprocess.run([sys.executable, __file__, *arguments], env=env, check=False).returncode


def run(build: Path, arguments: list[str]) -> int:
    import pytest

    library = next(build.glob("_cpu*.so"))
    spec = spec_from_file_location("ofakern._cpu", library, loader=ExtensionFileLoader("ofakern._cpu", str(library)))
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    # Found here before the installed one is looked for.
    sys.modules["ofakern._cpu"] = module
    import ofakern

    ofakern._cpu = module  # type: ignore[attr-defined]
    return int(pytest.main(arguments))


if __name__ == "__main__":
    if os.environ.get(INSIDE):
        sys.exit(run(Path(sys.argv[1]), sys.argv[2:]))
    sys.exit(start(sys.argv[1:]))
