"""What is computed again in the backward pass: the same bits, less that is kept, and only where it is worth it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ofakern.nn import recompute
from ofakern.nn.layers import EncoderLayer, LayerConfig
from ofakern.nn.recompute import freed_behind, recomputed

ROWS, DIM, FFN = 64, 32, 128


def layer_of(dtype: torch.dtype, activation_dropout: float = 0.0) -> EncoderLayer:
    torch.manual_seed(0)
    return EncoderLayer(LayerConfig(DIM, FFN, 2, activation_dropout=activation_dropout)).to(dtype).train()


def outcome(layer: EncoderLayer) -> tuple[list[Tensor], int]:
    """Output and gradients of the feed-forward half, and the bytes that it keeps, parameters apart."""
    dtype = layer.fc1.weight.dtype
    x = torch.randn(ROWS, DIM, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    storages = {p.untyped_storage().data_ptr(): 0 for p in layer.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storages.setdefault(tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = layer.feed_forward(x, None, None)
    used = [p for p in layer.parameters() if p.numel() and p is not layer.self_attn.c_attn]
    grads = torch.autograd.grad(out, [x, *used], torch.ones_like(out), allow_unused=True)
    return [out.detach(), *(grad for grad in grads if grad is not None)], sum(storages.values())


def test_float32_keeps_what_stands_before_the_gelu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, most = outcome(layer_of(torch.float32))  # few elements: nothing is computed again
    monkeypatch.setattr(recompute, "_FEW", 0)
    again, less = outcome(layer_of(torch.float32))
    assert len(plain) > 6 and all(map(torch.equal, plain, again))
    assert most - less >= ROWS * FFN * 4  # and the norm's statistics


@pytest.mark.parametrize(("dtype", "dropout"), [(torch.bfloat16, 0.0), (torch.float32, 0.5)])
def test_the_rest_keeps_it(dtype: torch.dtype, dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    _, most = outcome(layer_of(dtype, dropout))
    monkeypatch.setattr(recompute, "_FEW", 0)
    assert outcome(layer_of(dtype, dropout))[1] == most


def test_the_second_call_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recompute, "_FEW", 8)
    calls: list[bool] = []

    def part(x: Tensor, first: bool) -> Tensor:
        calls.append(first)
        return x.exp().sin()

    with torch.no_grad():
        recomputed(part, torch.ones(8, requires_grad=True))
    recomputed(part, torch.ones(8))
    few = torch.ones(7, requires_grad=True)
    recomputed(part, few).sum().backward()
    assert calls == [True] * 3
    enough = torch.ones(8, requires_grad=True)
    recomputed(part, enough).sum().backward()
    assert calls == [True] * 4 + [False] and enough.grad is not None and few.grad is not None
    torch.testing.assert_close(enough.grad[:7], few.grad)
    assert torch.func.grad(lambda x: recomputed(part, x).sum())(torch.ones(8)).shape == (8,)
    assert calls[5:] == [True]


class Given:
    """In the compiled module's place: counts how often memory is given back."""

    def __init__(self) -> None:
        self.times = 0

    def give_back_memory(self) -> None:
        self.times += 1


def test_what_is_freed_behind_large_features_is_given_back_once(monkeypatch: pytest.MonkeyPatch) -> None:
    given = Given()
    monkeypatch.setattr(recompute.native, "cpu", given)
    leaf = torch.ones(2**20, requires_grad=True)
    for x in (leaf, leaf[1:] * 2.0, (leaf * 2.0).detach()):  # a leaf keeps its hooks; few elements; nothing to come
        assert freed_behind(x) is x
        if x.requires_grad:
            torch.autograd.grad(x.sum(), leaf)
    assert given.times == 0
    for turn in (1, 2):
        x = freed_behind(leaf * 3.0)
        (grad,) = torch.autograd.grad(x.sum(), leaf)
        assert given.times == turn and bool((grad == 3.0).all())
    compiled = torch.compile(lambda x: freed_behind(x * 2.0).sum(), fullgraph=True, backend="eager")
    torch.autograd.grad(compiled(leaf), leaf)
    assert given.times == 2
