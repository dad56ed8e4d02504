"""Padded batches: few sizes, and the losses and gradients of the samples alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ofakern.data.batch import IGNORE_LABEL, Example, PackedBatch, Segment
from ofakern.data.padding import pad_examples
from ofakern.modality.image.adaptor import ImagePatchEmbedConfig
from ofakern.modality.text.adaptor import TextAdaptorConfig
from ofakern.model import OFAConfig, OFAPlus
from ofakern.nn.loss import label_smoothed_cross_entropy
from ofakern.train.inputs import signature

IMAGE = ImagePatchEmbedConfig(image_height=16, image_width=16, patch_height=8, patch_width=8)
CONFIG = OFAConfig(
    vocab_size=40,
    dim=16,
    ffn_dim=24,
    heads=2,
    encoder_layers=1,
    decoder_layers=1,
    dropout=0.0,
    adaptors=(TextAdaptorConfig(max_position=32, bucket_size=6), IMAGE),
)


def text(*ids: int, segment: int = 0) -> Segment:
    return Segment(segment, "text", 1, torch.tensor(ids, dtype=torch.int64))


def examples(allowed: bool = False) -> list[Example]:
    """A picture and two texts each, of 5, 9 and 3 tokens in all; targets of 3, 6 and 4."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for source, target in ((3, 3), (7, 6), (1, 4)):
        picture = Segment(1, "image_patch_embed", 2, torch.randn((3, 16, 16), generator=generator), length=5)
        ids = torch.randint(4, 40, (source + target,), generator=generator).tolist()
        rows = [torch.tensor([4 + n, 20, 30]) if n else torch.empty(0, dtype=torch.int64) for n in range(target)]
        labels = torch.tensor([row[0] if allowed and len(row) else 7 for row in rows])
        sources = [text(*ids[:source]), picture, text(5, 6, segment=2)]
        found.append(Example(sources, [text(*ids[source:])], labels, allowed=rows if allowed else None))
    return found


def text_lengths(batch: PackedBatch) -> tuple[list[int], list[int]]:
    source, target = (next(s for s in side.segments if s.adaptor == "text") for side in (batch.source, batch.target))
    return source.lengths.tolist(), target.lengths.tolist()


def test_sizes_are_multiples() -> None:
    batch = PackedBatch.collate(pad_examples(examples(), 8))
    assert text_lengths(batch) == ([3, 2, 7, 2, 1, 2, 8, 7], [3, 6, 4, 8, 3])
    assert batch.samples == 5 and (batch.source.tokens, batch.target.tokens) == (32 + 3 * 5, 24)
    assert batch.labels[13:].eq(IGNORE_LABEL).all() and batch.allowed is None
    assert batch.columns == {} and batch.prefix_lengths.tolist() == [0] * 5


@pytest.mark.parametrize("lengths", [(8, 8), (1, 1), (7, 1), (16, 3)])
def test_nothing_is_ever_empty(lengths: tuple[int, int]) -> None:
    """Two samples more whatever is missing: another number of segments would be another shape."""
    one, two = ([text(*[4] * n)] for n in lengths)
    given = [Example(side, side, torch.full((len(side[0].value),), 5)) for side in (one, two)]
    padded = pad_examples(given, 8)
    counts = [example.source[0].tokens() for example in padded]
    assert len(padded) == 4 and min(counts) > 0 and sum(counts) % 8 == 0 and max(counts) % 8 == 0


@pytest.mark.parametrize("allowed", [False, True])
def test_losses_and_gradients_are_those_of_the_samples(allowed: bool) -> None:
    def run(given: list[Example]) -> tuple[list[Tensor], Tensor]:
        model = OFAPlus(CONFIG, seed=0)
        with torch.no_grad():
            for number, parameter in enumerate(model.parameters()):
                generator = torch.Generator().manual_seed(number)
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        batch = PackedBatch.collate(given)
        sums = label_smoothed_cross_entropy(model(batch), model.output_weight, batch.labels, 0.1, batch.allowed)
        used = [p for p in model.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(sums.loss, used, allow_unused=True)
        return [sums.loss, sums.nll, sums.tokens], torch.cat([g.flatten() for g in gradients if g is not None])

    plain, padded = run(examples(allowed)), run(pad_examples(examples(allowed), 16))
    for a, b in zip(plain[0], padded[0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(plain[1], padded[1], rtol=1e-4, atol=1e-4)


def test_allowed_ids_are_a_power_of_two() -> None:
    batch = PackedBatch.collate(pad_examples(examples(allowed=True), 8))
    assert batch.allowed is not None and batch.allowed.ids.shape == (32,)  # 30 of the samples
    counts = batch.allowed.offsets.diff().tolist()
    assert counts[13] == 2 and not any(counts[14:])  # of the first token added; the others allow all


def test_other_targets_than_text_are_left_alone() -> None:
    given = [replace(e, target=[replace(e.target[0], adaptor="image_vqgan")]) for e in examples()]
    assert pad_examples(given, 8) == given


def test_layouts_of_padded_batches_have_the_same_sizes() -> None:
    """Whatever the lengths: nothing that a kernel is launched with depends on them."""
    model = OFAPlus(CONFIG, seed=0)
    seen = set()
    for short in (False, True):
        given = examples()
        if short:
            given[1].source[0] = text(4, 5, 6, 7, 8, 9)
            given[2].target[0] = text(9, 8)
            given[2] = replace(given[2], labels=torch.tensor([3, 4]))
        batch = PackedBatch.collate(pad_examples(given, 16))
        model.prepare(batch, share_positions=False)
        seen.add(signature(batch))
    assert len(seen) == 1
