"""The choice of a step's candidates inside a CUDA graph: what it is told stands in tensors of fixed shapes."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ofakern.generate.search.candidates import Candidates
from ofakern.generate.search.table import Array
from ofakern.ops.beam_step import (
    AutomatonTables,
    BeamCandidates,
    RaggedLogits,
    StepRules,
    beam_step,
    refuse_invalid_candidates,
    refuse_invalid_draws,
    sample_step,
)
from ofakern.ops.staged import Entry

__all__ = ["LogitsEnding", "WholeChoice", "of_range", "padded"]

Span = tuple[int, int]
Logits = Callable[[Span | None], Tensor]

_LEAST = 64
#: What idle rows are told, for rules whose 0 is a rule.
_IDLE = {"temperature": 1.0, "repetition_penalty": 1.0, "forced": -1, "states": -1, "top_p": 1.0, "typical_p": 1.0}


def padded(count: int) -> int:
    """The next power of two, 64 at least."""
    return max(_LEAST, 1 << (count - 1).bit_length())


def of_range(logits: Tensor, span: Span, vocabulary: int) -> RaggedLogits:
    """Logits `[rows, hi - lo]` of the ids in a range."""
    first = torch.arange(len(logits) + 1, dtype=torch.int32, device=logits.device) * logits.shape[1]
    tokens = torch.arange(*span, dtype=torch.int32, device=logits.device).repeat(len(logits))
    return RaggedLogits(logits.flatten(), first, tokens, vocabulary)


class LogitsEnding:
    """All logits, or those of the ids in a range."""

    def __init__(self, span: Span | None) -> None:
        self.key = ("logits", span)
        self._span = span

    def inputs(self, rows: int) -> dict[str, Entry]:
        return {}

    def run(self, hidden: Tensor, logits: Logits, inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        return (logits(self._span),)


@dataclass(frozen=True)
class WholeChoice:
    """`beam_step` over the searched groups, `sample_step` over the drawn ones, or both: one ending of a graph.

    rules: by their names in `StepRules`, one entry per row; filters: those of `sample_step`, and `uniforms`. searched,
    drawn: bool `[G]`, who chooses. tables: the automaton's on the CPU and where the logits are. restricted: csr of the
    adjustments, where any request may have one. ids: the vocabulary's pad, eos and unk.
    """

    rules: Mapping[str, Array]
    filters: Mapping[str, Array]
    restricted: tuple[Array, Array, Array] | None
    tables: tuple[AutomatonTables, AutomatonTables] | None
    searched: Array
    drawn: Array
    sums: Array
    offsets: Array
    group: Array
    width: int
    span: Span | None
    vocabulary: int
    ids: tuple[int, int, int]

    @property
    def key(self) -> Hashable:
        """`tables` by identity: a graph that is kept keeps them."""
        history = self.rules.get("history")
        return (
            "choice",
            tuple(self.rules),
            tuple(self.filters),
            None if history is None else padded(history.shape[1]),
            None if self.restricted is None else padded(len(self.restricted[1])),
            None if self.tables is None else id(self.tables[0]),
            bool(self.searched.any()),
            bool(self.drawn.any()),
            self.width,
            self.span,
            self.vocabulary,
            self.ids,
        )

    def inputs(self, rows: int) -> dict[str, Entry]:
        own = dict(self.rules)
        if "history" in own:  # its last column is the newest token, wherever a graph's ends
            short = padded(own["history"].shape[1]) - own["history"].shape[1]
            own["history"] = np.pad(own["history"], ((0, 0), (short, 0)), constant_values=-1)
            own["counted_from"] = own["counted_from"] + np.int32(short)
        found = {name: _per_row(name, values, rows) for name, values in (own | dict(self.filters)).items()}
        if self.restricted is not None:
            entries = padded(len(self.restricted[1]))
            found["adjust_first"] = Entry(self.restricted[0], (rows + 1,), len(self.restricted[1]))
            found["adjust_tokens"] = Entry(self.restricted[1], (entries,))
            found["adjust_values"] = Entry(self.restricted[2], (entries,))
        if self.searched.any():
            found["searched"] = Entry(self.searched[self.group].astype(np.int32), (rows,))
            found["sums"] = Entry(self.sums, (rows,))
            found["groups"] = Entry(self.offsets.astype(np.int32), (rows + 1,), len(self.group))
        if self.drawn.any():
            found["drawn"] = Entry(self.drawn[self.group].astype(np.int32), (rows,))
        return found

    def run(self, hidden: Tensor, logits: Logits, inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """int32 of all that is found end to end, floats by their bits: one copy to the host; and the logits."""
        values = logits(self.span)
        given = values if self.span is None else of_range(values, self.span, self.vocabulary)
        backend = "cuda" if values.is_cuda else "auto"
        parts: list[Tensor] = []
        if self.searched.any():
            rules = self._rules(inputs, inputs["searched"])
            parts += beam_step(given, inputs["sums"], inputs["groups"], self.width, rules, backend)
        if self.drawn.any():
            filters = {name: inputs[name] for name in self.filters if name != "uniforms"}
            rules = self._rules(inputs, inputs["drawn"])
            parts += sample_step(given, inputs["uniforms"], rules, **filters, backend=backend)
        return torch.cat([part.flatten().view(torch.int32) for part in parts]), values

    def _rules(self, inputs: Mapping[str, Tensor], live: Tensor) -> StepRules:
        names = [*self.rules, *(("adjust_first", "adjust_tokens", "adjust_values") if self.restricted else ())]
        told = {name: inputs[name] != 0 if name == "no_eos" else inputs[name] for name in names}
        pad, eos, unk = self.ids
        tables = None if self.tables is None else self.tables[1]
        return StepRules(**told, live=live != 0, tables=tables, pad=pad, eos=eos, unk=unk)

    def read(self, results: Tensor, rows: int) -> Candidates:
        """The candidates that a graph of `rows` rows gave; waits for it. Raises `InvalidLogitsError`."""
        bits, found = results.cpu(), Candidates.none(len(self.searched), self.width)
        if self.searched.any():
            size = rows * self.width
            parts = [bits[n * size : (n + 1) * size].view(rows, -1)[: len(self.searched)] for n in range(4)]
            best = BeamCandidates(_floats(parts[0]), parts[1], parts[2], _floats(parts[3]))
            refuse_invalid_candidates(best, torch.from_numpy(self.offsets))
            found.put(self.searched, *(part.numpy()[self.searched] for part in best))
        if self.drawn.any():
            tokens, gains = (bits[len(bits) - n * rows :][: len(self.group)] for n in (2, 1))
            refuse_invalid_draws(tokens)
            found.put_draws(self.drawn, self.drawn[self.group], self.sums, tokens.numpy(), _floats(gains).numpy())
        return found


def _floats(bits: Tensor) -> Tensor:
    return bits.view(torch.float32)


def _per_row(name: str, values: Array, rows: int) -> Entry:
    plain = values.astype(np.int32) if values.dtype == np.bool_ else values
    return Entry(plain, (rows, *plain.shape[1:]), _IDLE.get(name, 0))
