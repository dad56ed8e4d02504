"""`ofakern.patch` on OFASys's GeneralistModel, by a replica of its classes (ofasys_port.py says what it is)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ofakern
from ofakern.errors import OfakernValueError
from tests.patching import ofasys_port
from tests.patching.agreement import assert_patch_keeps
from tests.patching.ofasys_port import GeneralistModel, Slot, config
from tests.patching.test_ofa_port import texts


def build(**options: Any) -> GeneralistModel:
    torch.manual_seed(0)
    return GeneralistModel(config(**options)).eval()


def slots(model: nn.Module, image: bool) -> list[Slot]:
    pixels = torch.randn(3, 3, 48, 64, generator=torch.Generator().manual_seed(3)).to(model.embed_tokens.weight.dtype)
    source = [Slot("image_resnet", pixels)] if image else []
    return [*source, Slot("text", texts(11)[0]), Slot("text", texts(7)[0], is_src=False)]


def answer(image: bool):
    """Logits at real target tokens, of padded source and target."""
    return lambda model: model(slots(model, image))[0][texts(7)[1]]


@pytest.mark.parametrize(
    ("image", "training", "options"),
    [(False, True, {}), (True, False, {}), (True, True, {"share_attn_bias": True})],
    ids=["text", "image", "shared bias"],
)
def test_outputs_and_gradients(image: bool, training: bool, options: dict[str, Any]) -> None:
    report = assert_patch_keeps(build(**options).train(training), answer(image))
    assert [row.path for row in report.replaced] == ["encoder", "decoder"] and not report.left_alone


def test_cached_steps_give_the_logits_of_the_whole() -> None:
    model = build()
    given = slots(model, image=True)
    source, target = given[:2], given[2].value[:1].expand(3, -1)
    with torch.no_grad():
        whole, _ = model([*source, Slot("text", target, is_src=False)])
        with ofakern.patch(model):
            memory, state, steps = model.encoder(source), {}, []
            for length in range(1, target.shape[1] + 1):
                step = [Slot("text", target[:, :length], is_src=False)]
                steps.append(model.decoder(step, encoder_out=memory, incremental_state=state)[0])
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-4)


def test_no_bias_matrix_is_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    def formed(*args: object, **kwargs: object) -> Tensor:
        raise AssertionError("a [B,H,T,T] bias")

    for kind in (ofasys_port.TextAdaptor, ofasys_port.ImageResnetAdaptor):
        monkeypatch.setattr(kind, "get_rel_pos_bias", formed)
    monkeypatch.setattr(ofasys_port.OFAGeneralAdaptor, "build_abs_pos_bias", formed)
    monkeypatch.setattr(ofasys_port.TransformerDecoder, "get_cross_pos_info", formed)
    model = build()
    with pytest.raises(AssertionError, match="bias"):
        answer(True)(model)
    with ofakern.patch(model):
        answer(True)(model)


def test_checkpoints_and_undo() -> None:
    model, fresh = build(), GeneralistModel(config()).eval()
    kept = list(model.modules())
    with ofakern.patch(model):
        state = model.state_dict()
    assert list(model.modules()) == kept and list(state) == list(fresh.state_dict())
    fresh.load_state_dict(state, strict=True)
    assert torch.equal(answer(True)(fresh), answer(True)(model))


def test_what_has_no_kernel_raises() -> None:
    model = build()
    dense = [torch.zeros(3, 4, 12, 12)] * 2
    with ofakern.patch(model):
        with pytest.raises(OfakernValueError, match="need_weights must be False|need_attn"):
            model(slots(model, False), return_all_attention_weights=True)
        memory = model.encoder(slots(model, False)[:1])
        with pytest.raises(OfakernValueError, match="return_all_attention_weights must not be given"):
            model.decoder(slots(model, False)[1:], encoder_out=memory, return_all_attention_weights=True)
        model.encoder.adaptor.name2adaptor["image_resnet"].get_rel_pos_bias = lambda *args, **kwargs: dense[0]
        with pytest.raises(OfakernValueError, match="every slot's adaptor must be text or image_resnet"):
            model(slots(model, True))


def test_experts_and_narrow_heads_are_left_alone_with_the_reason() -> None:
    for options, reason in (({"modal_ffn": True}, "modal_ffn"), ({"dim": 24}, "multiple of 8")):
        report = ofakern.patch(build(**options))
        assert not report.replaced and {row.path for row in report.left_alone} == {"encoder", "decoder"}
        assert all(reason in row.reason for row in report.left_alone)
