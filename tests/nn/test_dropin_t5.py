"""T5Attention and UMT5Attention against transformers' own, alone and inside its models."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
    UMT5Config,
)
from transformers.models.mt5.modeling_mt5 import MT5Attention as HFMT5Attention
from transformers.models.t5.modeling_t5 import T5Attention as HFT5Attention
from transformers.models.umt5.modeling_umt5 import UMT5Attention as HFUMT5Attention
from transformers.models.umt5.modeling_umt5 import UMT5ForConditionalGeneration

from ofakern.errors import OfakernValueError
from ofakern.nn import CannotReplace, T5Attention, UMT5Attention
from ofakern.nn.dropin.t5 import t5_bucket
from tests.nn.dropin import assert_replaces, assert_same_state, assert_shares, parameters_of, results

B, T, S, D = 3, 13, 9, 32


def config(decoder: bool = False, **options: Any) -> T5Config:
    sizes = {"d_model": D, "d_kv": 8, "num_heads": 4, "d_ff": 24, "num_layers": 2, "vocab_size": 40}
    made = T5Config(**sizes, dropout_rate=0.0, is_decoder=decoder, decoder_start_token_id=0, **options)
    made._attn_implementation = "eager"
    return made


def layer(cls: type[nn.Module], decoder: bool = False, **arguments: Any) -> nn.Module:
    torch.manual_seed(3)
    made = cls(config(decoder), layer_idx=0, **arguments)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3)
    return made


def padding(lengths: list[int], keys: int, dtype: torch.dtype) -> Tensor:
    blocked = torch.arange(keys) >= torch.tensor(lengths)[:, None]
    return blocked[:, None, None].to(dtype) * torch.finfo(dtype).min


def hidden(length: int = T) -> Tensor:
    return torch.randn(B, length, D, generator=torch.Generator().manual_seed(length), dtype=torch.float64)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("buckets, distance", [(32, 128), (8, 20), (16, 9)])
def test_buckets_are_the_published_ones(bidirectional: bool, buckets: int, distance: int) -> None:
    difference = torch.arange(-5000, 5001)
    theirs = HFT5Attention._relative_position_bucket(-difference, bidirectional, buckets, distance)
    assert torch.equal(t5_bucket(difference, bidirectional, buckets, distance), theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("source", [HFT5Attention, HFMT5Attention])
def test_padded_encoder_self_attention(source: type[nn.Module], dtype: torch.dtype) -> None:
    def call(module: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        x = inputs["x"]
        return module(x, mask=padding([13, 7, 1], T, x.dtype))[0]

    assert_replaces(layer(source, has_relative_attention_bias=True), T5Attention, call, {"x": hidden()}, dtype)


def test_left_padding_and_a_bool_mask() -> None:
    seen = torch.arange(T) >= torch.tensor([0, 4, 12])[:, None]

    def call(module: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        mask = seen[:, None, None]
        if not isinstance(module, T5Attention):  # the original's eager function adds its mask
            mask = (~mask).to(inputs["x"].dtype) * torch.finfo(inputs["x"].dtype).min
        return module(inputs["x"], mask=mask)[0]

    assert_replaces(layer(HFT5Attention, has_relative_attention_bias=True), T5Attention, call, {"x": hidden()})


def test_causal_decoder_passes_its_bias_on() -> None:
    """The second layer reads the compact bias of the first; its gradient reaches the first layer's buckets."""

    class Two(nn.Module):
        def __init__(self, cls: type[nn.Module], state: nn.Module | None = None) -> None:
            super().__init__()
            self.first = layer(HFT5Attention, True, has_relative_attention_bias=True)
            self.second = layer(HFT5Attention, True)
            if cls is T5Attention:
                self.first, self.second = T5Attention.replacing(self.first), T5Attention.replacing(self.second)

        def forward(self, x: Tensor) -> Tensor:
            mask = torch.full((1, 1, T, T), torch.finfo(x.dtype).min, dtype=x.dtype).triu(1)
            y, bias, _ = self.first(x, mask=mask)
            return self.second(y, mask=mask, position_bias=bias)[0]

    want = results(Two(HFT5Attention).double(), lambda m, i: m(i["x"]), {"x": hidden()})
    have = results(Two(T5Attention).double(), lambda m, i: m(i["x"]), {"x": hidden()})
    assert want.keys() == have.keys() and "d first.relative_attention_bias.weight" in have
    for name, value in want.items():
        torch.testing.assert_close(have[name], value, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_cross_attention(dtype: torch.dtype) -> None:
    def call(module: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        mask = padding([9, 4, 2], S, inputs["x"].dtype)
        return module(inputs["x"], mask=mask, key_value_states=inputs["memory"])[0]

    inputs = {"x": hidden(), "memory": hidden(S)}
    assert_replaces(layer(HFT5Attention, True), T5Attention, call, inputs, dtype)


def test_umt5_has_a_table_in_every_layer() -> None:
    def call(module: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        return module(inputs["x"], attention_mask=padding([13, 7, 1], T, inputs["x"].dtype))[0]

    torch.manual_seed(3)
    made = config()
    umt5 = UMT5Config(d_model=D, d_kv=8, num_heads=4, dropout_rate=0.0)
    umt5.is_decoder, umt5._attn_implementation = made.is_decoder, "eager"
    original = HFUMT5Attention(umt5, has_relative_attention_bias=True, layer_idx=0)
    nn.init.normal_(original.relative_attention_bias.weight)
    assert_replaces(original, UMT5Attention, call, {"x": hidden()})
    assert_same_state(original, UMT5Attention(umt5, has_relative_attention_bias=True, layer_idx=0))


def test_compute_bias_is_the_originals() -> None:
    original = layer(HFT5Attention, has_relative_attention_bias=True)
    ours = T5Attention.replacing(original)
    for shape in ((T, T, 0), (1, 30, 29), (4, 200, 100)):
        want = original.compute_bias(*shape[:2], past_seen_tokens=shape[2])
        assert torch.equal(ours.compute_bias(*shape[:2], past_seen_tokens=shape[2]), want)


@pytest.mark.parametrize("kind", ["dynamic", "split", "static"])
def test_caches(kind: str) -> None:
    """Token by token with transformers' caches, against the original doing the same."""
    original = layer(HFT5Attention, True, has_relative_attention_bias=True).eval()
    ours = T5Attention.replacing(copy.deepcopy(original))
    x = hidden(6).float()

    def cache() -> Any:
        if kind == "split":
            return EncoderDecoderCache(DynamicCache(), DynamicCache())
        if kind == "static":
            return StaticCache(config=original.config, max_cache_len=8)
        return DynamicCache()

    theirs, mine = cache(), cache()
    for step in range(6):
        keys = 8 if kind == "static" else step + 1
        mask = padding([step + 1] * B, keys, torch.float32)
        with torch.no_grad():
            want = original(x[:, step : step + 1], mask=mask, past_key_values=theirs)[0]
            have = ours(x[:, step : step + 1], mask=mask, past_key_values=mine)[0]
        torch.testing.assert_close(have, want, rtol=2e-5, atol=2e-5)


def test_cross_attention_reuses_the_cached_memory() -> None:
    original = layer(HFT5Attention, True).eval()
    ours = T5Attention.replacing(copy.deepcopy(original))
    memory, x = hidden(S).float(), hidden(2).float()
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    want = original(x, key_value_states=memory)[0]
    first = ours(x, key_value_states=memory, past_key_values=cache)[0]
    assert cache.is_updated[0]
    again = ours(x, key_value_states=torch.full_like(memory, torch.nan), past_key_values=cache)[0]
    torch.testing.assert_close(first, want, rtol=2e-5, atol=2e-5)
    assert torch.equal(again, first)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("umt5", [False, True])
def test_whole_model(implementation: str, umt5: bool) -> None:
    """Loss, every gradient and beam search of a padded batch, with every attention replaced."""
    torch.manual_seed(1)
    sizes = {"d_model": D, "d_kv": 8, "num_heads": 4, "d_ff": 24, "num_layers": 2, "vocab_size": 40}
    kind, model_kind, ours_kind = (
        (UMT5Config, UMT5ForConditionalGeneration, UMT5Attention)
        if umt5
        else (T5Config, T5ForConditionalGeneration, T5Attention)
    )
    made = kind(**sizes, dropout_rate=0.0, decoder_start_token_id=0, attn_implementation=implementation)
    original = model_kind(made).double()
    for parameter in original.parameters():
        nn.init.normal_(parameter, std=0.2)
    ours = copy.deepcopy(original)
    for module in list(ours.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__ in ours_kind.replaced_names:
                setattr(module, name, ours_kind.replacing(child))
    ids = torch.randint(1, 40, (B, 11))
    mask = (torch.arange(11) < torch.tensor([11, 6, 2])[:, None]).long()
    labels = torch.randint(1, 40, (B, 5))
    for model in (original, ours):
        model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
    for (name, have), want in zip(ours.named_parameters(), original.parameters(), strict=True):
        torch.testing.assert_close(have.grad, want.grad, rtol=1e-8, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
    beams = [
        model.eval().generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, num_beams=3)
        for model in (original, ours)
    ]
    assert torch.equal(*beams)


def test_signature_state_and_sharing() -> None:
    assert parameters_of(T5Attention.__init__) == parameters_of(HFT5Attention.__init__)
    assert parameters_of(UMT5Attention.__init__) == parameters_of(HFUMT5Attention.__init__)
    for ours, theirs in ((T5Attention, HFT5Attention), (UMT5Attention, HFUMT5Attention)):
        assert [p[0] for p in parameters_of(ours.forward)] == [p[0] for p in parameters_of(theirs.forward)]
    original = layer(HFT5Attention, has_relative_attention_bias=True).eval()
    assert_same_state(original, T5Attention(config(), has_relative_attention_bias=True))
    ours = T5Attention.replacing(original)
    assert_shares(original, ours)
    original.q.weight = nn.Parameter(torch.zeros_like(original.q.weight))
    assert ours.q.weight is original.q.weight


def test_dropout_acts_in_training_only() -> None:
    made = config()
    made.dropout_rate = 0.5
    ours = T5Attention(made, has_relative_attention_bias=True)
    x = hidden().float()
    assert not torch.equal(ours(x)[0], ours(x)[0])
    ours.eval()
    assert torch.equal(ours(x)[0], ours(x)[0])


def test_refusals() -> None:
    original = layer(HFT5Attention, has_relative_attention_bias=True)
    ours = T5Attention.replacing(original)
    x = hidden().float()
    with pytest.raises(CannotReplace, match="must be T5Attention or MT5Attention, got Linear"):
        T5Attention.replacing(nn.Linear(2, 2))
    with pytest.raises(CannotReplace, match="drop-in layer already"):
        T5Attention.replacing(ours)
    with pytest.raises(CannotReplace, match="d_kv must be a multiple of 8"):
        T5Attention.replacing(HFT5Attention(T5Config(d_model=D, d_kv=12, num_heads=2)))
    patched = copy.copy(original)
    patched.forward = original.forward
    with pytest.raises(CannotReplace, match="forward of its own"):
        T5Attention.replacing(patched)
    compiled = layer(HFT5Attention)
    compiled.compile()
    with pytest.raises(CannotReplace, match="must not be compiled in place yet"):
        T5Attention.replacing(compiled)
    with pytest.raises(OfakernValueError, match="output_attentions must not be given"):
        ours(x, output_attentions=True)
    with pytest.raises(OfakernValueError, match="position_bias must be what"):
        ours(x, position_bias=torch.zeros(1, 4, T, T))
    with pytest.raises(OfakernValueError, match="one run of keys per query, got holes in sample 1, query 0"):
        ours(x, mask=torch.tensor([[1] * T, [1, 0] + [1] * (T - 2), [1] * T]).bool()[:, None, None])
    with pytest.raises(OfakernValueError, match="max_distance must exceed"):
        T5Attention(T5Config(d_model=D, d_kv=8, num_heads=4, relative_attention_max_distance=4))
