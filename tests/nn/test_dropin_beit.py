"""BEiT's attention against transformers' own, and timm's layout against a plain replica of it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BeitConfig, BeitModel
from transformers.models.beit.modeling_beit import BeitAttention as HFBeitAttention
from transformers.models.beit.modeling_beit import BeitLayer
from transformers.models.beit.modeling_beit import BeitRelativePositionBias as HFBeitRelativePositionBias

from ofakern.errors import OfakernTypeError, OfakernValueError
from ofakern.nn import BeitAttention, BeitRelativePositionBias, CannotReplace, TimmBeitAttention
from ofakern.nn.dropin.beit import GridBias
from tests.nn.dropin import (
    assert_all_like_peer,
    assert_replaces,
    assert_same_state,
    assert_shares,
    float64_throughout,
    parameters_of,
    randomize,
    replace_all,
    results,
)

B, D, H = 2, 32, 4


def config(size: Any = 48, **options: Any) -> BeitConfig:
    made = BeitConfig(
        hidden_size=D,
        num_attention_heads=H,
        num_hidden_layers=2,
        intermediate_size=16,
        image_size=size,
        patch_size=16,
        use_relative_position_bias=True,
        **options,
    )
    made._attn_implementation = "eager"
    return made


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "size, resolution", [(48, (48, 48)), (48, (64, 64)), (48, (64, 32)), ((32, 64), (32, 64)), (16, (16, 16))]
)
def test_layer_with_its_table(dtype: torch.dtype, size: Any, resolution: tuple[int, int]) -> None:
    """Square, other resolution (interpolated table), not square, and a single patch, with the class token."""
    original = randomize(BeitLayer(config(size))).to(dtype)
    tokens = resolution[0] // 16 * (resolution[1] // 16) + 1

    def call(module: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        return module(inputs["x"], resolution=resolution)

    x = {"x": draw(B, tokens, D).to(dtype)}
    wide = {"x": x["x"].double()}
    truth = copy.deepcopy(original).double()
    with float64_throughout():
        exact = results(truth, call, wide)
    ours_wide = results(replace_all(truth, BeitAttention, BeitRelativePositionBias), call, wide)
    ours = results(replace_all(original, BeitAttention, BeitRelativePositionBias), call, x)
    peer = results(original, call, x)
    assert "d relative_position_bias.relative_position_bias_table" in exact
    for name, value in exact.items():
        torch.testing.assert_close(ours_wide[name], value, rtol=1e-8, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
    assert_all_like_peer(ours, exact, peer, dtype)


def test_attention_alone_with_a_mask() -> None:
    def call(module: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        mask = torch.zeros(B, 1, 1, 9, dtype=inputs["x"].dtype)
        mask[1, ..., 5:] = torch.finfo(mask.dtype).min
        return module(inputs["x"], mask)[0]

    assert_replaces(randomize(HFBeitAttention(config())), BeitAttention, call, {"x": draw(B, 9, D)})


@pytest.mark.parametrize("shared", [False, True])
def test_whole_model_and_its_shared_bias(shared: bool) -> None:
    made = config(use_shared_relative_position_bias=shared, hidden_dropout_prob=0.0, drop_path_rate=0.0)
    original = randomize(BeitModel(made), 0.1).double()
    ours = replace_all(original, BeitAttention, BeitRelativePositionBias)
    pixels = draw(B, 3, 48, 48)
    with float64_throughout():
        original(pixels).last_hidden_state.pow(2).sum().backward()
    ours(pixels).last_hidden_state.pow(2).sum().backward()
    for (name, have), want in zip(ours.named_parameters(), original.parameters(), strict=True):
        if want.grad is not None:
            torch.testing.assert_close(have.grad, want.grad, rtol=1e-8, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
    ours.eval(), original.eval()
    with float64_throughout():
        want = original(pixels, interpolate_pos_encoding=True).last_hidden_state
    have = ours(pixels, interpolate_pos_encoding=True).last_hidden_state
    torch.testing.assert_close(have, want, rtol=1e-9, atol=1e-11)


def test_bias_adds_masks_and_biases() -> None:
    bias = BeitRelativePositionBias.replacing(randomize(HFBeitRelativePositionBias(config())))((3, 3))
    mask = torch.zeros(1, 1, 1, 10)
    assert (bias + mask).mask is mask and (mask + bias).mask is mask
    assert torch.equal((bias + bias).table, 2 * bias.table)
    with pytest.raises(OfakernValueError, match="only one mask"):
        bias + mask + mask
    with pytest.raises(OfakernValueError, match="must be of window"):
        bias + GridBias(bias.table, (9, 1))
    with pytest.raises(OfakernTypeError, match="must be a tensor, got int"):
        bias + 3


class Attention(nn.Module):
    """A replica of timm's BEiT attention: its parameters, and the dense bias that ours never forms."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool, window_size: tuple[int, int] | None) -> None:
        super().__init__()
        self.num_heads, self.window_size = num_heads, window_size
        self.scale = (dim // num_heads) ** -0.5
        self.qkv_bias_separate = False
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias else None
        self.v_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias else None
        self.relative_position_bias_table = None
        if window_size is not None:
            rows = (2 * window_size[0] - 1) * (2 * window_size[1] - 1) + 3
            self.relative_position_bias_table = nn.Parameter(torch.zeros(rows, num_heads))
        self.attn_drop, self.proj, self.proj_drop = nn.Dropout(0.0), nn.Linear(dim, dim), nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, dim = x.shape
        bias = None if self.q_bias is None else torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, bias).view(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        scores = self.scale * qkv[0] @ qkv[1].transpose(-1, -2)
        if self.window_size is not None:
            index = HFBeitRelativePositionBias.generate_relative_position_index(self.window_size)
            scores = scores + self.relative_position_bias_table[index].permute(2, 0, 1)
        return self.proj((scores.softmax(-1) @ qkv[2]).transpose(1, 2).reshape(batch, tokens, dim))


@pytest.mark.parametrize("window", [(3, 3), (2, 4), None])
@pytest.mark.parametrize("bias", [True, False])
def test_timms_layout(window: tuple[int, int] | None, bias: bool) -> None:
    original = randomize(Attention(D, H, bias, window))
    tokens = 9 if window is None else window[0] * window[1] + 1
    assert_replaces(original, TimmBeitAttention, lambda m, i: m(i["x"]), {"x": draw(B, tokens, D)})
    assert_same_state(original, TimmBeitAttention(D, H, qkv_bias=bias, window_size=window))


def test_timms_shared_bias() -> None:
    owner = TimmBeitAttention.replacing(randomize(Attention(D, H, True, (3, 3))))
    other = TimmBeitAttention.replacing(randomize(Attention(D, H, True, None)))
    x = draw(B, 10, D).float()
    other.load_state_dict(owner.state_dict(), strict=False)
    torch.testing.assert_close(other(x, owner.relative_bias()), owner(x))
    with pytest.raises(OfakernTypeError, match="must be a GridBias, got a dense Tensor"):
        other(x, torch.zeros(1, H, 10, 10))


def test_signature_state_and_sharing() -> None:
    for ours, theirs in ((BeitAttention, HFBeitAttention), (BeitRelativePositionBias, HFBeitRelativePositionBias)):
        assert [p[0] for p in parameters_of(ours.__init__)] == [p[0] for p in parameters_of(theirs.__init__)]
        assert parameters_of(ours.forward) == parameters_of(theirs.forward)
        original = theirs(config()).eval()
        assert_same_state(original, ours(config()))
        assert_shares(original, ours.replacing(original))


def test_refusals() -> None:
    ours = BeitAttention.replacing(HFBeitAttention(config()))
    bias = BeitRelativePositionBias(config())
    x = draw(B, 10, D).float()
    dense = HFBeitRelativePositionBias(config())((3, 3))
    with pytest.raises(OfakernValueError, match="mask must not need a gradient, got a learned bias"):
        ours(x, dense)
    with pytest.raises(OfakernValueError, match="must have 3 x 3 patches and a class token, got 9 tokens"):
        ours(x[:, :9], bias((3, 3)))
    with pytest.raises(OfakernValueError, match="dim_size must be 10"):
        bias((3, 3), True, 17)
    with pytest.raises(OfakernValueError, match="output_attentions must not be given"):
        ours(x, output_attentions=True)
    with pytest.raises(CannotReplace, match="head width must be a multiple of 8"):
        BeitAttention.replacing(HFBeitAttention(BeitConfig(hidden_size=24, num_attention_heads=2)))
    with pytest.raises(CannotReplace, match="got none of scale, qkv"):
        TimmBeitAttention.replacing(type("Attention", (nn.Module,), {"num_heads": 1})())
