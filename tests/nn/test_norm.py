"""Layers on the fused LayerNorm kernels: the numbers of torch's separate ops, the same bits from the same seed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ofakern.nn import norm as fused
from ofakern.nn.attention import Positions
from ofakern.nn.layers import DecoderLayer, EncoderLayer, LayerConfig
from ofakern.ops.attention import AttentionLayout, intervals


def positions(queries: int, keys: int) -> Positions:
    return Positions(AttentionLayout.build(intervals.cross([queries], [keys]), [queries], [keys]))


def forward_of(layer: nn.Module, dtype: torch.dtype) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    torch.manual_seed(3)
    x = torch.randn(9, 32).to(dtype)
    if isinstance(layer, EncoderLayer):
        return lambda x: layer(x, positions(9, 9)), x
    source = torch.randn(7, 2, 16).to(dtype)
    return lambda x: layer(x, positions(9, 9), positions(9, 7), (source, source)), x


def results(layer: nn.Module, dtype: torch.dtype, recompute: bool = False) -> dict[str, Tensor]:
    call, x = forward_of(layer, dtype)
    x = x.requires_grad_()
    torch.manual_seed(5)
    y = checkpoint(call, x, use_reentrant=False) if recompute else call(x)
    layer.zero_grad()
    # Not the sum of squares: after a norm that is a constant.
    (y.float() * torch.linspace(-1, 2, y.numel()).view(y.shape)).sum().backward()
    assert x.grad is not None
    grads = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad} | grads


@pytest.mark.parametrize("before", [True, False], ids=["pre_norm", "post_norm"])
@pytest.mark.parametrize("kind", [EncoderLayer, DecoderLayer])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layers_give_the_numbers_of_separate_ops(
    kind: type[nn.Module], before: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    layer = kind(LayerConfig(32, 64, 2, normalize_before=before, dropout=0.0)).to(dtype)
    calls: list[str] = []
    for name in ("add_layer_norm", "gelu_layer_norm"):
        real = getattr(fused, name)
        monkeypatch.setattr(fused, name, lambda *a, name=name, real=real: (calls.append(name), real(*a))[1])
    have = results(layer, dtype)
    assert set(calls) == {"add_layer_norm", "gelu_layer_norm"}
    monkeypatch.setattr(fused, "_READY", False)
    want = results(layer, dtype)
    assert have.keys() == want.keys()
    for name in want:
        if "k_proj.bias" in name:
            continue  # the softmax does not see it: its gradient is rounding only
        bound = 1e-4 if dtype == torch.float32 else 4e-2
        error = (have[name] - want[name]).double().norm() / want[name].double().norm().clamp_min(1e-30)
        assert error <= bound or want[name].double().norm() < 1e-3, (name, float(error))


def test_dropout_repeats_by_the_default_generator_and_recomputation() -> None:
    torch.manual_seed(0)
    layer = EncoderLayer(LayerConfig(32, 64, 2, dropout=0.3)).train()
    first, again = results(layer, torch.float32), results(layer, torch.float32)
    recomputed = results(layer, torch.float32, recompute=True)
    for name in first:
        assert torch.equal(first[name], again[name]), name
        assert torch.equal(first[name], recomputed[name]), name
    call, x = forward_of(layer, torch.float32)
    assert not torch.equal(call(x), call(x))
    layer.eval()
    assert torch.equal(call(x), call(x))


def test_dropout_keeps_the_mean() -> None:
    norm = nn.LayerNorm(64)
    _, total = fused.add_norm(torch.ones(500, 64), torch.zeros(500, 64), norm, 0.25)
    assert total.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert abs(float(total.mean()) - 1.0) < 0.02


def test_embedding_norm_gives_the_numbers_of_separate_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    table, types = torch.randn(11, 16, requires_grad=True), torch.randn(1, 16, requires_grad=True)
    norm, tokens = nn.LayerNorm(16), torch.randint(0, 11, (40,))
    weight = torch.randn(40, 16)

    def gradients() -> tuple[Tensor, ...]:
        y = fused.embed_norm(tokens, table, norm, types, 3.0)
        return (y.detach(), *torch.autograd.grad(y, (table, types, norm.weight, norm.bias), weight))

    have = gradients()
    monkeypatch.setattr(fused, "_READY", False)
    for a, b in zip(have, gradients(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_what_has_no_kernel_keeps_torchs_ops() -> None:
    norm = nn.LayerNorm(16)
    x = torch.randn(3, 16)
    assert fused.has_kernel(x, norm)
    assert not fused.has_kernel(x.double(), norm)
    assert not fused.has_kernel(x.to("meta"), norm)
    assert not fused.has_kernel(x, nn.LayerNorm(16, elementwise_affine=False))
    assert not fused.has_kernel(x, nn.LayerNorm((3, 16)))
    assert not fused.has_kernel(x, nn.RMSNorm(16))
    wide = nn.LayerNorm(16).double()
    total = fused.add_norm(x.double(), x.double(), wide)[1]
    assert total.dtype == torch.float64
    assert fused.gelu_norm(x.double(), wide).dtype == torch.float64
