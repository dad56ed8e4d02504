"""Which steps are one native call, which go layer by layer, and that both give the same numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_decode_state import build, memory_of
from torch import Tensor, nn
from torch.nn.modules.batchnorm import BatchNorm1d

from ofakern.model import OFAPlus
from ofakern.model.decode import state as state_module
from ofakern.model.decode.native import whole_step, why_by_layer

WHOLE: list[dict[str, Any]] = [
    {},
    {"normalize_before": False, "activation": "relu", "share_attn_bias": True},
    {"scale_resids": True, "scale_attn": False, "scale_fc": False, "scale_heads": False},
    {"entangle_position_embedding": True, "use_self_attn_bias": False},
    {"modal_ffn": True, "target_slots": 2},
]
BY_LAYER: list[tuple[dict[str, Any], str]] = [
    ({"decoder_prefix": 3, "prefix_dim": 16}, "learned prefix"),
    ({"adapter_dim": 8}, "bottleneck adapters"),
]


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every native call from here on."""
    calls: list[int] = []
    native = state_module.decode_layers

    def spy(x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        calls.append(len(x))
        return native(x, *arguments, **options)

    monkeypatch.setattr(state_module, "decode_layers", spy)
    return calls


def hidden(model: OFAPlus, steps: int = 20, rows: int = 2, by_layer: bool = False) -> Tensor:
    """Of two sources, rows changing places, past the first block of positions. `[steps, rows, D]`."""
    state = model.begin_decode(memory_of(model, [6, 11]), rows, 40)
    if by_layer:
        state.weights.by_layer, state.weights.by_layer_asked = "the test asks for it", True
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(steps):
        found.append(state.step(torch.randint(4, 80, (state.rows,), generator=generator)))
        order = [s * rows + torch.randint(rows, (rows,), generator=generator) for s in range(2)]
        state.reorder(torch.cat(order))
    return torch.stack(found)


@pytest.mark.parametrize("kind", [None, "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize("flags", WHOLE, ids=lambda f: "-".join(f) or "default")
def test_one_call_gives_what_the_layers_give(
    flags: dict[str, Any], dtype: torch.dtype, kind: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(dtype, **flags).quantize(kind)
    want = hidden(model, by_layer=True)
    model._decode_weights.clear()
    calls = counted(monkeypatch)
    got = hidden(model)
    assert calls == [4] * 20
    error = float((got.double() - want.double()).norm() / want.double().norm())
    assert error <= {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype], error


@pytest.mark.parametrize(("flags", "reason"), BY_LAYER)
def test_decoders_that_go_layer_by_layer(flags: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = build(**flags), counted(monkeypatch)
    hidden(model, 2)
    weights = model.begin_decode(memory_of(model, [3]), 1, 4).weights
    assert calls == [] and weights.by_layer is not None and reason in weights.by_layer


def test_what_keeps_any_decoder_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def reason(model: OFAPlus) -> str | None:
        return why_by_layer(model.decoder, model.begin_decode(memory_of(model, [3]), 1, 4).weights)

    assert reason(build()) is None
    assert "not packed" in str(reason(build().double()))
    assert "not packed" in str(reason(build().train()))
    other = build()
    other.decoder.backend = "reference"
    assert "backend 'reference'" in str(reason(other))
    hooked = build()
    hooked.decoder.decoder_layers()[1].final_layer_norm.register_forward_hook(lambda *_: None)
    assert "has hooks" in str(reason(hooked))
    strange = build()
    strange.decoder.layer_norm = BatchNorm1d(64).eval()  # type: ignore[assignment]
    assert "not torch's LayerNorm" in str(reason(strange))
    bare = build()
    bare.decoder.decoder_layers()[0].self_attn_layer_norm = nn.LayerNorm(64, bias=False)
    assert "with weight and bias" in str(reason(bare))


def test_steps_that_go_layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many rows, unless the weights are int8; rows of several experts."""
    calls = counted(monkeypatch)
    hidden(build(), 1, rows=49)
    assert calls == []
    hidden(build().quantize("int8"), 1, rows=49)
    assert calls == [98]
    calls.clear()
    model = build(modal_ffn=True)
    state = model.begin_decode(memory_of(model, [4]), 2, 8)
    state.join(model.begin_decode(memory_of(model, [5]), 1, 8, adaptor="image_vqgan", modality=2))
    state.step(torch.tensor([5, 6, 7]))
    assert calls == []
    state.reorder(torch.tensor([2]))  # the second expert's rows alone
    state.step(torch.tensor([8]))
    assert calls == [1] and list(state.weights.prepared) == [1]


def test_prepared_layers_are_kept_as_long_as_the_weights() -> None:
    model = build()
    state = model.begin_decode(memory_of(model, [4]), 1, 8)
    first = whole_step(model.decoder, state.weights, 1, ())
    assert first is not None and whole_step(model.decoder, state.weights, 5, ()) is first
    before = state.step(torch.tensor([5]))
    with torch.no_grad():
        model.decoder.decoder_layers()[0].self_attn_layer_norm.weight.mul_(2)
    again = model.begin_decode(memory_of(model, [4]), 1, 8)
    assert whole_step(model.decoder, again.weights, 1, ()) is not first
    assert not torch.allclose(again.step(torch.tensor([5])), before)
