"""Samples that share positions give what each with its own gives: outputs, and the gradient of every parameter."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from test_ofa_plus import SMALL, build
from torch import Tensor

from ofakern.data.batch import Example, PackedBatch, Segment
from ofakern.model import OFAPlus, side


def captions(count: int) -> list[Example]:
    """An image of one size before a text, whose lengths differ on both sides."""
    generator = torch.Generator().manual_seed(3)

    def tokens(n: int) -> Tensor:
        return torch.randint(4, 40, (n,), generator=generator)

    def example(i: int) -> Example:
        image = Segment(0, "image_patch_embed", 2, torch.randn(3, 16, 16, generator=generator), length=5)
        target = tokens(2 + 3 * (i % 3))
        return Example([image, Segment(1, "text", 1, tokens(3 + i % 4))], [Segment(9, "text", 1, target)], target)

    return [example(i) for i in range(count)]


def outcome(model: OFAPlus, examples: list[Example], shared: bool) -> dict[str, Tensor]:
    batch = PackedBatch.collate(examples)
    for parameter in model.parameters():
        parameter.grad = None
    real = side.position_sets
    with mock.patch.object(side, "position_sets", real if shared else lambda _: None):
        logits = model.logits(model(batch))
    layouts = [model.encoder.adaptor.plan(batch.source).layout, model.decoder.adaptor.plan(batch.target).layout]
    assert all((layout.shared is not None) == (shared and model.encoder.adaptor.pos_q_linear is not None)
               for layout in layouts)  # fmt: skip
    (logits * torch.linspace(-1, 1, logits.shape[1], dtype=logits.dtype)).sum().backward()
    return {"logits": logits.detach()} | {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }


@pytest.mark.parametrize("flags", [{}, {"entangle_position_embedding": True}, {"share_attn_bias": True}], ids=str)
def test_reference(flags: dict[str, Any]) -> None:
    model = build(**flags).double()
    with_sets, without = (outcome(model, captions(5), shared) for shared in (True, False))
    assert with_sets.keys() == without.keys()
    for name, want in without.items():
        torch.testing.assert_close(with_sets[name], want, rtol=1e-9, atol=1e-9, msg=lambda text, n=name: f"{n}: {text}")


def test_kernels() -> None:
    model = OFAPlus(replace(SMALL), backend="cpu", seed=0)
    with_sets, without = (outcome(model, captions(4), shared) for shared in (True, False))
    for name, want in without.items():
        torch.testing.assert_close(with_sets[name], want, rtol=1e-3, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}")


def test_which_samples_share() -> None:
    def numbers(examples: list[Example]) -> tuple[int, ...] | None:
        sets = side.position_sets(PackedBatch.collate(examples).source)
        return None if sets is None else sets.numbers

    examples = captions(4)
    text_only = [replace(example, source=example.source[1:]) for example in examples]
    assert numbers(examples) == (0, 0, 0, 0)
    assert numbers([*examples, *text_only]) == (0, 0, 0, 0, 1, 1, 1, 1)
    assert numbers([*examples[:1], *text_only[:1]]) is None
    assert numbers(examples[:1]) is None
    swapped = replace(examples[0], source=examples[0].source[::-1])
    assert numbers([examples[0], swapped]) is None


def test_cross_attention_shares_what_both_sides_share() -> None:
    model = build()
    batch = PackedBatch.collate(captions(4))
    memory = model.encode(batch.source)
    layout = model.decoder.cross_layout(batch.target, memory.lengths, memory.sets)
    assert layout.shared is not None
    assert layout.shared.q_rows == max(batch.target.lengths_cpu)
    assert model.decoder.cross_layout(batch.target, memory.lengths).shared is None
    assert model.prepare(batch) is batch


def test_attention_weights_of_a_batch_that_shares() -> None:
    model = build()
    batch = PackedBatch.collate(captions(4))
    memory = model.encode(batch.source)
    hidden, weights = model.decode_with_attention(batch.target, memory)
    own_batch = PackedBatch.collate(captions(4)[:1])
    own_hidden, own = model.decode_with_attention(own_batch.target, model.encode(own_batch.source))
    torch.testing.assert_close(hidden[: own_hidden.shape[0]], own_hidden, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weights[0], own[0], rtol=1e-4, atol=1e-5)
