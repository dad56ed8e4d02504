"""T5LayerNorm against transformers' own: dtypes, gradients, and what is kept for them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from transformers.models.mt5.modeling_mt5 import MT5LayerNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm as HFT5LayerNorm
from transformers.models.umt5.modeling_umt5 import UMT5LayerNorm

from ofakern.nn import T5LayerNorm
from tests.nn.dropin import assert_all_like_peer, assert_same_state, assert_shares, parameters_of, randomize, results

D = 40


def call(module: torch.nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return module(inputs["x"])


def exact(original: torch.nn.Module, x: Tensor) -> dict[str, Tensor]:
    """In float64 throughout; transformers' own module takes its variance in float32 whatever it is given."""
    norm = torch.nn.RMSNorm(D, original.variance_epsilon, dtype=torch.float64)
    norm.load_state_dict(original.state_dict())
    return results(norm, call, {"x": x.double()})


@pytest.mark.parametrize("kind", [HFT5LayerNorm, MT5LayerNorm, UMT5LayerNorm])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_outputs_and_gradients(kind: type[torch.nn.Module], dtype: torch.dtype) -> None:
    original = randomize(kind(D, 1e-5)).to(dtype)
    x = torch.randn(3, 7, D, generator=torch.Generator().manual_seed(1)).to(dtype)
    truth = exact(copy.deepcopy(original), x)
    ours = T5LayerNorm.replacing(original)
    assert_shares(original, ours)
    assert_same_state(original, T5LayerNorm(D))
    assert parameters_of(kind.__init__) == parameters_of(T5LayerNorm.__init__)
    assert_all_like_peer(results(ours, call, {"x": x}), truth, results(original, call, {"x": x}), dtype)


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_result_has_the_originals_dtype(x_dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    original = randomize(HFT5LayerNorm(D)).to(weight_dtype)
    x = torch.randn(5, D).to(x_dtype)
    want, got = original(x), T5LayerNorm.replacing(original)(x)
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


def test_less_is_kept_for_the_gradient() -> None:
    def kept(module: torch.nn.Module) -> int:
        seen: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        x = torch.randn(64, D).bfloat16().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            module(x)
        return sum(seen.values())

    original = HFT5LayerNorm(D).bfloat16()
    assert kept(T5LayerNorm.replacing(original)) < 0.4 * kept(original)
