"""The model's decode states of all running rows: one where states can be joined, else one behind the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ofakern.generate.search.contract import StepDecoder
from ofakern.generate.search.table import Array
from ofakern.ops.beam_step.op import BACKENDS
from ofakern.ops.graph_use import GraphUse

__all__ = ["DecodeStates", "choosable", "on_gpu"]


def choosable(logits: Tensor) -> Tensor:
    """Logits where candidates are chosen from them: on a GPU whose kernel `auto` takes, else on the CPU."""
    return logits if on_gpu(logits) else logits.cpu()


def on_gpu(logits: Tensor) -> bool:
    """Whether `beam_step` and `sample_step` choose on a GPU."""
    return BACKENDS.automatic(logits) == "cuda" and BACKENDS.refusal("cuda", logits) is None


class _Part:
    def __init__(self, model: StepDecoder, state: Any, rows: int) -> None:
        self.model, self.state, self.rows = model, state, rows


class DecodeStates:
    """Rows of states that were begun one after the other, in that order. cuda_graphs: their steps run as such."""

    def __init__(self, cuda_graphs: bool = False) -> None:
        self._parts: list[_Part] = []
        self.cuda_graphs = cuda_graphs
        self._use = GraphUse()  # of states that are gone

    def begin(self, model: StepDecoder, memory: Any, rows: Sequence[int], max_length: int) -> None:
        """New samples behind those that run. rows: of each sample."""
        same = len(set(rows)) == 1
        graphs: dict[str, Any] = {"cuda_graphs": True} if self.cuda_graphs else {}
        state = model.begin_decode(memory, rows[0] if same else list(rows), max_length, **graphs)
        last = self._parts[-1] if self._parts else None
        if last is not None and last.model is model and hasattr(last.state, "join"):
            last.state.join(state)
            last.rows += sum(rows)
        else:
            self._parts.append(_Part(model, state, sum(rows)))

    @property
    def graph_use(self) -> GraphUse:
        """Of all states so far."""
        return sum((part.state.graph_use for part in self._parts if self.cuda_graphs), self._use)

    @property
    def only_model(self) -> StepDecoder | None:
        """The model of the only state; None where there are several."""
        return self._parts[0].model if len(self._parts) == 1 else None

    def replay(self, tokens: Array, ending: Any) -> tuple[Tensor, ...] | None:
        """The only state's step as a CUDA graph that goes on with `ending`."""
        found: tuple[Tensor, ...] | None = self._parts[0].state.replay(
            torch.from_numpy(tokens.astype(np.int64)), ending
        )
        return found

    def note_chosen_after(self, reason: str) -> None:
        """The step's graph ended before the choice."""
        state: Any = self._parts[0].state
        state.graph_use.chosen_after[reason] += 1

    def hidden(self, tokens: Array) -> tuple[Tensor, Any, Any] | None:
        """`[rows, D]` after one more token per row, and the model and state that make logits of it.

        None, and nothing is fed, where the model has no such seam or there are several states.
        """
        if len(self._parts) != 1 or getattr(self._parts[0].model, "decode_hidden", None) is None:
            return None
        part: Any = self._parts[0]
        hidden = part.model.decode_hidden(part.state, torch.from_numpy(tokens.astype(np.int64)))
        return hidden, part.model, part.state

    def logits(self, tokens: Array) -> Tensor:
        """`[rows, V]` after one more token per row, where `choosable` has them."""
        feed, found, begin = torch.from_numpy(tokens.astype(np.int64)), [], 0
        for part in self._parts:
            found.append(choosable(part.model.decode_step(part.state, feed[begin : begin + part.rows])))
            begin += part.rows
        return found[0] if len(found) == 1 else torch.cat(found)

    def reorder(self, index: Array) -> None:
        """Row r becomes what row `index[r]` was; index int64, samples together and in order."""
        begin, kept = 0, []
        for part in self._parts:
            lo, hi = np.searchsorted(index, (begin, begin + part.rows)) if len(self._parts) > 1 else (0, len(index))
            own = index[lo:hi] - begin
            begin += part.rows
            if len(own):  # a state whose samples have all left goes with them
                if len(own) != part.rows or not np.array_equal(own, np.arange(part.rows)):
                    part.state.reorder(torch.from_numpy(own))
                part.rows = len(own)
                kept.append(part)
            elif self.cuda_graphs:
                self._use += part.state.graph_use
        self._parts = kept
