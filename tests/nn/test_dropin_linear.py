"""Our Linear against torch's, with rows enough for the kernel."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ofakern.nn import CannotReplace, Linear
from tests.nn.dropin import assert_replaces, assert_same_state, assert_shares, parameters_of, randomize


def rows(*shape: int) -> dict[str, Tensor]:
    return {"x": torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_linear(dtype: torch.dtype, bias: bool) -> None:
    original = randomize(nn.Linear(24, 40, bias=bias))
    assert_replaces(original, Linear, lambda m, i: m(i["x"]), rows(2, 300, 24), dtype)
    assert_replaces(original, Linear, lambda m, i: m(i["x"]), rows(24), dtype)
    assert_same_state(original, Linear(24, 40, bias=bias))
    assert_shares(original, Linear.replacing(original))
    assert parameters_of(Linear.forward) == parameters_of(nn.Linear.forward)
    assert parameters_of(Linear.__init__) == parameters_of(nn.Linear.__init__)


def test_the_backend_is_an_attribute() -> None:
    layer = Linear(8, 8).bfloat16()
    layer.backend = "cpu"
    assert "_Linear" in type(layer(torch.ones(2, 8, dtype=torch.bfloat16)).grad_fn).__name__
    layer.backend = "reference"
    assert "_Linear" not in type(layer(torch.ones(2, 8, dtype=torch.bfloat16)).grad_fn).__name__


def test_other_layers_are_refused() -> None:
    with pytest.raises(CannotReplace, match="module must be Linear, got Bilinear"):
        Linear.replacing(nn.Bilinear(2, 2, 2))
