"""Masks are recognised exactly or refused; layouts are shared by identity and never outlive a mask's content."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ofakern.errors import OfakernTypeError, OfakernValueError
from ofakern.nn.dropin import layouts
from ofakern.nn.dropin.layouts import KeyBias, Shift, padded_layout
from ofakern.nn.dropin.masks import Mask

B, T, S = 2, 3, 5
CPU = torch.device("cpu")


def seen(masks: list[Mask], **options: object) -> Tensor:
    """`[B,T,S]`: which keys the layout lets each query see."""
    layout = padded_layout(B, T, S, CPU, masks=masks, **options)  # type: ignore[arg-type]
    lo, hi = layout.visible.view(B, T, 2, 1).unbind(2)
    keys = torch.arange(B * S).view(B, 1, S)
    outside = (keys >= lo) & (keys < hi)
    everywhere = (torch.arange(B * S) >= lo) & (torch.arange(B * S) < hi)
    assert torch.equal(everywhere.sum(-1), outside.sum(-1)), "a query sees another sample's keys"
    return outside


ALLOWED = torch.zeros(B, T, S, dtype=torch.bool)
ALLOWED[0] = torch.ones(T, S, dtype=torch.bool).tril(1)
ALLOWED[1, :, 2:4] = True
ALLOWED[1, 2] = False


@pytest.mark.parametrize("lowest", [-torch.inf, torch.finfo(torch.float32).min, torch.finfo(torch.float16).min])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_additive_masks(lowest: float, dtype: torch.dtype) -> None:
    mask = torch.zeros(B, 1, T, S, dtype=dtype).masked_fill(
        ~ALLOWED[:, None], max(lowest, float(torch.finfo(dtype).min))
    )
    if lowest == -torch.inf:
        mask = mask.masked_fill(~ALLOWED[:, None], -torch.inf)
    assert torch.equal(seen([Mask(mask)]), ALLOWED)


def test_every_kind() -> None:
    assert torch.equal(seen([Mask(ALLOWED[:, None])]), ALLOWED)
    assert torch.equal(seen([Mask(~ALLOWED[:, None].expand(B, 4, T, S), left_out=True)]), ALLOWED)
    heads = (~ALLOWED)[:, None].repeat(1, 4, 1, 1).flatten(0, 1)
    assert torch.equal(seen([Mask(heads, "heads", left_out=True)]), ALLOWED)
    assert torch.equal(seen([Mask(ALLOWED[0], "pairs")]), ALLOWED[:1].expand(B, T, S))
    assert torch.equal(seen([Mask(ALLOWED[:, 0], "keys")]), ALLOWED[:, :1].expand(B, T, S))
    assert seen([]).all()


def test_masks_and_causality_combine() -> None:
    padding = torch.tensor([[1, 1, 1, 1, 0], [0, 1, 1, 1, 1]]).bool()
    causal = torch.ones(T, S, dtype=torch.bool).tril()
    want = padding[:, None] & causal
    assert torch.equal(seen([Mask(padding, "keys")], causal=True), want)
    assert torch.equal(seen([Mask(padding, "keys"), Mask(causal, "pairs")]), want)


def test_keys_in_front_are_seen_by_all() -> None:
    padding = torch.tensor([[1, 1, 0], [0, 0, 0]]).bool()
    want = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]]).bool()[:, None].expand(B, T, S)
    assert torch.equal(seen([Mask(padding, "keys")], front=2), want)
    with pytest.raises(OfakernValueError, match="at the end only"):
        seen([Mask(padding.flip(1), "keys")], front=2)


@pytest.mark.parametrize(
    "mask, error, message",
    [
        (Mask(torch.zeros(B, 1, T, S).index_fill(3, torch.tensor([1]), 0.5)), OfakernValueError, "0 and -inf"),
        (Mask(torch.full((B, 1, T, S), torch.nan)), OfakernValueError, "0 and -inf"),
        (Mask(torch.zeros(B, 1, T, S) - 100.0), OfakernValueError, "0 and -inf"),
        (Mask(torch.zeros(B, 1, T, S, requires_grad=True)), OfakernValueError, "must not need a gradient"),
        (Mask(torch.ones(B, 1, T, S).long()), OfakernTypeError, "bool or floating"),
        (Mask(torch.ones(B, S).bool()), OfakernValueError, r"must be \[B,H,T,S\] with B=2, T=3, S=5"),
        (Mask(torch.ones(B, S + 1).bool(), "keys"), OfakernValueError, r"must be \[B,S\]"),
        (Mask(torch.tensor([[1, 0, 1, 1, 1]]).bool(), "keys"), OfakernValueError, "holes in sample 0, query 0"),
    ],
)
def test_what_is_no_mask(mask: Mask, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        padded_layout(B, T, S, CPU, masks=[mask])


def test_the_same_mask_gives_the_same_layout() -> None:
    mask = torch.zeros(B, 1, T, S, dtype=torch.bool)
    first = padded_layout(B, T, S, CPU, masks=[Mask(mask)], term=Shift())
    assert padded_layout(B, T, S, CPU, masks=[Mask(mask)], term=Shift()) is first
    assert padded_layout(B, T, S, CPU, masks=[Mask(mask)], term=KeyBias(True)) is not first
    assert padded_layout(B, T, S, CPU, masks=[Mask(mask, left_out=True)], term=Shift()) is not first
    assert padded_layout(B, T, S, CPU) is padded_layout(B, T, S, CPU)


def test_a_mask_written_to_is_read_again() -> None:
    mask = torch.ones(B, S, dtype=torch.bool)
    assert seen([Mask(mask, "keys")]).all()
    mask[1, 2:] = False
    assert not seen([Mask(mask, "keys")])[1, :, 2:].any()


def test_inference_tensors_are_compared_by_content() -> None:
    with torch.inference_mode():
        mask = torch.ones(B, S, dtype=torch.bool)
        assert seen([Mask(mask, "keys")]).all()
        mask[1, 2:] = False
        assert not seen([Mask(mask, "keys")])[1, :, 2:].any()


def test_the_cache_is_bounded_and_holds_no_mask() -> None:
    import gc
    import weakref

    mask = torch.ones(B, S, dtype=torch.bool)
    held = weakref.ref(mask)
    for length in range(1, 2 * layouts._ENTRIES):
        padded_layout(1, length, length, CPU)
    padded_layout(B, T, S, CPU, masks=[Mask(mask, "keys")])
    assert len(layouts._by_identity.entries) <= layouts._ENTRIES
    del mask
    gc.collect()
    assert held() is None


def test_the_op_of_compiled_graphs() -> None:
    """Its fake gives the real shapes, and its results are not the cache's tensors."""
    mask = ALLOWED[:, None].clone()
    arguments = (torch.empty(0), [mask], ["full 0 test"], B, T, S, 0, False)
    torch.library.opcheck(torch.ops.ofakern.padded_intervals.default, arguments)
    first = torch.ops.ofakern.padded_intervals(*arguments)
    for tensor in first:
        tensor.fill_(77)
    again = torch.ops.ofakern.padded_intervals(*arguments)
    assert torch.equal(again[0], padded_layout(B, T, S, CPU, masks=[Mask(mask)]).visible)
