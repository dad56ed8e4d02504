"""`ofakern.patch` on OFA's Hugging Face port, by a replica of its classes (ofa_port.py says what it is)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import ofakern
from ofakern.errors import OfakernValueError
from tests.patching import ofa_port
from tests.patching.agreement import assert_patch_keeps, without_dropout
from tests.patching.ofa_port import OFAModel


@pytest.fixture
def model() -> OFAModel:
    torch.manual_seed(0)
    model = OFAModel()
    for table in (*model.encoder.image_rel_pos_table_list, *model.encoder.token_rel_pos_table_list):
        torch.nn.init.normal_(table.weight)
    return model


def texts(length: int) -> tuple[Tensor, Tensor]:
    """Padded tokens `[3,T]`, and which are real."""
    ids = torch.randint(4, 50, (3, length), generator=torch.Generator().manual_seed(2))
    ids[1, length - 2 :] = 1
    ids[2, length // 2 :] = 1
    return ids, ids.ne(1)


def images(dtype: torch.dtype) -> dict[str, Tensor]:
    pixels = torch.randn(3, 3, 48, 64, generator=torch.Generator().manual_seed(3)).to(dtype)
    return {"patch_images": pixels, "patch_masks": torch.tensor([True, True, False])}


def answer(image: bool):
    """Logits at real target tokens, of padded source and target."""

    def forward(model: OFAModel) -> Tensor:
        inputs = images(model.encoder.pos_ln.weight.dtype) if image else {}
        target, real = texts(7)
        return model(texts(11)[0], decoder_input_ids=target, **inputs).last_hidden_state[real]

    return forward


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("image", [False, True], ids=["text", "image"])
def test_outputs_and_gradients(model: OFAModel, image: bool, training: bool) -> None:
    report = assert_patch_keeps(without_dropout(model).train(training), answer(image))
    assert [row.path for row in report.replaced] == ["encoder", "decoder"] and not report.left_alone


def test_half_precision(model: OFAModel) -> None:
    assert_patch_keeps(without_dropout(model), answer(True), torch.bfloat16)


def test_a_scale_of_its_own_for_positions() -> None:
    torch.manual_seed(0)
    model = OFAModel(ofa_port.OFAConfig(attn_scale_factor=3.0))
    assert_patch_keeps(without_dropout(model), answer(True))


def test_cached_steps_give_the_same_logits(model: OFAModel) -> None:
    model.eval()
    ids, start = texts(11)[0], torch.zeros(3, 1, dtype=torch.long)

    def decode(model: OFAModel) -> Tensor:
        memory = model.encoder(ids, **images(torch.float32))
        tokens, cache, steps = start, None, []
        for _ in range(6):
            out = model(ids, decoder_input_ids=tokens, past_key_values=cache, encoder_outputs=memory, use_cache=True)
            cache = out.past_key_values
            steps.append(out.last_hidden_state[:, -1])
            tokens = torch.cat([tokens, steps[-1].argmax(-1, keepdim=True)], 1)
        return torch.stack(steps)

    with torch.no_grad():
        want = decode(model)
        with ofakern.patch(model):
            have = decode(model)
    torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-4)


def test_no_bias_matrix_is_formed(model: OFAModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def formed(*args: object) -> None:
        raise AssertionError("a [B*H,T,S] bias")

    for kind in (ofa_port.OFAEncoder, ofa_port.OFADecoder):
        monkeypatch.setattr(kind, "get_rel_pos_bias", formed)
    monkeypatch.setattr(ofa_port.OFADecoder, "get_pos_info", formed)
    with pytest.raises(AssertionError, match="bias"):
        answer(False)(model)
    with ofakern.patch(model):
        answer(False)(model)


def test_checkpoints_and_undo(model: OFAModel) -> None:
    fresh, kept = OFAModel(), list(model.modules())
    model.eval()
    with ofakern.patch(model):
        state = model.state_dict()
        assert isinstance(model.encoder, ofa_port.OFAEncoder), "what asks for the class still finds it"
        model.train()
    assert list(model.modules()) == kept and model.encoder.layers[0].training
    assert list(state) == list(fresh.state_dict())
    fresh.load_state_dict(state, strict=True)
    assert torch.equal(answer(True)(fresh.eval()), answer(True)(model.eval()))


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"output_attentions": True}, "output_attentions"),
        ({"sample_patch_num": 3}, "sample_patch_num"),
        ({"code_masks": torch.ones(3, dtype=torch.bool)}, "code_masks"),
    ],
)
def test_what_has_no_kernel_raises(model: OFAModel, arguments: dict[str, object], name: str) -> None:
    with (
        ofakern.patch(model),
        pytest.raises(OfakernValueError, match=f"{name} must not be given while the model is patched"),
    ):
        model(texts(11)[0], decoder_input_ids=texts(5)[0], **images(torch.float32), **arguments)


def test_options_without_a_kernel_are_left_alone_with_the_reason() -> None:
    model = OFAModel(ofa_port.OFAConfig(d_model=24, entangle_position_embedding=True))
    report = ofakern.patch(model)
    reasons = {row.path: row.reason for row in report.left_alone}
    assert not report.replaced and "multiple of 8" in reasons["encoder"] and "entangle" in reasons["decoder"]
