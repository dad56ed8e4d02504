"""MultiheadAttention against torch.nn's, which it subclasses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ofakern.errors import OfakernTypeError, OfakernValueError
from ofakern.nn import CannotReplace, MultiheadAttention
from tests.nn.dropin import assert_replaces, assert_same_state, assert_shares, parameters_of

B, T, S, D, H = 3, 11, 7, 32, 4
LENGTHS = torch.tensor([7, 3, 1])
PADDING = torch.arange(S) >= LENGTHS[:, None]
CAUSAL = torch.ones(S, S, dtype=torch.bool).triu(1)


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def original(**options: Any) -> nn.MultiheadAttention:
    torch.manual_seed(2)
    made = nn.MultiheadAttention(D, H, **options)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3)
    return made


def as_float(mask: Tensor, like: Tensor) -> Tensor:
    return torch.zeros(mask.shape, dtype=like.dtype).masked_fill(mask, -torch.inf)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("floating", [True, False])
def test_padded_causal_self_attention(dtype: torch.dtype, batch_first: bool, floating: bool) -> None:
    def call(module: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        x = inputs["x"] if batch_first else inputs["x"].transpose(0, 1)
        padding, causal = (as_float(m, x) if floating else m for m in (PADDING, CAUSAL))
        out = module(x, x, x, key_padding_mask=padding, need_weights=False, attn_mask=causal, is_causal=True)[0]
        return out if batch_first else out.transpose(0, 1)

    assert_replaces(original(batch_first=batch_first), MultiheadAttention, call, {"x": draw(B, S, D)}, dtype)


@pytest.mark.parametrize(
    "options",
    [
        {"bias": False},
        {"kdim": 24, "vdim": 16},
        {"add_bias_kv": True},
        {"add_zero_attn": True},
        {"add_bias_kv": True, "add_zero_attn": True, "bias": False},
    ],
)
def test_options_in_cross_attention(options: dict[str, Any]) -> None:
    def call(module: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        return module(inputs["x"], inputs["k"], inputs["v"], key_padding_mask=PADDING, need_weights=False)[0]

    inputs = {"x": draw(B, T, D), "k": draw(B, S, options.get("kdim", D)), "v": draw(B, S, options.get("vdim", D))}
    assert_replaces(original(batch_first=True, **options), MultiheadAttention, call, inputs)


def test_keys_that_are_values() -> None:
    def call(module: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        return module(inputs["x"], inputs["memory"], inputs["memory"], need_weights=False)[0]

    assert_replaces(original(), MultiheadAttention, call, {"x": draw(T, B, D), "memory": draw(S, B, D)})


def test_without_a_batch() -> None:
    def call(module: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        x = inputs["x"]
        return module(x, x, x, key_padding_mask=PADDING[1], need_weights=False, attn_mask=CAUSAL)[0]

    assert_replaces(original(), MultiheadAttention, call, {"x": draw(S, D)})


def test_a_mask_per_sample_and_head() -> None:
    window = (CAUSAL | torch.ones(S, S, dtype=torch.bool).tril(-3)).expand(B * H, S, S)

    def call(module: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        x = inputs["x"]
        return module(x, x, x, need_weights=False, attn_mask=window)[0]

    assert_replaces(original(batch_first=True), MultiheadAttention, call, {"x": draw(B, S, D)})


def test_inside_torchs_encoder_layer() -> None:
    def call(module: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        layer.self_attn = module
        return layer(inputs["x"], src_key_padding_mask=PADDING)

    layer = nn.TransformerEncoderLayer(D, H, 16, dropout=0.0, batch_first=True).double()
    layer.requires_grad_(False)
    wide = original(batch_first=True).double()
    want = call(wide, {"x": draw(B, S, D)})
    have = call(MultiheadAttention.replacing(wide), {"x": draw(B, S, D)})
    torch.testing.assert_close(have, want, rtol=1e-9, atol=1e-11)


def test_a_query_without_keys_gives_the_bias() -> None:
    ours = MultiheadAttention.replacing(original(batch_first=True))
    blocked = torch.tensor([[False] * S, [True] * S, [False] * S])
    x = draw(B, S, D).float()
    out = ours(x, x, x, key_padding_mask=blocked, need_weights=False)[0]
    assert torch.equal(out[1], ours.out_proj.bias.expand(S, D)) and out.isfinite().all()


def test_signature_state_and_sharing() -> None:
    assert parameters_of(MultiheadAttention.forward) == parameters_of(nn.MultiheadAttention.forward)
    theirs = original(add_bias_kv=True).eval()
    assert_shares(theirs, MultiheadAttention.replacing(theirs))
    ours = MultiheadAttention(D, H, 0.1, True, True, batch_first=True, dtype=torch.float64)
    assert_same_state(theirs, ours)
    assert (
        isinstance(ours, nn.MultiheadAttention) and ours.dropout == 0.1 and ours.in_proj_weight.dtype == torch.float64
    )
    torch.manual_seed(0)
    first = nn.MultiheadAttention(D, H).state_dict()
    torch.manual_seed(0)
    second = MultiheadAttention(D, H).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_dropout_acts_in_training_only() -> None:
    ours = MultiheadAttention(D, H, dropout=0.5)
    x = draw(S, B, D).float()
    assert not torch.equal(ours(x, x, x, need_weights=False)[0], ours(x, x, x, need_weights=False)[0])
    ours.eval()
    assert torch.equal(ours(x, x, x, need_weights=False)[0], ours(x, x, x, need_weights=False)[0])


def test_refusals() -> None:
    class Mine(nn.MultiheadAttention):
        pass

    Mine.__name__ = "MultiheadAttention"
    with pytest.raises(CannotReplace, match="must be torch.nn.MultiheadAttention itself"):
        MultiheadAttention.replacing(Mine(D, H))
    with pytest.raises(CannotReplace, match="embed_dim / num_heads must be a multiple of 8"):
        MultiheadAttention.replacing(nn.MultiheadAttention(20, 2))
    with pytest.raises(OfakernValueError, match="head width must be a multiple of 8"):
        MultiheadAttention(20, 2)
    ours = MultiheadAttention.replacing(original(batch_first=True, add_zero_attn=True))
    x = draw(B, S, D).float()
    with pytest.raises(OfakernValueError, match="need_weights must be False, got True\nTry: need_weights=False"):
        ours(x, x, x)
    with pytest.raises(OfakernValueError, match="attn_mask must be given with is_causal"):
        ours(x, x, x, need_weights=False, is_causal=True)
    with pytest.raises(OfakernValueError, match="all have 2 or 3 dimensions"):
        ours(x, x[0], x[0], need_weights=False)
    with pytest.raises(OfakernTypeError, match="mask must be a bool or floating tensor"):
        ours(x, x, x, need_weights=False, key_padding_mask=PADDING.long())
    with pytest.raises(OfakernValueError, match="must leave out keys at the end only"):
        ours(x, x, x, need_weights=False, key_padding_mask=PADDING.flip(1))
    with pytest.raises(OfakernValueError, match="same for every head"):
        heads = torch.zeros(B, H, S, S, dtype=torch.bool)
        heads[:, 1] = CAUSAL
        ours(x, x, x, need_weights=False, attn_mask=heads.flatten(0, 1))
