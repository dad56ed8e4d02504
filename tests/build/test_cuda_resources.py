"""The CUDA kernels of the built module: compiled for every architecture without a warning, and their registers, stack
(what spills, and arrays that registers cannot hold) and shared memory held to the records in cuda_resources/.

No GPU is needed. `python tests/build/test_cuda_resources.py` writes the records anew from what is built.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
RECORDS = Path(__file__).with_name("cuda_resources")
COMMANDS = ROOT / "build/editable/compile_commands.json"
ARCHITECTURES = ("80", "90a", "100")
RESOURCES = ("registers", "stack", "shared")
# By kernel and architecture: RESOURCES.
Usage = dict[str, dict[str, list[int]]]


def cuobjdump() -> str | None:
    """The toolkit's, or the one that Triton's package carries."""
    spec = importlib.util.find_spec("triton")
    carried = Path(str(spec.origin)).parent / "backends/nvidia/bin/cuobjdump" if spec is not None else Path()
    return shutil.which("cuobjdump") or (str(carried) if carried.is_file() else None)


def module() -> Path | None:
    spec = importlib.util.find_spec("ofakern._cuda")
    return None if spec is None or spec.origin is None else Path(spec.origin)


pytestmark = pytest.mark.skipif(
    module() is None or cuobjdump() is None or shutil.which("c++filt") is None,
    reason="no ofakern._cuda, no cuobjdump or no c++filt here",
)


def run(*command: str, given: str | None = None) -> str:
    return subprocess.run(command, input=given, capture_output=True, text=True, check=True).stdout


def toolkit() -> str:
    match = re.search(r"V(\d+\.\d+\.\d+)", run("nvcc", "--version")) if shutil.which("nvcc") else None
    return match[1] if match is not None else "none"


def kernel_name(demangled: str) -> str:
    """ "softmax<float>" of "void ofakern::(anonymous namespace)::softmax<float>(float const*)"."""
    plain = re.sub(r"\(anonymous namespace\)::|_GLOBAL__N__\w+::|\bofakern::", "", demangled)
    depth = 0
    for n, letter in enumerate(plain):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            plain = plain[:n]
            break
    return plain.removeprefix("void ")


def measure() -> dict[str, Usage]:
    """What the built module's kernels take, by source file."""
    text = run("c++filt", given=run(str(cuobjdump()), "-res-usage", str(module())))
    found: dict[str, Usage] = {}
    source = architecture = kernel = ""
    for line in text.splitlines():
        if match := re.match(r"arch = sm_(\w+)", line):
            architecture = match[1]
        elif match := re.match(r"identifier = .*/(\w+)\.cu$", line):
            source = match[1]
        elif match := re.match(r" Function (.*):$", line):
            kernel = kernel_name(match[1])
        elif match := re.match(r"  REG:(\d+) STACK:(\d+) SHARED:(\d+) ", line):
            found.setdefault(source, {}).setdefault(kernel, {})[architecture] = [int(part) for part in match.groups()]
    return found


@pytest.fixture(scope="module")
def measured() -> dict[str, Usage]:
    return measure()


def record(source: str) -> dict[str, Any]:
    path = RECORDS / f"{source}.json"
    assert path.is_file(), f"{source}.cu has no record; write it: python tests/build/test_cuda_resources.py"
    return json.loads(path.read_text(encoding="utf-8"))  # type: ignore[no-any-return]


SOURCES = sorted(path.stem for path in (ROOT / "csrc/ops").glob("*/*_cuda.cu"))


@pytest.mark.parametrize("source", SOURCES)
def test_no_kernel_takes_more_than_recorded(source: str, measured: dict[str, Usage]) -> None:
    kept, found = record(source), measured[source]
    assert found.keys() == kept["kernels"].keys(), "other kernels than recorded: write the records anew"
    for kernel, by_architecture in found.items():
        for architecture, used in by_architecture.items():
            limits = kept["kernels"][kernel][architecture]
            if kept["nvcc"] != toolkit():
                continue  # another compiler allocates otherwise
            for resource, have, most in zip(RESOURCES, used, limits, strict=True):
                slack = 8 if resource == "registers" else 0
                assert have <= most + slack, f"{kernel} sm_{architecture}: {resource} {have} above the recorded {most}"


def test_every_record_has_a_source() -> None:
    assert {path.stem for path in RECORDS.glob("*.json")} <= set(SOURCES)


@pytest.mark.skipif(not COMMANDS.is_file(), reason="no build tree here: the package was installed from a wheel")
def test_sources_are_compiled_for_each_architecture_with_warnings_as_errors() -> None:
    commands = {Path(entry["file"]): entry["command"] for entry in json.loads(COMMANDS.read_text(encoding="utf-8"))}
    for path in (ROOT / "csrc").rglob("*_cuda.cu"):
        assert "-Werror all-warnings" in commands[path], path
        assert all(f"sm_{name}]" in commands[path] for name in ARCHITECTURES), path


def test_a_kernel_is_named_by_its_types() -> None:
    assert kernel_name("void ofakern::(anonymous namespace)::f<float, (bool)1>(float const*, g<int>)") == (
        "f<float, (bool)1>"
    )


if __name__ == "__main__":
    RECORDS.mkdir(exist_ok=True)
    for name, usage in measure().items():
        lines = [f"  {json.dumps(kernel)}: {json.dumps(usage[kernel], sort_keys=True)}" for kernel in sorted(usage)]
        head = f'{{"nvcc": "{toolkit()}", "resources": {json.dumps(RESOURCES)}, "kernels": {{\n'
        (RECORDS / f"{name}.json").write_text(head + ",\n".join(lines) + "\n}}\n", encoding="utf-8")
