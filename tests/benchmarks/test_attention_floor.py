"""The floor of attention's forward pass: the program compiles and its parts add up."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import attention_floor
from benchmarks.attention_floor import Floor
from benchmarks.timing import Budget
from ofakern.errors import OfakernRuntimeError


def test_parts_of_this_machine() -> None:
    floors = attention_floor.measure(Budget(0.0, 1, 1))
    assert {("f32", 64), ("f32", 128)} <= {(floor.dtype, floor.depth) for floor in floors}
    for floor in floors:
        times = floor.parts
        assert {"scores", "softmax", "values", "sequence"} <= times.keys() and min(times.values()) > 0
        assert times["sequence"] > max(times[part] for part in ("scores", "softmax", "values"))
        assert floor.kernel > 0 and floor.gemm > 0


def test_the_table_tells_shares_of_the_product() -> None:
    parts = {"scores": 3.0, "softmax": 2.0, "values": 1.0, "sequence": 8.0}
    lines = attention_floor.render([Floor("bf16", 64, parts, gemm=4.0, kernel=10.0)]).splitlines()
    cells = {line[:28].strip(): line[28:].strip() for line in lines}
    assert cells["all three, sequence"] == "8.00 (50 %)" and cells["the kernel"] == "10.00 (40 %)"
    assert cells["all three, interleaved"] == "-"


def test_a_program_that_does_not_compile_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "broken.cpp"
    broken.write_text("int main() { return nothing; }\n", encoding="utf-8")
    monkeypatch.setattr(attention_floor, "SOURCE", broken)
    with pytest.raises(OfakernRuntimeError, match="nothing"):
        attention_floor.parts()
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(OfakernRuntimeError, match="no-such-compiler must succeed"):
        attention_floor.parts()
