"""Batches of few sizes: samples without meaning that fill a batch's text up.

A recorded step (CUDA graphs) serves batches of the shapes it was recorded with, and a packed batch has as many tokens
as its samples happen to have. So two samples are added: one as long as the longest text, rounded up, which fixes the
extent of all that goes by length; and one that rounds up the sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from ofakern.data.batch import IGNORE_LABEL, Example, Segment

_TEXT = "text"


def pad_examples(examples: Sequence[Example], multiple: int) -> list[Example]:
    """The examples and two more: on each side the text tokens and the longest text are then multiples of `multiple`.

    The new tokens see each other alone and have no label, so all losses and gradients stay as they are. Allowed ids are
    filled up to a power of two. Batches whose source or target has no text are left alone: they have other sizes, too.
    (One model routes by the whole batch: experts under compat="ofasys", where OFASys pads.)
    """
    sides = [_texts([e.source for e in examples]), _texts([e.target for e in examples])]
    if not all(sides):
        return list(examples)
    sources, targets = (_fillers(texts, multiple) for texts in sides)
    added = [
        Example([source], [target], torch.full((target.tokens(),), IGNORE_LABEL))
        for source, target in zip(sources, targets, strict=True)
    ]
    return [*examples, _with_allowed(added[0], examples), *added[1:]]


def _texts(samples: Sequence[Sequence[Segment]]) -> list[Segment]:
    return [segment for segments in samples for segment in segments if segment.adaptor == _TEXT and segment.tokens()]


def _fillers(texts: Sequence[Segment], multiple: int) -> list[Segment]:
    """Segments like the first text, of its first token."""
    counts = [segment.tokens() for segment in texts]
    longest = -(-max(counts) // multiple) * multiple
    missing = multiple - (sum(counts) + longest) % multiple  # never 0: an empty segment would be another shape
    first = texts[0]
    return [
        Segment(first.plan_segment, _TEXT, first.modality, first.value[:1].repeat(count))
        for count in (longest, missing)
    ]


def _with_allowed(filler: Example, examples: Sequence[Example]) -> Example:
    """Its first token is allowed so many ids (of the batch, again and again) that all are a power of two."""
    rows = [row for example in examples for row in example.allowed or ()]
    ids = torch.cat(rows) if rows else torch.empty(0, dtype=torch.int64)
    if not ids.numel():
        return filler
    own = ids[: (1 << ids.numel().bit_length()) - ids.numel()]
    return replace(filler, allowed=[own, *[ids[:0]] * (filler.labels.shape[0] - 1)])
