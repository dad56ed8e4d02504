"""SwinAttention against transformers' own: windows, shifted windows with their regions, whole models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import SwinConfig, SwinModel
from transformers.models.swin.modeling_swin import SwinAttention as HFSwinAttention
from transformers.models.swin.modeling_swin import SwinLayer

from ofakern.errors import OfakernValueError
from ofakern.nn import CannotReplace, SwinAttention
from tests.nn.dropin import (
    assert_replaces,
    assert_same_state,
    assert_shares,
    float64_throughout,
    parameters_of,
    randomize,
    replace_all,
    results,
)

D, H, W = 32, 4, 4


def config(**options: Any) -> SwinConfig:
    sizes = {"image_size": 48, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4]}
    made = SwinConfig(**sizes, window_size=W, drop_path_rate=0.0, **options)
    made._attn_implementation = "eager"
    return made


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def shifted_mask(height: int, width: int, dtype: torch.dtype) -> Tensor:
    layer = SwinLayer(config(), D, (height, width), H, shift_size=W // 2)
    return layer.get_attn_mask(height, width, dtype, torch.device("cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_plain_windows(dtype: torch.dtype, bias: bool) -> None:
    original = randomize(HFSwinAttention(config(qkv_bias=bias), D, H, W))
    assert_replaces(original, SwinAttention, lambda m, i: m(i["x"])[0], {"x": draw(6, W * W, D)}, dtype)


@pytest.mark.parametrize("height, width", [(8, 8), (12, 8), (4, 12)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shifted_windows(height: int, width: int, dtype: torch.dtype) -> None:
    def call(module: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        return module(inputs["x"], shifted_mask(height, width, inputs["x"].dtype))[0]

    x = {"x": draw(2 * height * width // W**2, W * W, D)}
    assert_replaces(randomize(HFSwinAttention(config(), D, H, W)), SwinAttention, call, x, dtype)


def test_any_regions() -> None:
    """Regions need not be those of a shift: any partition of a window."""
    region = torch.randint(0, 3, (3, W * W), generator=torch.Generator().manual_seed(0))
    mask = (region[:, None] != region[..., None]) * -1000.0

    def call(module: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        return module(inputs["x"], mask.to(inputs["x"].dtype))[0]

    assert_replaces(
        randomize(HFSwinAttention(config(), D, H, W)), SwinAttention, call, {"x": draw(6, W * W, D)}, torch.float32
    )


@pytest.mark.parametrize("size", [48, 40, 28])
def test_whole_model(size: int) -> None:
    """Shifts, padding to multiples of the window (40: 10 x 10 patches), and every gradient."""
    original = randomize(SwinModel(config()), 0.2).double()
    ours = replace_all(original, SwinAttention)
    pixels = {"pixels": draw(2, 3, size, size)}
    with float64_throughout():
        want = results(original, lambda m, i: m(i["pixels"]).last_hidden_state, pixels)
        have = results(ours, lambda m, i: m(i["pixels"]).last_hidden_state, pixels)
    assert have.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(have[name], value, rtol=1e-8, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def test_signature_state_and_sharing() -> None:
    assert [p[0] for p in parameters_of(SwinAttention.__init__)] == [
        p[0] for p in parameters_of(HFSwinAttention.__init__)
    ]
    assert parameters_of(SwinAttention.forward) == parameters_of(HFSwinAttention.forward)
    original = HFSwinAttention(config(), D, H, W).eval()
    assert_same_state(original, SwinAttention(config(), D, H, W))
    assert_shares(original, SwinAttention.replacing(original))


def test_the_op_of_compiled_graphs() -> None:
    torch.library.opcheck(torch.ops.ofakern.window_regions.default, (shifted_mask(8, 8, torch.float32),))


def test_refusals() -> None:
    ours = SwinAttention.replacing(HFSwinAttention(config(), D, H, W))
    x = draw(4, W * W, D).float()
    causal = torch.full((4, W * W, W * W), -100.0).triu(1)
    for mask in (causal, shifted_mask(8, 8, torch.float32) * 0.5, torch.full((4, W * W, W * W), -100.0)):
        with pytest.raises(OfakernValueError, match="must keep the regions of shifted windows apart"):
            ours(x, mask)
    with pytest.raises(OfakernValueError, match="windows dividing 4"):
        ours(x, torch.zeros(3, W * W, W * W))
    with pytest.raises(OfakernValueError, match="must have N=16"):
        ours(x, torch.zeros(4, 9, 9))
    with pytest.raises(OfakernValueError, match="windows must have 4 x 4 tokens, got 9"):
        ours(x[:, :9])
    with pytest.raises(CannotReplace, match="head width must be a multiple of 8"):
        SwinAttention.replacing(HFSwinAttention(config(), 24, 2, W))
