"""`attn_implementation="ofakern"`: models give what they gave, with masks, caches and gradients."""

from __future__ import annotations

import pytest
import torch

from ofakern.errors import OfakernValueError

transformers = pytest.importorskip("transformers")

from ofakern.integrations import transformers as integration  # noqa: E402

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = SIZES | {"vocab_size": 60, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def llama():
    config = transformers.LlamaConfig(**TEXT, num_key_value_heads=2, max_position_embeddings=64)
    return transformers.LlamaForCausalLM(config)


def mistral():
    config = transformers.MistralConfig(**TEXT, num_key_value_heads=2, sliding_window=3, max_position_embeddings=64)
    return transformers.MistralForCausalLM(config)


def bert():
    return transformers.BertModel(transformers.BertConfig(**TEXT, max_position_embeddings=64))


def vit():
    return transformers.ViTModel(transformers.ViTConfig(**SIZES, image_size=16, patch_size=8))


@pytest.fixture(autouse=True)
def registered():
    integration.register()
    torch.manual_seed(0)


def padded_text(side: str) -> dict[str, torch.Tensor]:
    mask = torch.ones(3, 11, dtype=torch.long)
    mask[1, 7:] = 0
    mask[2, 3:] = 0
    return {"input_ids": torch.randint(3, 60, (3, 11)), "attention_mask": mask.flip(1) if side == "left" else mask}


def outcome(model, implementation: str, inputs: dict[str, torch.Tensor]):
    """The last hidden state (or logits) at real tokens, and every gradient."""
    model.set_attn_implementation(implementation)
    assert model.config._attn_implementation == implementation
    model.zero_grad()
    out = model(**inputs)[0]
    real = out if "attention_mask" not in inputs else out[inputs["attention_mask"].bool()]
    weights = torch.randn(real.shape, generator=torch.Generator().manual_seed(1))
    (real * weights).sum().backward()
    return real.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


CASES = {
    "llama, padded on the right": (llama, lambda: padded_text("right")),
    "llama, padded on the left": (llama, lambda: padded_text("left")),
    "llama, no padding": (llama, lambda: {"input_ids": torch.randint(3, 60, (2, 9))}),
    "llama, packed by positions": (
        llama,
        lambda: {
            "input_ids": torch.randint(3, 60, (1, 9)),
            "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1]]),
        },
    ),
    "mistral, sliding window": (mistral, lambda: padded_text("right")),
    "bert, padded": (bert, lambda: padded_text("right")),
    "vit": (vit, lambda: {"pixel_values": torch.randn(2, 3, 16, 16)}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_outputs_and_gradients_agree(case: str, training: bool) -> None:
    build, make_inputs = CASES[case]
    model, inputs = build(), make_inputs()
    model.train(training)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "dropout_prob"):
            module.dropout_prob = 0.0
    for name in ("attention_probs_dropout_prob", "attention_dropout"):
        if hasattr(model.config, name):
            setattr(model.config, name, 0.0)
    want, want_grads = outcome(model, "eager", inputs)
    have, have_grads = outcome(model, "ofakern", inputs)
    torch.testing.assert_close(have, want, rtol=2e-5, atol=2e-5)
    assert have_grads.keys() == want_grads.keys()
    for name, grad in want_grads.items():
        torch.testing.assert_close(have_grads[name], grad, rtol=1e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("build", [llama, mistral])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_with_a_cache_gives_the_same_tokens(build, cache: str) -> None:
    model = build().eval()
    inputs = padded_text("left")
    tokens = {}
    for implementation in ("eager", "ofakern"):
        model.set_attn_implementation(implementation)
        tokens[implementation] = model.generate(
            **inputs,
            max_new_tokens=8,
            min_new_tokens=8,
            do_sample=False,
            cache_implementation=cache,
            disable_compile=True,
        )
    assert torch.equal(tokens["ofakern"], tokens["eager"])


def test_a_mask_written_to_is_read_again() -> None:
    attention = torch.nn.Module()
    q, k, v = (torch.randn(1, 2, 4, 8) for _ in range(3))
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    first, _ = integration.attention_forward(attention, q, k, v, mask)
    mask[..., 2:] = False
    second, _ = integration.attention_forward(attention, q, k, v, mask)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
    assert not torch.equal(first, second)
    torch.testing.assert_close(second, want)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("softcap", 30.0),
        ("s_aux", torch.zeros(2)),
        ("position_bias", torch.zeros(1, 2, 4, 4)),
        ("output_attentions", True),
    ],
)
def test_what_would_change_the_scores_is_refused(name: str, value: object) -> None:
    q, k, v = (torch.randn(1, 2, 4, 8) for _ in range(3))
    with pytest.raises(OfakernValueError, match=f"{name} must be absent"):
        integration.attention_forward(torch.nn.Module(), q, k, v, None, **{name: value})


def test_masks_that_are_no_intervals_are_refused() -> None:
    q, k, v = (torch.randn(1, 2, 4, 8) for _ in range(3))
    holes = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    holes[..., 1] = False
    with pytest.raises(OfakernValueError, match="one run of keys"):
        integration.attention_forward(torch.nn.Module(), q, k, v, holes)
    with pytest.raises(OfakernValueError, match=r"Try: ofakern\.patch"):
        integration.attention_forward(torch.nn.Module(), q, k, v, torch.randn(1, 1, 4, 4))
    with pytest.raises(OfakernValueError, match="bool or float"):
        integration.attention_forward(torch.nn.Module(), q, k, v, torch.ones(1, 1, 4, 4, dtype=torch.int64))


def test_a_model_with_a_learned_bias_is_refused() -> None:
    config = transformers.T5Config(d_model=16, num_layers=1, d_ff=16, num_heads=2, d_kv=8, vocab_size=20)
    model = transformers.T5EncoderModel(config)
    model.set_attn_implementation("ofakern")
    with pytest.raises(OfakernValueError, match=r"position_bias must be absent.*ofakern\.patch"):
        model(input_ids=torch.arange(6)[None])


def test_attentions_are_refused() -> None:
    model = bert()
    model.set_attn_implementation("ofakern")
    with pytest.raises(OfakernValueError, match="output_attentions must be absent"):
        model(input_ids=torch.arange(6)[None], output_attentions=True)
