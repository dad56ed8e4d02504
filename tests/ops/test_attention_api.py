"""The door: refusals with their words, the choice of a backend, dtypes of results under autocast, the log."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from harness import make_case, run_backend

from ofakern.errors import BackendError, OfakernError, OfakernTypeError, OfakernValueError
from ofakern.ops import backends, explain, native, ops
from ofakern.ops.attention import AttentionLayout, RelativeTerm, attention, intervals


def arguments(**changes: Any) -> dict[str, Any]:
    position = torch.arange(5, dtype=torch.int32)
    term = RelativeTerm(position + 4, position, intervals.full([5]), 9)
    x = torch.randn(5, 2, 16)
    defaults = {
        "q": x,
        "k": x.clone(),
        "v": torch.randn(5, 2, 8),
        "layout": AttentionLayout.build(intervals.full([5]), [5], [5], [term]),
        "tables": [torch.randn(2, 9)],
        "backend": "reference",
    }
    return defaults | changes


@pytest.mark.parametrize(
    ("kind", "words", "changes"),
    [
        (OfakernTypeError, "q must be a tensor, got list", {"q": [1.0]}),
        (
            OfakernTypeError,
            "q must be float32, bfloat16, float16 or float64, got torch.int64",
            {"q": torch.ones(5, 2, 16).long()},
        ),
        (
            OfakernTypeError,
            r"k must have q's dtype \(torch.float32\), got torch.bfloat16",
            {"k": torch.ones(5, 2, 16).bfloat16()},
        ),
        (OfakernValueError, r"q must have 3 dimensions, got shape \[5, 32\]", {"q": torch.ones(5, 32)}),
        (OfakernValueError, r"q must have the layout's 5 queries, got \[4, 2, 16\]", {"q": torch.ones(4, 2, 16)}),
        (OfakernValueError, r"H must be a multiple of k's heads \(3\), got 2", {"k": torch.ones(5, 3, 16)}),
        (OfakernValueError, r"k must have shape \[Nk=5,Hk=2,K=16\], got \[5, 2, 8\]", {"k": torch.ones(5, 2, 8)}),
        (OfakernValueError, r"v must have shape \[Nk=5,Hk=2,V=8\], got \[6, 2, 8\]", {"v": torch.ones(6, 2, 8)}),
        (OfakernValueError, "k must be on q's device .cpu., got meta", {"k": torch.ones(5, 2, 16, device="meta")}),
        (OfakernValueError, "k_pos must be given together with q_pos, got None", {"q_pos": torch.ones(5, 2, 8)}),
        (
            OfakernValueError,
            r"k_pos must have shape \[Nk=5,Hk=2,P=8\], got \[5, 2, 16\]",
            {"q_pos": torch.ones(5, 2, 8), "k_pos": torch.ones(5, 2, 16)},
        ),
        (OfakernTypeError, "layout must be an AttentionLayout, got NoneType\nTry: ", {"layout": None}),
        (OfakernValueError, r"tables must be one per term of the layout \(1\), got 0", {"tables": []}),
        (
            OfakernValueError,
            r"tables\[0\] must have shape \[H=2,rows=9\], got \[2, 8\]",
            {"tables": [torch.ones(2, 8)]},
        ),
        (OfakernTypeError, r"tables\[0\] must be float32", {"tables": [torch.ones(2, 9).int()]}),
        (OfakernValueError, r"head_scale must have shape \[H=2\], got \[3\]", {"head_scale": torch.ones(3)}),
        (OfakernValueError, "scale must be finite, got nan", {"scale": float("nan")}),
        (OfakernValueError, r"dropout_p must be in \[0, 1\), got 1.0", {"dropout_p": 1.0}),
        (OfakernTypeError, "dropout_seed must be an int64 tensor, got int", {"dropout_p": 0.1, "dropout_seed": 3}),
        (
            OfakernValueError,
            r"dropout_seed must have shape \[2\]",
            {"dropout_p": 0.1, "dropout_seed": torch.zeros(3).long()},
        ),
        (
            OfakernValueError,
            "backend must be one of 'auto', 'cpu', 'cuda', 'triton', 'reference', 'flash', got 'gpu'",
            {"backend": "gpu"},
        ),
    ],
)
def test_wrong_calls_are_refused(kind: type[OfakernError], words: str, changes: dict[str, Any]) -> None:
    with pytest.raises(kind, match=words) as caught:
        attention(**arguments(**changes))
    assert str(caught.value).startswith("attention: ")


def test_named_backends_never_fall_back(cpu: object) -> None:
    with pytest.raises(BackendError, match="backend 'triton' cannot run this call: not "):
        attention(**arguments(backend="triton"))
    with pytest.raises(BackendError, match="backend 'cuda' cannot run this call: "):
        attention(**arguments(backend="cuda"))
    with pytest.raises(BackendError, match="takes float32, bfloat16 and float16, got torch.float64"):
        x = torch.randn(5, 2, 16).double()
        attention(**arguments(q=x, k=x, v=x, backend="cpu"))
    for name in ("cpu", "auto"):
        with pytest.raises(BackendError, match="takes widths that are multiples of 8 up to 256, got V = 12\nTry: "):
            attention(**arguments(v=torch.ones(5, 2, 12), backend=name))
    with pytest.raises(BackendError, match="got P = 264"):
        attention(**arguments(q_pos=torch.ones(5, 2, 264), k_pos=torch.ones(5, 2, 264), backend="cpu"))


def test_auto_takes_the_kernel_and_float64_the_reference(cpu: object) -> None:
    assert "runs on 'cpu'" in explain("attention", **arguments(backend="auto"))
    x = torch.randn(5, 2, 16).double()
    text = explain("attention", **arguments(q=x, k=x, v=x, backend="auto"))
    assert "runs on 'reference'" in text and "cpu        takes float32" in text
    case = make_case(0, (5, 9))
    for name, value in run_backend("auto")(case).items():
        assert torch.equal(value, run_backend("cpu")(case)[name])


def test_registry_tells_reasons() -> None:
    assert {"attention", "cross_entropy", "patch_embed"} <= set(ops())
    table = backends("attention")
    assert set(table) == {"cpu", "cuda", "triton", "reference", "flash"} and table["reference"] is None
    assert table["cuda"] == native.cuda_reason
    with pytest.raises(OfakernValueError, match="op must be one of attention, .*, got 'softmax'"):
        backends("softmax")
    text = explain("attention", **arguments(backend="triton"))
    assert text.splitlines()[0] == "attention: 'triton' was asked for and cannot run"


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_autocast_and_gradient_dtypes(request: pytest.FixtureRequest, name: str) -> None:
    """q, k, v, q_pos, k_pos follow autocast; every gradient has its parameter's dtype."""
    if name == "cpu":
        request.getfixturevalue("cpu")
    values = arguments(backend=name, q_pos=torch.ones(5, 2, 8), k_pos=torch.ones(5, 2, 8))
    values |= {
        "tables": [torch.randn(2, 9).bfloat16()],
        "head_scale": torch.ones(2).half(),
        "v": values["v"].bfloat16(),
    }
    leaves = [values[n] for n in ("q", "k", "v", "q_pos", "k_pos", "head_scale")] + values["tables"]
    for leaf in leaves:
        leaf.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = attention(**values, return_lse=True)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    (out.float().sum() + lse.sum()).backward()
    assert [leaf.grad.dtype for leaf in leaves] == [leaf.dtype for leaf in leaves]
    with pytest.raises(OfakernTypeError, match="v must have q's dtype"):
        attention(**values)


def test_dropout_seed_is_drawn_from_torch() -> None:
    values = arguments(dropout_p=0.5)
    torch.manual_seed(3)
    first, second = attention(**values), attention(**values)
    torch.manual_seed(3)
    assert torch.equal(attention(**values), first) and not torch.equal(first, second)


def test_log_tells_each_signature_once() -> None:
    code = (
        "import torch; from ofakern.ops.attention import *\n"
        "layout = AttentionLayout.build(intervals.full([3]), [3], [3])\n"
        "x = torch.randn(3, 2, 8)\n"
        "for q in (x, x, x.double()): attention(q, q, q, layout, backend='reference')\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"OFAKERN_LOG": "1"}, capture_output=True, text=True, check=True
    )
    assert run.stderr.splitlines() == [
        f"ofakern: attention q[3, 2, 8] k[3, 2, 8] v[3, 2, 8] samples=1 {dtype} cpu -> reference"
        for dtype in ("float32", "float64")
    ]
