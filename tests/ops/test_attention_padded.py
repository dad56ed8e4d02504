"""The padded front door against torch's scaled_dot_product_attention."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ofakern.errors import OfakernTypeError, OfakernValueError
from ofakern.ops.attention import RelativeTerm, scaled_dot_product_attention
from ofakern.ops.attention.padded import padded_layout


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "cpu":
        request.getfixturevalue("cpu")
    return str(request.param)


def tensors(heads: int = 2, key_heads: int = 2, queries: int = 9, keys: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return (
        torch.randn(3, heads, queries, 16),
        torch.randn(3, key_heads, keys, 16),
        torch.randn(3, key_heads, keys, 24),
    )


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(9, 9), (5, 9), (9, 5)])
def test_plain_and_causal(backend: str, is_causal: bool, queries: int, keys: int) -> None:
    q, k, v = tensors(queries=queries, keys=keys)
    got = scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=0.3, backend=backend)
    torch.testing.assert_close(got, F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=0.3))
    assert got.shape == (3, 2, queries, 24)


def test_bool_masks_lengths_and_groups(backend: str) -> None:
    q, k, v = tensors(heads=4)
    lengths = torch.tensor([9, 4, 7])
    mask = (torch.arange(9) < lengths[:, None])[:, None, None]
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    for arguments in ({"attn_mask": mask}, {"key_lengths": lengths}, {"attn_mask": mask.expand(3, 4, 9, 9)}):
        got = scaled_dot_product_attention(q, k, v, enable_gqa=True, backend=backend, **arguments)
        torch.testing.assert_close(got, want)
    causal = mask & torch.ones(9, 9, dtype=torch.bool).tril()
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=causal, enable_gqa=True)
    got = scaled_dot_product_attention(q, k, v, is_causal=True, key_lengths=lengths, enable_gqa=True, backend=backend)
    torch.testing.assert_close(got, want)


def test_bias_from_terms_and_positions(backend: str) -> None:
    """What a float mask would say, from coordinates; gradients reach q, q_pos and the table."""
    q, k, v = tensors()
    q_pos, k_pos, table = torch.randn(3, 2, 9, 8), torch.randn(3, 2, 9, 8), torch.randn(2, 17)
    position = torch.arange(9, dtype=torch.int32)
    same = torch.tensor([[0, 9]] * 9, dtype=torch.int32)
    term = RelativeTerm(position + 8, position, same, 17)
    leaves = [x.requires_grad_() for x in (q, k, v, q_pos, k_pos, table)]
    bias = 0.25 * q_pos @ k_pos.mT + table[:, (position[:, None] - position + 8).long()]
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    got = scaled_dot_product_attention(q, k, v, q_pos=q_pos, k_pos=k_pos, tables=[table], terms=[term], backend=backend)
    torch.testing.assert_close(got, want)
    weight = torch.randn_like(want)
    for a, b in zip(torch.autograd.grad(got, leaves, weight), torch.autograd.grad(want, leaves, weight), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    layout = padded_layout(3, 9, 9, terms=[term])
    shared = scaled_dot_product_attention(
        q, k, v, q_pos=q_pos, k_pos=k_pos, tables=[table], layout=layout, backend=backend
    )
    assert torch.equal(shared, got)


def test_refusals() -> None:
    q, k, v = tensors()
    call = scaled_dot_product_attention
    with pytest.raises(OfakernTypeError, match="attn_mask must be a bool tensor, got torch.float32\nTry: .*terms"):
        call(q, k, v, attn_mask=torch.zeros(9, 9))
    with pytest.raises(OfakernValueError, match="attn_mask must be None when is_causal is set"):
        call(q, k, v, attn_mask=torch.ones(9, 9, dtype=torch.bool), is_causal=True)
    with pytest.raises(OfakernValueError, match=r"attn_mask must be broadcastable to \[B=3,H,T=9,S=9\]"):
        call(q, k, v, attn_mask=torch.ones(4, 9, dtype=torch.bool))
    with pytest.raises(OfakernValueError, match=r"key must have query's heads \(2\), got 1\nTry: enable_gqa=True"):
        call(q, k[:, :1], v[:, :1])
    with pytest.raises(OfakernValueError, match="value must have key's B and length"):
        call(q, k, v[:, :, :4])
    with pytest.raises(OfakernValueError, match="key must have query's B = 3"):
        call(q, k[:2], v[:2])
    with pytest.raises(OfakernValueError, match="query must have 4 dimensions"):
        call(q[0], k, v)
    with pytest.raises(OfakernValueError, match="key_lengths must be at most S = 9, got 10"):
        call(q, k, v, key_lengths=[9, 10, 3])
    with pytest.raises(OfakernValueError, match="layout must come without"):
        call(q, k, v, is_causal=True, layout=padded_layout(3, 9, 9))
    wide = torch.tensor([[0, 10]] * 9, dtype=torch.int32)
    term = RelativeTerm(torch.arange(9).int() + 9, torch.arange(9).int(), wide, 30)
    with pytest.raises(OfakernValueError, match=r"terms\[0\].same must satisfy 0 <= lo <= hi <= S = 9"):
        call(q, k, v, tables=[torch.zeros(2, 30)], terms=[term])
