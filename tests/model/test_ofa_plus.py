"""The model's own promises: order of the batch, incremental decoding, flags, dtypes, options, errors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ofakern.data.batch import Example, PackedBatch, Segment
from ofakern.errors import DataError, OfakernValueError
from ofakern.modality.image.adaptor import ImagePatchEmbedConfig, ImageResnetConfig, ImageVitConfig
from ofakern.modality.text.adaptor import TextAdaptorConfig
from ofakern.model import OFAConfig, OFAPlus
from ofakern.model.stacks import dropped_together
from ofakern.nn.loss import label_smoothed_cross_entropy

SMALL = OFAConfig(
    vocab_size=40,
    dim=32,
    ffn_dim=48,
    heads=2,
    encoder_layers=2,
    decoder_layers=3,
    dropout=0.0,
    adaptors=(
        TextAdaptorConfig(max_position=32, bucket_size=6),
        ImagePatchEmbedConfig(image_height=16, image_width=16, patch_height=8, patch_width=8),
    ),
)
FLAGS: list[dict[str, Any]] = [
    {},
    {"scale_attn": False, "scale_fc": False, "scale_heads": False, "scale_resids": True},
    {"normalize_before": False, "activation": "relu"},
    {"share_attn_bias": True, "attn_scale_factor": 1.0},
    {"entangle_position_embedding": True},
    {"entangle_position_embedding": True, "use_self_attn_bias": False},
    {"entangle_position_embedding": True, "use_self_attn_bias": False, "compat": "ofasys"},
    {"max_segments": 4, "target_slots": 2},
]


def build(**flags: Any) -> OFAPlus:
    """Every parameter random, so that nothing hides behind zero tables and unit scales."""
    model = OFAPlus(replace(SMALL, **flags), backend="reference", seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.15)
    return model.eval()


def examples(count: int = 3) -> list[Example]:
    generator = torch.Generator().manual_seed(2)

    def tokens(n: int) -> Tensor:
        return torch.randint(4, 40, (n,), generator=generator)

    result = []
    for i in range(count):
        source = [Segment(0, "text", 1, tokens(3 + 2 * i))]
        if i != 1:
            image = torch.randn(3, 16, 16, generator=generator)
            source = [
                Segment(0, "image_patch_embed", 2, image, length=5),
                Segment(1, "text", 1, tokens(4 + i)),
                *source,
            ]
        result.append(Example(source, [Segment(9, "text", 1, tokens(2 + 3 * i))], tokens(2 + 3 * i)))
    return result


def per_sample(model: OFAPlus, batch: PackedBatch) -> list[Tensor]:
    with torch.no_grad():
        return list(torch.split(model.logits(model(batch)), list(batch.target.lengths_cpu)))


@pytest.mark.parametrize("flags", FLAGS, ids=lambda f: "-".join(f) or "default")
def test_order_of_the_batch_and_incremental_decoding(flags: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ofakern.model.decode.past.FIRST_STEPS", 3)  # so that these short answers outgrow it
    model, samples = build(**flags), examples()
    together = per_sample(model, PackedBatch.collate(samples))
    permuted = per_sample(model, PackedBatch.collate([samples[i] for i in (2, 0, 1)]))
    for i, j in enumerate((2, 0, 1)):
        torch.testing.assert_close(permuted[i], together[j], rtol=1e-5, atol=1e-5)
        alone = per_sample(model, PackedBatch.collate([samples[i]]))[0]
        torch.testing.assert_close(alone, together[i], rtol=1e-5, atol=1e-5)

    memory = model.encode(PackedBatch.collate(samples).source)
    state = model.begin_decode(memory, 2, max_length=10)
    inputs = torch.nn.utils.rnn.pad_sequence([s.target[0].value for s in samples], batch_first=True, padding_value=1)
    for t in range(inputs.shape[1]):
        logits = model.decode_step(state, inputs[:, t].repeat_interleave(2))
        for b, expected in enumerate(together):
            if t < len(expected):
                torch.testing.assert_close(logits[2 * b : 2 * b + 2], expected[t].expand(2, -1), rtol=1e-5, atol=1e-5)


def test_reorder_moves_hypotheses_and_drops_samples() -> None:
    model, samples = build(), examples()
    memory = model.encode(PackedBatch.collate(samples).source)
    state = model.begin_decode(memory, 2, max_length=4)
    model.decode_step(state, torch.tensor([5, 6, 7, 8, 9, 10]))
    state.reorder(torch.tensor([1, 1, 5, 4]))
    assert state.rows == 4 and state.length == 1
    logits = model.decode_step(state, torch.tensor([11, 12, 13, 14]))
    kept = [(0, [6, 11]), (0, [6, 12]), (2, [10, 13]), (2, [9, 14])]
    full = [
        replace(samples[b], target=[Segment(9, "text", 1, torch.tensor(t))], labels=torch.zeros(2).long())
        for b, t in kept
    ]
    expected = torch.stack([rows[-1] for rows in per_sample(model, PackedBatch.collate(full))])
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_decoding_refuses_what_it_cannot_do() -> None:
    model = build()
    memory = model.encode(PackedBatch.collate(examples(2)).source)
    state = model.begin_decode(memory, 1, max_length=1)
    with pytest.raises(OfakernValueError, match="tokens must have shape"):
        model.decode_step(state, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(OfakernValueError, match="together and in order"):
        state.reorder(torch.tensor([1, 0]))
    model.decode_step(state, torch.zeros(2, dtype=torch.int64))
    with pytest.raises(OfakernValueError, match="max_length"):
        model.decode_step(state, torch.zeros(2, dtype=torch.int64))
    with pytest.raises(OfakernValueError, match="rows_per_sample"):
        model.begin_decode(memory, [1, 1, 1], max_length=4)
    with pytest.raises(OfakernValueError, match="at most max_position"):
        model.begin_decode(memory, 1, max_length=33)


def test_layouts_are_built_once_per_batch() -> None:
    model, batch = build(), PackedBatch.collate(examples())
    model.prepare(batch)
    plans = dict(batch.source.cache), dict(batch.target.cache)
    model(batch)
    assert all(batch.source.cache[k] is v for k, v in plans[0].items())
    assert all(batch.target.cache[k] is v for k, v in plans[1].items()) and len(plans[1]) == 2


def loss_of(model: OFAPlus, batch: PackedBatch) -> Tensor:
    return label_smoothed_cross_entropy(model(batch), model.output_weight, batch.labels, 0.1).loss


def gradients(model: OFAPlus, batch: PackedBatch) -> dict[str, Tensor]:
    model.zero_grad()
    loss_of(model, batch).backward()  # type: ignore[no-untyped-call]
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_checkpointed_activations_give_the_same_gradients() -> None:
    plain, saving = build(), build(checkpoint_activations=True)
    batch = PackedBatch.collate(examples())
    expected, got = gradients(plain.train(), batch), gradients(saving.train(), batch)
    assert expected.keys() == got.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-5, atol=1e-6)


def test_bfloat16_and_autocast_stay_near() -> None:
    batch = PackedBatch.collate(examples())
    with torch.no_grad():
        expected = float(loss_of(build(), batch))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = loss_of(build(), batch)
    half = build().bfloat16()
    low = loss_of(half, batch)
    low.backward()  # type: ignore[no-untyped-call]
    mixed, low = mixed.detach(), low.detach()
    assert float(mixed) == pytest.approx(expected, rel=0.05) and float(low) == pytest.approx(expected, rel=0.05)
    assert all(p.grad is None or p.grad.dtype == torch.bfloat16 for p in half.parameters())


def test_training_noise_is_per_sample_and_seeded() -> None:
    model = build(dropout=0.1, attention_dropout=0.1, encoder_drop_path=0.5, decoder_drop_path=0.5).train()
    batch = PackedBatch.collate(examples())
    losses = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        losses.append(float(loss_of(model, batch).detach()))
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("compat", ["", "ofa_hf"])
def test_drop_path_drops_samples_or_as_the_port_does_places(compat: str) -> None:
    """Two equal samples: places dropped in both at once leave them equal, dropped samples do not."""
    model = build(encoder_drop_path=0.5, decoder_drop_path=0.5, compat=compat).train()
    batch = PackedBatch.collate([examples()[2], examples()[2]])
    torch.manual_seed(0)
    differ = places = 0
    for _ in range(5):
        one, two = model(batch).detach().chunk(2)
        differ += not torch.allclose(one, two, atol=1e-6)
        places += model.eval()(batch).detach().chunk(2)[0].sub(one).abs().amax(1).gt(1e-4).float().mean() > 0
        model.train()
    assert places == 5, "something must be dropped"
    assert (differ == 0) == (compat == "ofa_hf")
    ids = dropped_together(batch.source, compat)
    length = batch.source.lengths_cpu[0]
    expected = [*range(length)] * 2 if compat else [0] * length + [1] * length
    assert ids.sample_id.tolist() == expected and ids.count == (length if compat else 2)


def test_segment_order_is_an_option() -> None:
    image_a, image_b = torch.randn(3, 16, 16), torch.randn(3, 16, 16)

    def swapped(flags: dict[str, Any]) -> float:
        outs = []
        for order in ((image_a, image_b), (image_b, image_a)):
            source = [Segment(i, "image_patch_embed", 2, image, length=5) for i, image in enumerate(order)]
            example = Example(source, [Segment(2, "text", 1, torch.tensor([4, 5]))], torch.tensor([5, 2]))
            outs.append(per_sample(build(**flags), PackedBatch.collate([example]))[0])
        return float((outs[0] - outs[1]).abs().max())

    assert swapped({}) < 1e-4 < 1e-2 < swapped({"max_segments": 2})
    with pytest.raises(OfakernValueError, match="max_segments"):
        build(max_segments=1)(PackedBatch.collate(examples()))


def test_keys_initialisation_and_tied_embeddings() -> None:
    config = replace(SMALL, adaptors=(TextAdaptorConfig(), ImageResnetConfig(resnet_type="resnet50")))
    model = OFAPlus(config, seed=3)
    state = model.state_dict()
    assert (
        state["decoder.adaptor.embed_tokens.weight"].data_ptr()
        == state["encoder.adaptor.embed_tokens.weight"].data_ptr()
    )
    assert not any(key.startswith("decoder.adaptor.image_resnet") for key in state)
    tables = {k: v for k, v in state.items() if "rel_pos_table" in k}
    assert len(tables) == 2 * 2 + 3 and all(not v.any() for v in tables.values())
    weight = state["encoder.adaptor.embed_tokens.weight"]
    assert not weight[1].any() and 0.015 < float(weight[2:].std()) < 0.025
    assert all(torch.equal(v, state[k]) for k, v in OFAPlus(config, seed=3).state_dict().items())


@pytest.mark.parametrize(("size", "millions"), [("tiny", 33), ("base", 180), ("large", 470)])
def test_sizes(size: str, millions: int) -> None:
    with torch.device("meta"):
        model = OFAPlus(OFAConfig.from_size(size))
    count = sum(p.numel() for p in model.parameters()) / 1e6
    assert count == pytest.approx(millions, rel=0.03)


def test_config_survives_plain_data_and_refuses_nonsense() -> None:
    config = replace(SMALL, adaptors=(*SMALL.adaptors, ImageVitConfig(vit_type="vit_large")))
    assert OFAConfig.from_dict(config.to_dict()) == config
    assert OFAConfig.from_size("tiny", vocab_size=500).vocab_size == 500
    for wrong in ({"heads": 3}, {"compat": "x"}, {"use_self_attn_bias": False}, {"adaptors": SMALL.adaptors * 2}):
        with pytest.raises(OfakernValueError, match="OFAConfig"):
            replace(SMALL, **wrong)
    with pytest.raises(OfakernValueError, match="fields"):
        OFAConfig.from_dict({"width": 3})
    with pytest.raises(OfakernValueError, match="size"):
        OFAConfig.from_size("gigantic")


def test_wrong_batches_are_named() -> None:
    model = build()
    text = Segment(0, "text", 1, torch.tensor([4, 5]))
    labels = torch.tensor([5, 2])
    with pytest.raises(OfakernValueError, match="image_resnet"):
        model(PackedBatch.collate([Example([Segment(0, "image_resnet", 2, torch.zeros(3, 16, 16))], [text], labels)]))
    with pytest.raises(OfakernValueError, match="at most max_position"):
        model(PackedBatch.collate([Example([Segment(0, "text", 1, torch.full((40,), 4))], [text], labels)]))
    with pytest.raises(OfakernValueError, match="length must be 5 tokens"):
        short = Segment(0, "image_patch_embed", 2, torch.zeros(3, 16, 16), length=4)
        model(PackedBatch.collate([Example([short], [text], labels)]))
    with pytest.raises(DataError, match="labels must have one entry"):
        PackedBatch.collate([Example([text], [text], labels[:1])])
    with pytest.raises(DataError, match="at least one"):
        PackedBatch.collate([])
    with pytest.raises(DataError, match="length must be given"):
        PackedBatch.collate([Example([Segment(0, "image_vit", 2, torch.zeros(3, 16, 16))], [text], labels)])


def test_an_empty_source_segment_and_sample_are_fine() -> None:
    model = build()
    empty = Segment(0, "text", 1, torch.empty(0, dtype=torch.int64))
    target = [Segment(1, "text", 1, torch.tensor([4, 5]))]
    labels = torch.tensor([5, 2])
    both = [Example([empty], target, labels), Example([Segment(0, "text", 1, torch.tensor([7, 8]))], target, labels)]
    out = per_sample(model, PackedBatch.collate(both))
    torch.testing.assert_close(out[1], per_sample(model, PackedBatch.collate(both[1:]))[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out[0], per_sample(model, PackedBatch.collate(both[:1]))[0], rtol=1e-5, atol=1e-5)


def test_images_of_several_sizes_share_a_batch() -> None:
    resnet = ImageResnetConfig(resnet_type="resnet50", resnet_blocks=(1, 1, 1), resnet_width=8, bucket_size=6)
    model = build(adaptors=(TextAdaptorConfig(max_position=32, bucket_size=6), resnet))
    text = [Segment(1, "text", 1, torch.tensor([4, 5, 6]))]
    sizes = ((32, 32), (48, 80), (33, 16), (48, 80))
    samples = [
        Example([Segment(0, "image_resnet", 2, torch.randn(3, *size)), *text], text, torch.tensor([5, 6, 2]))
        for size in sizes
    ]
    batch = PackedBatch.collate(samples)
    assert [s.value.shape[0] for s in batch.source.segments if s.adaptor == "image_resnet"] == [1, 2, 1]
    assert batch.source.lengths_cpu == (7, 18, 6, 18)
    for sample, expected in zip(samples, per_sample(model, batch), strict=True):
        torch.testing.assert_close(per_sample(model, PackedBatch.collate([sample]))[0], expected, rtol=1e-4, atol=1e-5)
    moved = model.prepare(batch).to("cpu")
    assert moved.source.cache.keys() == batch.source.cache.keys()
    large = Example([Segment(0, "image_resnet", 2, torch.randn(3, 112, 16))], text, torch.tensor([5, 6, 2]))
    with pytest.raises(OfakernValueError, match=r"grid_block: .* \[1, 6\]"):
        model(PackedBatch.collate([large]))
