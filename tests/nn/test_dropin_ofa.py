"""OFA's attention and layers (HF port, OFASys) against replicas that form the dense bias."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ofakern.errors import OfakernTypeError, OfakernValueError
from ofakern.nn import (
    CannotReplace,
    FairseqMultiheadAttention,
    OFAAttention,
    OFADecoderLayer,
    OFAEncoderLayer,
    OFAPositions,
    OFASysDecoderLayer,
    OFASysEncoderLayer,
    PositionBias,
)
from ofakern.nn.dropin import DropIn
from tests.nn import ofa_replicas as replicas
from tests.nn.dropin import assert_replaces, assert_same_state, assert_shares, randomize

B, D, H, K = 2, 32, 4, 8
GRID, TEXT, TARGET = (3, 2), 7, 5
SOURCE = GRID[0] * GRID[1] + TEXT
LENGTHS = torch.tensor([SOURCE, SOURCE - 4])
PADDING = torch.arange(SOURCE) >= LENGTHS[:, None]
TARGET_PADDING = torch.arange(TARGET) >= torch.tensor([TARGET, TARGET - 2])[:, None]
CAUSAL = torch.ones(TARGET, TARGET, dtype=torch.bool).triu(1)
ENCODER = OFAPositions.encoder(TEXT, GRID, token_bucket_size=8, image_bucket_size=4, max_position=16)
DECODER = OFAPositions.decoder(TARGET, token_bucket_size=8, max_position=16)


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def lowest(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(mask, torch.finfo(dtype).min)


INPUTS = {
    "x": draw(B, SOURCE, D),
    "y": draw(B, TARGET, D),
    "source_q": draw(B, SOURCE, H, K) * 0.5,
    "source_k": draw(B, SOURCE, H, K).flip(1) * 0.5,
    "target_q": draw(B, TARGET, H, K) * 0.5,
    "target_k": draw(B, TARGET, H, K).flip(1) * 0.5,
    "token": draw(15, H),
    "image": draw(49 + 3, H),
}


def source_bias(inputs: Mapping[str, Tensor]) -> PositionBias:
    table = ENCODER.table(inputs["token"], inputs["image"])
    return PositionBias(inputs["source_q"], inputs["source_k"], (table,), ENCODER.given)


def target_bias(inputs: Mapping[str, Tensor]) -> PositionBias:
    return PositionBias(inputs["target_q"], inputs["target_k"], (DECODER.table(inputs["token"]),), DECODER.given)


def cross_bias(inputs: Mapping[str, Tensor]) -> PositionBias:
    return PositionBias(inputs["target_q"], inputs["source_k"])


def dense(bias: PositionBias, dtype: torch.dtype) -> Tensor:
    """`[B*H,T,S]`: what the published encoders and decoders hand to their layers."""
    out = torch.einsum("bthp,bshp->bhts", bias.q_pos, bias.k_pos) * (2 * K) ** -0.5
    for table, term in zip(bias.tables, bias.given.given if bias.given else (), strict=True):
        row = term.q_coord[:, None].long() - term.k_coord
        keys = torch.arange(row.shape[1])
        inside = (keys >= term.same[:, :1]) & (keys < term.same[:, 1:])
        values = table[:, row.clamp(0, term.rows - 1)]
        out = out + torch.where(inside, values, torch.zeros((), dtype=values.dtype)).to(out.dtype)
    return out.flatten(0, 1).to(dtype)


def suited(module: nn.Module, bias: PositionBias, dtype: torch.dtype) -> Any:
    return bias if isinstance(module, DropIn) else dense(bias, dtype)


def inputs_of(*names: str) -> dict[str, Tensor]:
    return {name: INPUTS[name] for name in names}


SOURCE_INPUTS = inputs_of("x", "source_q", "source_k", "token", "image")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale_heads", [True, False])
def test_ports_attention(dtype: torch.dtype, scale_heads: bool) -> None:
    def call(module: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        bias = suited(module, source_bias(inputs), inputs["x"].dtype)
        mask = lowest(PADDING, inputs["x"].dtype)[:, None, None].expand(B, 1, SOURCE, SOURCE)
        return module(inputs["x"], attention_mask=mask, attn_bias=bias)[0]

    original = randomize(replicas.OFAAttention(D, H, scale_heads=scale_heads))
    assert_replaces(original, OFAAttention, call, SOURCE_INPUTS, dtype)
    assert_same_state(original, OFAAttention(D, H, scale_heads=scale_heads))


@pytest.mark.parametrize("normformer, pre_norm", [(True, True), (False, False)])
def test_ports_encoder_layer(normformer: bool, pre_norm: bool) -> None:
    def call(module: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        bias = suited(module, source_bias(inputs), inputs["x"].dtype)
        mask = lowest(PADDING, inputs["x"].dtype)[:, None, None].expand(B, 1, SOURCE, SOURCE)
        return module(inputs["x"], mask, attn_bias=bias)[0]

    config = replicas.ofa_config(D, H, normformer, pre_norm)
    original = randomize(replicas.OFAEncoderLayer(config))
    assert_replaces(original, OFAEncoderLayer, call, SOURCE_INPUTS)
    assert_same_state(original, OFAEncoderLayer(config, 0.1))


@pytest.mark.parametrize("normformer, pre_norm", [(True, True), (False, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ports_decoder_layer(normformer: bool, pre_norm: bool, dtype: torch.dtype) -> None:
    def call(module: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        dtype = inputs["x"].dtype
        return module(
            inputs["y"],
            lowest(CAUSAL, dtype)[None, None].expand(B, 1, TARGET, TARGET),
            inputs["x"],
            lowest(PADDING, dtype)[:, None, None].expand(B, 1, TARGET, SOURCE),
            self_attn_bias=suited(module, target_bias(inputs), dtype),
            cross_attn_bias=suited(module, cross_bias(inputs), dtype),
        )[0]

    config = replicas.ofa_config(D, H, normformer, pre_norm)
    original = randomize(replicas.OFADecoderLayer(config))
    names = inputs_of("x", "y", "target_q", "target_k", "source_k", "token")
    assert_replaces(original, OFADecoderLayer, call, names, dtype)
    assert_same_state(original, OFADecoderLayer(config, 0.1))


def test_ports_decoder_layer_step_by_step() -> None:
    ours = OFADecoderLayer.replacing(randomize(replicas.OFADecoderLayer(replicas.ofa_config(D, H)))).double().eval()
    mask = lowest(CAUSAL, torch.float64)[None, None].expand(B, 1, TARGET, TARGET)
    whole = ours(
        INPUTS["y"], mask, INPUTS["x"], self_attn_bias=target_bias(INPUTS), cross_attn_bias=cross_bias(INPUTS)
    )[0]
    past = None
    for step in range(TARGET):
        positions = OFAPositions.decoder(step + 1, token_bucket_size=8, max_position=16)
        own = PositionBias(
            INPUTS["target_q"][:, : step + 1],
            INPUTS["target_k"][:, : step + 1],
            (positions.table(INPUTS["token"]),),
            positions.given,
        )
        cross = PositionBias(INPUTS["target_q"][:, : step + 1], INPUTS["source_k"])
        out, past = ours(
            INPUTS["y"][:, step : step + 1],
            None,
            INPUTS["x"],
            past_key_value=past,
            use_cache=True,
            self_attn_bias=own.last(),
            cross_attn_bias=cross.last(),
        )
        torch.testing.assert_close(out[:, 0], whole[:, step], rtol=1e-9, atol=1e-11)
    assert [x.shape for x in past] == [(B, H, TARGET, K)] * 2 + [(B, H, SOURCE, K)] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["bias", "none", "false"])
def test_ofasys_attention_and_its_path_without_bias(dtype: torch.dtype, kind: str) -> None:
    """None: another scale and no head weights, as published; False: no bias, the ordinary scale and head weights."""

    def call(module: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        x = inputs["x"].transpose(0, 1)
        bias = {"bias": lambda: suited(module, source_bias(inputs), x.dtype), "none": lambda: None}.get(kind)
        return module(x, x, x, PADDING, need_weights=False, attn_bias=bias() if bias else False)[0]

    original = randomize(replicas.MultiheadAttention(D, H))
    inputs = SOURCE_INPUTS if kind == "bias" else inputs_of("x")
    assert_replaces(original, FairseqMultiheadAttention, call, inputs, dtype)
    assert_same_state(original, FairseqMultiheadAttention(D, H, self_attention=True, scale_heads=True))


@pytest.mark.parametrize("options", [{"add_bias_kv": True}, {"add_zero_attn": True}])
def test_ofasys_extra_keys(options: dict[str, bool]) -> None:
    def call(module: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        x = inputs["x"].transpose(0, 1)
        return module(x, x, x, PADDING, need_weights=False)[0]

    original = randomize(replicas.MultiheadAttention(D, H, **options))
    assert_replaces(original, FairseqMultiheadAttention, call, inputs_of("x"))
    assert_same_state(original, FairseqMultiheadAttention(D, H, self_attention=True, scale_heads=True, **options))


@pytest.mark.parametrize("extras, pre_norm", [(True, True), (False, False)])
def test_ofasys_encoder_layer(extras: bool, pre_norm: bool) -> None:
    def call(module: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        bias = suited(module, source_bias(inputs), inputs["x"].dtype)
        return module(inputs["x"].transpose(0, 1), PADDING, self_attn_bias=bias)[0]

    config = replicas.ofasys_config(D, H, extras, pre_norm)
    original = randomize(replicas.TransformerEncoderLayer(config))
    assert_replaces(original, OFASysEncoderLayer, call, SOURCE_INPUTS)
    assert set(original.state_dict()) == set(OFASysEncoderLayer(config, 0.1).state_dict())


@pytest.mark.parametrize("extras, pre_norm, bias", [(True, True, True), (False, False, True), (True, True, False)])
def test_ofasys_decoder_layer(extras: bool, pre_norm: bool, bias: bool) -> None:
    def call(module: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        dtype = inputs["x"].dtype
        own = suited(module, target_bias(inputs), dtype) if bias else False
        cross = suited(module, cross_bias(inputs), dtype) if bias else False
        return module(
            inputs["y"].transpose(0, 1),
            inputs["x"].transpose(0, 1),
            PADDING,
            self_attn_mask=torch.zeros(TARGET, TARGET, dtype=dtype).masked_fill(CAUSAL, -torch.inf),
            self_attn_padding_mask=TARGET_PADDING,
            self_attn_bias=own,
            cross_attn_bias=cross,
        )[0]

    config = replicas.ofasys_config(D, H, extras, pre_norm)
    original = randomize(replicas.TransformerDecoderLayer(config))
    names = ("x", "y", "target_q", "target_k", "source_k", "token") if bias else ("x", "y")
    assert_replaces(original, OFASysDecoderLayer, call, inputs_of(*names))
    assert set(original.state_dict()) == set(OFASysDecoderLayer(config).state_dict())


def test_ofasys_incremental_state() -> None:
    """Step by step with padding, beams reordered half-way, against the whole sequence."""
    ours = OFASysDecoderLayer(replicas.ofasys_config(D, H)).double().eval()
    x, memory = INPUTS["y"].transpose(0, 1), INPUTS["x"].transpose(0, 1)
    causal = torch.zeros(TARGET, TARGET, dtype=x.dtype).masked_fill(CAUSAL, -torch.inf)
    order = torch.tensor([1, 0])
    whole = ours(x, memory, PADDING, self_attn_mask=causal, self_attn_bias=False, cross_attn_bias=False)[0]
    state: dict[str, dict[str, Tensor | None]] = {}
    for step in range(TARGET):
        if step == 3:
            for attention in (ours.self_attn, ours.encoder_attn):
                attention.reorder_incremental_state(state, order)
            memory, x, whole = (t[:, order] for t in (memory, x, whole))
        have = ours(x[step : step + 1], memory, PADDING[order] if step >= 3 else PADDING, state)[0]
        if step < 3:
            torch.testing.assert_close(have[0], whole[step], rtol=1e-9, atol=1e-11)
    kept = ours.self_attn._get_input_buffer(state)
    assert kept["prev_key"].shape == (B, H, TARGET, K)
    # The memory of as many rows as the new order is shared by beams and stays where it is, as in fairseq.
    assert torch.equal(ours.encoder_attn._get_input_buffer(state)["prev_key_padding_mask"], PADDING)


def test_a_replaced_layer_leaves_the_original_whole() -> None:
    original = randomize(replicas.OFADecoderLayer(replicas.ofa_config(D, H))).eval()
    ours = OFADecoderLayer.replacing(original)
    assert type(original.self_attn) is replicas.OFAAttention and isinstance(ours.self_attn, OFAAttention)
    assert [id(p) for p in ours.parameters()] == [id(p) for p in original.parameters()]
    assert not ours.training and not ours.self_attn.training
    attention = replicas.MultiheadAttention(D, H)
    assert_shares(attention, FairseqMultiheadAttention.replacing(attention))


def test_positions_are_shared_and_checked() -> None:
    assert OFAPositions.encoder(5, (2, 2)) is OFAPositions.encoder(5, (2, 2))
    with pytest.raises(OfakernValueError, match="exactly when there are patches"):
        ENCODER.table(INPUTS["token"])
    with pytest.raises(OfakernValueError, match="at most max_position"):
        OFAPositions.decoder(20, max_position=16)


def test_drop_path_drops_whole_samples() -> None:
    layer = OFASysEncoderLayer(replicas.ofasys_config(D, H), 0.5)
    torch.manual_seed(0)
    dropped = layer.drop_path(torch.ones(4, 64, 3))
    assert set(dropped.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(dropped, dropped[:1, :, :1].expand_as(dropped))


def test_refusals() -> None:
    port = OFAAttention.replacing(replicas.OFAAttention(D, H))
    x = INPUTS["x"].float()
    with pytest.raises(OfakernTypeError, match=r"attn_bias must be a PositionBias, got a dense \[8, 13, 13\]"):
        port(x, attn_bias=torch.zeros(B * H, SOURCE, SOURCE))
    with pytest.raises(OfakernValueError, match="output_attentions must not be given"):
        port(x, output_attentions=True)
    fairseq = FairseqMultiheadAttention(D, H, self_attention=True, add_zero_attn=True)
    with pytest.raises(OfakernValueError, match="need_weights must be False"):
        fairseq(x, x, x)
    with pytest.raises(OfakernValueError, match="attn_bias must be absent beside add_bias_kv"):
        fairseq(x, x, x, need_weights=False, attn_bias=PositionBias(x[..., None, :8], x[..., None, :8]))
    with pytest.raises(OfakernValueError, match="incremental_state must be None"):
        fairseq(x, x, x, need_weights=False, incremental_state={})
    with pytest.raises(OfakernValueError, match="key and value must be given"):
        FairseqMultiheadAttention(D, H)(x, None, None, need_weights=False)
    with pytest.raises(OfakernValueError, match="kdim and vdim must be embed_dim"):
        FairseqMultiheadAttention(D, H, kdim=8, self_attention=True)
    with pytest.raises(CannotReplace, match="modal_ffn must be off"):
        config = replicas.ofasys_config(D, H)
        config.modal_ffn = True
        OFASysEncoderLayer.replacing(replicas.TransformerEncoderLayer(config))
    with pytest.raises(CannotReplace, match="OFAAttention.replacing: head width"):
        OFAEncoderLayer.replacing(replicas.OFAEncoderLayer(replicas.ofa_config(24, 2)))
    with pytest.raises(OfakernValueError, match="name must be 'gelu' or 'relu'"):
        config = replicas.ofa_config(D, H)
        config.activation_function = "swish"
        OFAEncoderLayer(config)
