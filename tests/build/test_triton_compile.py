"""Triton kernels compile ahead of time for each architecture; spills and shared memory are held to a record.

No GPU is needed: the launches of kernel_triton.py are compiled for a named target with the assembler that triton's
package carries. `python tests/build/test_triton_compile.py` writes the record anew.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ofakern.ops.attention import AttentionLayout, RelativeTerm, intervals

triton = pytest.importorskip("triton")

from triton_aot import (  # noqa: E402
    BF16,
    CACHE,
    F16,
    F32,
    SHARED_MEMORY,
    TargetDriver,
    assert_no_more,
    resources,
    write_record,
)

from ofakern.ops.attention import kernel_triton  # noqa: E402

RECORD = Path(__file__).with_name("triton_resources.json")
# (architecture, dtype, (K, V, P), terms, dropout)
CASES = [
    (80, F16, (64, 64, 64), 1, 0.0),
    (80, BF16, (128, 128, 0), 1, 0.0),
    (90, F16, (64, 64, 64), 2, 0.0),
    (90, BF16, (64, 64, 64), 1, 0.0),
    (90, BF16, (128, 128, 0), 1, 0.1),
    (90, F32, (64, 64, 64), 1, 0.0),
    (100, BF16, (64, 64, 64), 1, 0.0),
]


def launches(case: tuple[Any, ...], lengths: tuple[int, ...] = (200,)) -> Iterator[Any]:
    """The launches of one forward and backward; nothing runs."""
    capability, dtype, (width, value, pos), terms, p = case
    n, heads = sum(lengths), 2
    visible, position = intervals.full(lengths), torch.arange(n, dtype=torch.int32)
    built = [RelativeTerm(position + n, position, visible, 2 * n)] * terms
    layout = AttentionLayout.build(visible, lengths, lengths, built)

    def tokens(last: int) -> torch.Tensor | None:
        return torch.empty(n, heads, last, dtype=dtype) if last else None

    tables = [x for t in built for x in (torch.empty(heads, t.rows), t.q_coord, t.k_coord, t.same)]
    inputs = (
        *(tokens(last) for last in (width, width, value, pos, pos)),
        *[*tables, *[None] * (8 - len(tables))],
        torch.empty(heads),
        torch.empty(2, dtype=torch.int64) if p else None,
        *(layout.visible, layout.q_offsets, layout.k_offsets, layout.key_seen, layout.k_range),
        *(width**-0.5, p),
    )
    shared = SHARED_MEMORY[capability]
    (out, lse), forward = kernel_triton.forward_call(inputs, shared)
    dout = tokens(value)
    assert dout is not None
    _, backward, _ = kernel_triton.backward_call(dout, torch.empty(n, heads), out, lse, inputs, shared)
    seen = set()
    for launch in [launch for launch in [*forward, *backward] if all(launch.grid)]:
        key = (launch.kernel.__name__, str(launch.constants))
        if key not in seen:
            seen.add(key)
            yield launch


def measure(case: tuple[Any, ...], folder: Path) -> dict[str, dict[str, int]]:
    """What each kernel of the case uses."""
    capability, dtype, *_ = case
    found = {}
    for launch in launches(case):
        name = launch.kernel.__name__ + (f"[{launch.constants['OWN']}]" if "OWN" in launch.constants else "")
        product = dtype != F32 and name.startswith("attention")
        found[name] = resources(launch, capability, product, folder)
    return found


def label(case: tuple[Any, ...]) -> str:
    capability, dtype, widths, terms, p = case
    kind = str(dtype).removeprefix("torch.")
    return f"sm_{capability} {kind} K{widths[0]} V{widths[1]} P{widths[2]} terms{terms} dropout{p:g}"


@pytest.mark.parametrize("case", CASES, ids=label)
def test_compiles_without_new_spills(case: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(CACHE))
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    assert_no_more(measure(case, tmp_path), record, label(case))


def test_other_lengths_compile_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What triton specialises on, asked of its own launcher: lengths, samples and table rows are not in it."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(CACHE))
    monkeypatch.setattr(triton.runtime.driver, "_active", TargetDriver())
    case = (90, F16, (16, 16, 0), 1, 0.1)

    def warm(lengths: tuple[int, ...]) -> list[Any]:
        return [
            launch.kernel.warmup(grid=launch.grid, **launch.arguments, **launch.constants, **launch.options)
            for launch in launches(case, lengths)
        ]

    first = warm((200,))
    for lengths in ((16, 128, 33), (1,), (64, 64)):
        for known, again in zip(first, warm(lengths), strict=True):
            assert again is known, again.name


if __name__ == "__main__":
    write_record(RECORD, CASES, label, measure)
