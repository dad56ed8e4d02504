"""OFASys's forced prefix (`compat="ofasys"`), which a beam may leave: the one habit of it that is no rule of a step."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ofakern.generate.search.contract import SpecialTokens
from ofakern.generate.search.table import Array, Table
from ofakern.ops.beam_step import InvalidLogitsError

__all__ = ["prefix_candidates"]

NEVER = float("-inf")


def prefix_candidates(
    logits: Tensor, table: Table, groups: Array, special: SpecialTokens
) -> Iterator[tuple[Array, tuple[Array, Array, Array, Array]]]:
    """Candidates of the groups (bool [G]), as (group numbers, (scores, origins, tokens, gains) [n, w] each).

    fairseq leaves every token that is not the prefix's one below the worst prefix token of the batch, so a beam leaves
    the prefix as soon as there are more beams than one. The batch is what started together with as many beams.
    """
    chosen = np.flatnonzero(groups)
    steps, widths = table.steps[chosen], table.groups["width"][chosen]
    for step, width in np.unique(np.stack((steps, widths), 1), axis=0):
        batch = chosen[(steps == step) & (widths == width)]
        yield batch, _candidates(logits, table, batch, int(step), int(width), special)


def _candidates(
    logits: Tensor, table: Table, batch: Array, step: int, width: int, special: SpecialTokens
) -> tuple[Array, Array, Array, Array]:
    offsets = table.offsets
    counts = np.diff(offsets)[batch]
    rows = np.concatenate([np.arange(offsets[group], offsets[group + 1]) for group in batch])
    temperature = torch.from_numpy(table.groups["temperature"][table.group[rows]])
    scores = torch.log_softmax(logits[torch.from_numpy(rows)].float() / temperature[:, None], -1)
    if bool(scores[:, 0].isnan().any()):
        raise InvalidLogitsError("generate", "logits", int(rows[int(scores[:, 0].isnan().nonzero()[0])]))
    scores[:, special.pad] = NEVER
    scores[:, special.unk] -= torch.from_numpy(table.groups["unk"][table.group[rows]])
    token = torch.from_numpy(table.prefixes[batch, step].astype(np.int64)).repeat_interleave(torch.from_numpy(counts))
    wanted = scores.gather(1, token[:, None])
    forced = torch.full_like(scores, float(wanted.min()) - 1).scatter_(1, token[:, None], wanted)
    vocabulary = forced.shape[1]
    # All groups get the same number of rows: which of the equally bad tokens `topk` takes depends on the row's length.
    place = np.concatenate([np.arange(count) for count in counts])
    group = np.repeat(np.arange(len(batch)), counts)
    whole = torch.full((len(batch), int(counts.max()), vocabulary), NEVER)
    whole[group, place] = forced + torch.from_numpy(table.sums[rows])[:, None]
    flat = whole.view(len(batch), -1)
    best, places = flat.topk(min(2 * width, flat.shape[1] - 1), dim=1)
    origins, tokens = (places // vocabulary).numpy(), (places % vocabulary).numpy()
    gains = best.numpy() - table.sums[np.minimum(offsets[batch][:, None] + origins, len(table.sums) - 1)]
    return best.numpy(), origins, tokens, gains
