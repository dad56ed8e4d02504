"""The Triton kernels of every op but attention compile ahead of time; spills and shared memory are held to a record.

No GPU is needed. `python tests/build/test_triton_ops_compile.py` writes the record anew.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from triton_aot import BF16, CACHE, F16, assert_no_more, resources, write_record  # noqa: E402

from ofakern.ops.layer_norm import kernel_triton as layer_norm  # noqa: E402

RECORD = Path(__file__).with_name("triton_ops_resources.json")
Launches = Iterator[Any]


def layer_norms(dtype: torch.dtype) -> Launches:
    """OFA-base's widths, 512 rows."""
    rows, width, wide = 512, 768, 3072
    x, weight, stats = torch.empty(rows, width, dtype=dtype), torch.empty(width), torch.empty(rows, 2)
    seed, tokens = torch.zeros(2, dtype=torch.int64), torch.zeros(rows, dtype=torch.int64)
    yield from layer_norm.add_forward_call(x, x, weight, weight, seed, 1e-5, 0.1).launches
    yield from layer_norm.add_backward_call(x, x, x, stats, weight, seed, 0.1).launches
    heads, scale = x.view(rows, 12, 64), torch.empty(12)
    yield from layer_norm.head_forward_call(heads, scale, weight, weight, 1e-5).launches
    yield from layer_norm.head_backward_call(x, heads, scale, stats, weight).launches
    table = torch.empty(100, width, dtype=dtype)
    yield from layer_norm.embed_forward_call(tokens, table, tokens, table, weight, weight, 1.0, 1e-5).launches
    yield from layer_norm.embed_backward_call(x, tokens, table, None, table[:1], stats, weight, 1.0).launches
    x, weight = torch.empty(rows, wide, dtype=dtype), torch.empty(wide)
    yield from layer_norm.gelu_forward_call(x, weight, weight, 1e-5).launches
    yield from layer_norm.gelu_backward_call(x, x, stats, weight).launches


# name: launches, and whether its kernels have products.
OPS: dict[str, tuple[Callable[[torch.dtype], Launches], bool]] = {"layer_norm": (layer_norms, False)}
CASES = [(op, *target) for op in OPS for target in ((80, F16), (90, BF16), (100, BF16))]


def label(case: tuple[Any, ...]) -> str:
    op, capability, dtype = case
    return f"{op} sm_{capability} {str(dtype).removeprefix('torch.')}"


def measure(case: tuple[Any, ...], folder: Path) -> dict[str, dict[str, int]]:
    op, capability, dtype = case
    launches, product = OPS[op]
    return {launch.kernel.__name__: resources(launch, capability, product, folder) for launch in launches(dtype)}


@pytest.mark.parametrize("case", CASES, ids=label)
def test_compiles_without_new_spills(case: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(CACHE))
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    assert_no_more(measure(case, tmp_path), record, label(case))


if __name__ == "__main__":
    write_record(RECORD, CASES, label, measure)
