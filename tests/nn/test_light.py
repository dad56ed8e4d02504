"""Prefixes against one softmax over all keys; adapters; what they cost nothing when absent."""

from __future__ import annotations

import pytest
import torch

from ofakern.errors import OfakernValueError
from ofakern.nn.attention import MultiheadAttention, Positions
from ofakern.nn.light import Bottleneck, PromptEncoder
from ofakern.ops.attention import AttentionLayout


@pytest.mark.parametrize("projection", [0, 6])
def test_a_prefix_is_more_keys_for_everybody(projection: int) -> None:
    torch.manual_seed(0)
    attention = MultiheadAttention(16, 2).double()
    assert attention.c_attn is not None
    prompt = PromptEncoder(3, 2, 16, 2, projection).double().eval()
    x = torch.randn(7, 16, dtype=torch.float64, requires_grad=True)
    lengths = [4, 3]
    visible = torch.tensor([[0, 4]] * 4 + [[4, 7]] * 3, dtype=torch.int32)
    layout = AttentionLayout.build(visible, lengths, lengths)
    everybody = torch.tensor([[0, 3]] * 7, dtype=torch.int32)
    positions = Positions(layout, prefix_layout=AttentionLayout.build(everybody, [7], [3]))
    k, v = prompt()[1]
    parameters = [x, *attention.parameters(), *prompt.parameters()]
    out = attention(x, positions, prefix=(k, v))
    expected = []
    for begin, length in ((0, 4), (4, 3)):
        part = x[begin : begin + length]
        q = attention.split(attention.q_proj(part))
        own_k, own_v = attention.keys_values(part)
        keys, values = torch.cat([k, own_k]), torch.cat([v, own_v])
        probabilities = (torch.einsum("ihk,jhk->hij", q, keys) * attention.scale).softmax(-1)
        heads = torch.einsum("hij,jhk->ihk", probabilities, values) * attention.c_attn[:, None]
        expected.append(attention.out_proj(heads.flatten(1)))
    plain = torch.cat(expected)
    torch.testing.assert_close(out, plain)
    weights = torch.randn_like(out)
    ours = torch.autograd.grad((out * weights).sum(), parameters, allow_unused=True, retain_graph=True)
    theirs = torch.autograd.grad((plain * weights).sum(), parameters, allow_unused=True)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
    with pytest.raises(OfakernValueError, match="prefix_layout"):
        attention(x, Positions(layout), prefix=(k, v))


def test_prefixes_are_dropped_in_training_only() -> None:
    prompt = PromptEncoder(50, 1, 16, 2)
    assert float((prompt()[0][0] == 0).float().mean()) == pytest.approx(0.2, abs=0.06)
    assert float((prompt.eval()()[0][0] == 0).float().mean()) == 0.0


def test_a_bottleneck_starts_from_its_input() -> None:
    adapter = Bottleneck(8, 3)
    torch.nn.init.zeros_(adapter.up_proj.weight)
    torch.nn.init.zeros_(adapter.up_proj.bias)
    x = torch.randn(5, 8)
    assert torch.equal(adapter(x), x)
