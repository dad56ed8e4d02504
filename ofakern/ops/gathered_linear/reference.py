"""The oracle of `gathered_linear`: one product per state, scattered to its rows."""

from __future__ import annotations

import torch
from torch import Tensor


def gathered_linear_reference(
    hidden: Tensor, weight: Tensor, states: Tensor, first: Tensor, tokens: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """values `[n]`, row_first int32 `[R+1]`, row_tokens int32 `[n]`; see `api.gathered_linear`."""
    begins, ends = first[:-1].long()[states], first[1:].long()[states]
    row_first = torch.cat([begins.new_zeros(1), (ends - begins).cumsum(0)])
    wide = torch.promote_types(hidden.dtype, torch.float32)
    values = hidden.new_empty(int(row_first[-1]), dtype=wide)
    row_tokens = tokens.new_empty(len(values))
    for state in states.unique().tolist():  # type: ignore[no-untyped-call]
        rows = (states == state).nonzero()[:, 0]
        allowed = tokens[int(first[state]) : int(first[state + 1])]
        places = row_first[rows][:, None] + torch.arange(len(allowed), device=hidden.device)
        values[places] = (hidden[rows] @ weight[allowed.long()].T).to(wide)
        row_tokens[places] = allowed.expand(len(rows), -1)
    return values, row_first.int(), row_tokens
