"""backend="flash": what reaches flash-attn and comes back, by a stand-in of the package, and what it is not asked."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ofakern import explain
from ofakern.errors import BackendError
from ofakern.ops.attention import AttentionLayout, RelativeTerm, attention, flash, intervals
from ofakern.ops.attention.backends import BACKENDS

LENGTHS = (5, 0, 9, 1)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    deterministic: bool = False,
) -> Tensor:
    """What flash-attn 2 documents: sample by sample, masks aligned to the bottom right corner, 0 without keys; q, k and
    v of one width, of 16-bit types."""
    assert q.dtype in (torch.bfloat16, torch.float16) and q.dtype == k.dtype == v.dtype
    assert q.shape[2] == k.shape[2] == v.shape[2] <= 256 and deterministic and dropout_p == 0.0
    q_ends, k_ends = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    assert cu_seqlens_q.dtype == torch.int32 and q_ends[-1] == len(q) and k_ends[-1] == len(k)
    left, right = window_size[0], 0 if causal else window_size[1]
    parts = []
    for b in range(len(q_ends) - 1):
        mine = q[q_ends[b] : q_ends[b + 1]].double()
        keys, values = (x[k_ends[b] : k_ends[b + 1]].double() for x in (k, v))
        assert len(mine) <= max_seqlen_q and len(keys) <= max_seqlen_k
        groups = q.shape[1] // k.shape[1]
        keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
        scores = torch.einsum("ihk,jhk->hij", mine, keys) * softmax_scale
        i, j = torch.arange(len(mine))[:, None] + len(keys) - len(mine), torch.arange(len(keys))
        seen = torch.ones(len(mine), len(keys), dtype=torch.bool)
        seen &= (j >= i - left) if left >= 0 else seen
        seen &= (j <= i + right) if right >= 0 else seen
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).masked_fill(~seen, 0.0)
        parts.append(torch.einsum("hij,jhk->ihk", weights, values))
    return torch.cat(parts).to(q.dtype)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func))
    monkeypatch.setitem(BACKENDS.unavailable, "flash", None)
    monkeypatch.setattr(BACKENDS, "flash_device", "cpu")


def inputs(visible: Tensor, k_lengths: Sequence[int] = LENGTHS, **shapes: int) -> dict[str, Any]:
    """bf16 leaves: H4 Hk2 K16, V and P as asked."""
    torch.manual_seed(0)
    queries, keys, pos = sum(LENGTHS), sum(k_lengths), shapes.get("pos", 0)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.bfloat16).requires_grad_()

    made = {"q": leaf(queries, 4, 16), "k": leaf(keys, 2, 16), "v": leaf(keys, 2, shapes.get("value", 16))}
    if pos:
        made |= {"q_pos": leaf(queries, 4, pos), "k_pos": leaf(keys, 2, pos)}
    return made | {"layout": AttentionLayout.build(visible, LENGTHS, k_lengths)}


MASKS = {
    "full": intervals.full(LENGTHS),
    "causal": intervals.causal(LENGTHS),
    "window": intervals.sliding_window(LENGTHS, 3),
}


@pytest.mark.parametrize("changes", [{}, {"pos": 8}, {"pos": 8, "value": 40}, {"value": 8}], ids=str)
@pytest.mark.parametrize("mask", MASKS)
def test_it_computes_what_the_reference_does(installed: None, mask: str, changes: dict[str, int]) -> None:
    call = inputs(MASKS[mask], **changes)
    call["head_scale"] = torch.rand(4, requires_grad=True)
    leaves = [x for x in call.values() if isinstance(x, Tensor)]
    have, want = (attention(**call, scale=0.3, backend=backend) for backend in ("flash", "reference"))
    torch.testing.assert_close(have, want, atol=0.02, rtol=0.02)
    assert have.dtype == torch.bfloat16 and have.shape == want.shape
    dout = torch.randn_like(want)
    pairs = zip(torch.autograd.grad(have, leaves, dout), torch.autograd.grad(want, leaves, dout), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, atol=0.06, rtol=0.03)


def test_cross_attention_and_samples_without_keys(installed: None) -> None:
    k_lengths = (3, 4, 0, 6)
    call = inputs(intervals.cross(LENGTHS, k_lengths), k_lengths)
    have, want = (attention(**call, backend=backend) for backend in ("flash", "reference"))
    torch.testing.assert_close(have, want, atol=0.02, rtol=0.02)
    assert not have[5:14].any()


def test_samples_that_share_positions(installed: None) -> None:
    call = inputs(MASKS["full"], pos=8)
    call["layout"] = AttentionLayout.build(MASKS["full"], LENGTHS, LENGTHS, q_sets=[0] * 4, k_sets=[0] * 4)
    call |= {"q_pos": call["q_pos"][: max(LENGTHS)], "k_pos": call["k_pos"][: max(LENGTHS)]}
    have, want = (attention(**call, backend=backend) for backend in ("flash", "reference"))
    torch.testing.assert_close(have, want, atol=0.02, rtol=0.02)


@pytest.mark.parametrize(
    ("visible", "window"),
    [
        (MASKS["full"], (-1, -1)),
        (MASKS["causal"], (-1, 0)),
        (MASKS["window"], (3, 0)),
        (intervals.prefix_lm(LENGTHS, (2, 0, 3, 1)), None),
        (intervals.causal(LENGTHS).roll(1, 0), None),
    ],
)
def test_masks_are_recognised(visible: Tensor, window: tuple[int, int] | None) -> None:
    offsets = torch.tensor([0, 5, 5, 14, 15]).numpy()
    found = flash.recognise(visible.numpy(), offsets, offsets)
    assert (None if found is None else (found.left, found.right)) == window
    if found is not None:
        assert (found.longest_q, found.longest_k) == (9, 9)


def test_a_layout_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    layout, calls = AttentionLayout.build(MASKS["causal"], LENGTHS, LENGTHS), []
    real = flash.recognise
    monkeypatch.setattr(flash, "recognise", lambda *arrays: calls.append(1) or real(*arrays))
    assert flash.window_of(layout) == flash.window_of(layout) == (-1, 0, 9, 9)
    assert len(calls) == 1


def relative() -> dict[str, Any]:
    term = RelativeTerm(torch.zeros(15).int(), torch.zeros(15).int(), MASKS["full"], 1)
    return {"layout": AttentionLayout.build(MASKS["full"], LENGTHS, LENGTHS, [term]), "tables": [torch.zeros(4, 1)]}


@pytest.mark.parametrize(
    ("words", "changes"),
    [
        ("has no relative terms", relative()),
        ("draws its dropout otherwise", {"dropout_p": 0.1}),
        ("log-sum-exp has no gradient", {"return_lse": True}),
        ("takes bfloat16 and float16, got torch.float32", {n: torch.zeros(15, 4, 16) for n in "qkv"}),
        (
            "full, causal or a window",
            {"layout": AttentionLayout.build(intervals.prefix_lm(LENGTHS, (2, 0, 3, 1)), LENGTHS, LENGTHS)},
        ),
        (
            "takes widths up to 256, got K .* = 264",
            {n: torch.zeros(15, 4, 264, dtype=torch.bfloat16) for n in "qkv"},
        ),
    ],
)
def test_what_it_cannot_do_is_refused(installed: None, words: str, changes: dict[str, Any]) -> None:
    with pytest.raises(BackendError, match=f"backend 'flash' cannot run this call: .*{words}"):
        attention(**inputs(MASKS["full"]) | changes, backend="flash")


def test_explain_knows_it(installed: None) -> None:
    call = inputs(MASKS["full"])
    assert "runs on 'flash'" in explain("attention", **call, backend="flash")
    assert "flash      flash-attn's log-sum-exp has no" in explain("attention", **call, return_lse=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is said without a GPU")
def test_without_the_package_or_a_gpu_it_says_so() -> None:
    with pytest.raises(BackendError, match="backend 'flash' cannot run this call: flash-attn "):
        attention(**inputs(MASKS["full"]), backend="flash")
