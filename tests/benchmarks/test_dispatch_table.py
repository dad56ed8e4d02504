"""The table behind `auto` on a GPU is what kept results justify, and a result that does not, gives no rule."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import dispatch
from ofakern.ops.dispatch import TABLE, Rule


def record(backend: str, size: list[int], dtype: str = "bf16", **versus: float) -> dict[str, Any]:
    return {"op": "attention", "dtype": dtype, "backend": backend, "size": size, "versus": versus}


def result(*records: dict[str, Any], wrong: tuple[str, ...] = ()) -> dict[str, Any]:
    return {"h200-x.json": {"machine": {"gpu": "NVIDIA H200"}, "records": list(records), "wrong": list(wrong)}}


def test_the_table_is_what_kept_results_justify() -> None:
    assert dispatch.table(dispatch.kept()) == TABLE


def test_a_kernel_that_wins_everywhere_gets_a_rule_over_what_was_measured() -> None:
    found = dispatch.table(result(record("triton", [64, 8192], reference=3.0), record("triton", [128, 512])))
    assert found == {
        "attention": (Rule("triton", (9, 0), torch.bfloat16, (64, 128), (512, 8192), "h200-x.json"),),
    }


@pytest.mark.parametrize(
    "kept",
    [
        result(record("triton", [64, 8192], reference=3.0), record("triton", [64, 512], reference=0.9)),
        result(record("triton", [64, 8192], reference=3.0, cuda=0.8)),
        result(record("triton", [64, 8192], reference=3.0), wrong=("attention small bf16 triton: error 1 above 0.1",)),
        result({"op": "attention", "dtype": "bf16", "backend": "sdpa_mask"}),
    ],
    ids=["slower in one case", "slower than the other kernel", "wrong in one case", "a peer"],
)
def test_no_rule(kept: dict[str, Any]) -> None:
    assert dispatch.table(kept) == {}
