"""BLOOM's and MPT's attention against transformers' own: padded on both sides, with caches, whole models."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BloomConfig, BloomForCausalLM, DynamicCache, MptConfig, MptForCausalLM
from transformers.models.bloom.modeling_bloom import BloomAttention as HFBloomAttention
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.mpt.modeling_mpt import MptAttention as HFMptAttention
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

from ofakern.errors import OfakernValueError
from ofakern.nn import BloomAttention, CannotReplace, MptAttention
from tests.nn.dropin import (
    assert_replaces,
    assert_same_state,
    assert_shares,
    float64_throughout,
    parameters_of,
    randomize,
    replace_all,
)

B, T, D, H = 3, 9, 32, 4
RIGHT = (torch.arange(T) < torch.tensor([9, 4, 1])[:, None]).long()
LEFT = RIGHT.flip(1)


def bloom(**options: Any) -> BloomConfig:
    made = BloomConfig(
        vocab_size=30, hidden_size=D, n_layer=2, n_head=H, hidden_dropout=0.0, attention_dropout=0.0, **options
    )
    made._attn_implementation = "eager"
    return made


def mpt(**options: Any) -> MptConfig:
    made = MptConfig(vocab_size=30, d_model=D, n_heads=H, n_layers=2, max_seq_len=16, **options)
    made._attn_implementation = "eager"
    return made


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def causal(padding: Tensor) -> Tensor:
    """`[B,1,T,T]`, True is seen; every query keeps itself, so that no row is empty (the original averages there)."""
    own = torch.eye(T, dtype=torch.bool)
    allowed = padding.bool()[:, None] & torch.ones(T, T, dtype=torch.bool).tril()
    return (allowed | (own & ~padding.bool()[:, None].any(-1, keepdim=True)))[:, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bloom_right_padding(dtype: torch.dtype) -> None:
    def call(module: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        mask = torch.zeros(B, 1, T, T, dtype=inputs["x"].dtype)
        mask = mask.masked_fill(~causal(RIGHT), torch.finfo(mask.dtype).min)
        return module(inputs["x"], inputs["residual"], inputs["alibi"], mask)[0]

    alibi = build_alibi_tensor(RIGHT, H, torch.float64)
    inputs = {"x": draw(B, T, D), "residual": draw(B, T, D) * 0.5, "alibi": alibi}
    assert_replaces(randomize(HFBloomAttention(bloom(), 0)), BloomAttention, call, inputs, dtype)


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mpt_right_padding(dtype: torch.dtype, clip: float | None) -> None:
    def call(module: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        return module(inputs["x"], inputs["bias"], attention_mask=~causal(RIGHT))[0]

    original = randomize(HFMptAttention(mpt(attn_config={"clip_qkv": clip}), 0))
    inputs = {"x": draw(B, T, D), "bias": build_mpt_alibi_tensor(H, 16).double()}
    assert_replaces(original, MptAttention, call, inputs, dtype)


def models(kind: str, implementation: str = "eager") -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    made, model, cls = {
        "bloom": (bloom(), BloomForCausalLM, BloomAttention),
        "mpt": (mpt(), MptForCausalLM, MptAttention),
    }[kind]
    original = randomize(model(made), 0.1).double()
    return original, replace_all(original, cls)


@pytest.mark.parametrize("kind", ["bloom", "mpt"])
@pytest.mark.parametrize("padding", [RIGHT, LEFT], ids=["right", "left"])
def test_whole_model(kind: str, padding: Tensor) -> None:
    """Loss over the real tokens and every gradient. (Left-padded queries see no key: they take no part.)"""
    original, ours = models(kind)
    ids = torch.randint(0, 30, (B, T), generator=torch.Generator().manual_seed(3))
    labels = ids.masked_fill(padding == 0, -100)
    # The first real token is predicted by the pad before it, which sees no key: no loss there.
    labels = labels.masked_fill(padding.cumsum(1) == 1, -100)
    with float64_throughout():
        for model in (original, ours):
            model(input_ids=ids, attention_mask=padding, labels=labels).loss.backward()
    for (name, have), want in zip(ours.named_parameters(), original.parameters(), strict=True):
        torch.testing.assert_close(have.grad, want.grad, rtol=1e-8, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", ["bloom", "mpt"])
def test_generation_with_a_cache(kind: str) -> None:
    original, ours = (model.float() for model in models(kind))
    ids = torch.randint(3, 30, (B, 5), generator=torch.Generator().manual_seed(4))
    mask = torch.tensor([[1] * 5, [0, 0, 1, 1, 1], [0, 1, 1, 1, 1]])
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(original.eval().generate(ids, **options), ours.eval().generate(ids, **options))


def test_a_cache_is_updated_like_the_originals() -> None:
    original = randomize(HFMptAttention(mpt(), 0)).eval()
    ours = MptAttention.replacing(copy.deepcopy(original))
    theirs, mine = DynamicCache(), DynamicCache()
    bias = build_mpt_alibi_tensor(H, 16)
    for step in range(3):
        x = draw(B, step + 1, D).float()
        want = original(x[:, -1:], bias, past_key_values=theirs)[0]
        torch.testing.assert_close(ours(x[:, -1:], bias, past_key_values=mine)[0], want, rtol=1e-5, atol=1e-5)
    assert torch.equal(theirs.layers[0].keys, mine.layers[0].keys)


def test_signature_state_and_sharing() -> None:
    for ours, theirs, made in (
        (BloomAttention, HFBloomAttention, bloom()),
        (MptAttention, HFMptAttention, mpt()),
    ):
        assert [(p[0], p[2]) for p in parameters_of(ours.__init__)] == [
            (p[0], p[2]) for p in parameters_of(theirs.__init__)
        ]
        assert parameters_of(ours.forward) == parameters_of(theirs.forward)
        original = theirs(made, 0).eval()
        assert_same_state(original, ours(made, 0))
        assert_shares(original, ours.replacing(original))


def test_dropout_acts_in_training_only() -> None:
    made = bloom()
    made.attention_dropout = 0.5
    ours = BloomAttention(made, 0)
    x, alibi = draw(B, T, D).float(), build_alibi_tensor(RIGHT, H, torch.float32)
    assert not torch.equal(ours(x, x, alibi, None)[0], ours(x, x, alibi, None)[0])
    ours.eval()
    assert torch.equal(ours(x, x, alibi, None)[0], ours(x, x, alibi, None)[0])


def test_refusals() -> None:
    ours = BloomAttention.replacing(HFBloomAttention(bloom(), 0))
    x, alibi = draw(B, T, D).float(), build_alibi_tensor(RIGHT, H, torch.float32)
    with pytest.raises(OfakernValueError, match=r"alibi must be \[B\*H=12,1,S=9\], got \[12, 1, 8\]"):
        ours(x, x, alibi[..., 1:], None)
    with pytest.raises(OfakernValueError, match="output_attentions must not be given"):
        ours(x, x, alibi, None, output_attentions=True)
    with pytest.raises(CannotReplace, match="slow_but_exact must be off"):
        BloomAttention.replacing(HFBloomAttention(bloom(pretraining_tp=2, slow_but_exact=True), 0))
    mine = MptAttention.replacing(HFMptAttention(mpt(), 0))
    with pytest.raises(OfakernValueError, match=r"position_bias must be \[H=4,1,at least 9\], got \[4, 9, 9\]"):
        mine(x, torch.zeros(H, T, T))
    with pytest.raises(CannotReplace, match="head width must be a multiple of 8"):
        MptAttention.replacing(HFMptAttention(MptConfig(d_model=24, n_heads=2), 0))
