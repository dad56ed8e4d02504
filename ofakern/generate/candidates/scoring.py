"""Breadth first through the targets' shared prefixes: a prefix is decoded once, whatever begins with it.

A front is the rows of one level: (sample, prefix) pairs that still have several targets behind them. A step feeds each
row's last token, scores all its transitions and makes the next front, `state.reorder` multiplying the rows. A front
that grows beyond `max_rows` is cut: the first part goes on, the others wait and are fed again from the beginning, each
shared prefix once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ofakern.errors import OfakernRuntimeError, OfakernValueError
from ofakern.generate.candidates.numbering import CandidateSet, Numbers
from ofakern.generate.search import SpecialTokens
from ofakern.ops.gathered_linear import gathered_linear

_WHERE = "score_candidates"
_FULL_ROWS = 128  # rows whose logits over the whole vocabulary are held at once
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Front:
    """R rows, those of a sample together, equal prefixes side by side.

    sample, state, number: int64 [R]; number: targets before this prefix. path: int64 [R, t], the tokens from the start
    token on, the last one not fed yet. total: float64 [R]. record: int64 [R], see `Records`.
    """

    sample: Numbers
    path: Numbers
    state: Numbers
    total: npt.NDArray[np.float64]
    number: Numbers
    record: Numbers

    def __len__(self) -> int:
        return len(self.sample)

    def rows(self, index: Any) -> Front:
        return Front(*(getattr(self, name)[index] for name in self.__dataclass_fields__))


class Records:
    """The log-probability of every transition that was scored, and the record before it (-1: the first)."""

    def __init__(self) -> None:
        self._before: list[Numbers] = []
        self._values: list[Floats] = []
        self._count = 0

    def add(self, before: Numbers, values: Floats) -> Numbers:
        self._before.append(before)
        self._values.append(values)
        self._count += len(values)
        return np.arange(self._count - len(values), self._count)

    def finish(self) -> tuple[Numbers, Floats]:
        return np.concatenate(self._before or [np.empty(0, np.int64)]), np.concatenate(
            self._values or [np.empty(0, np.float32)]
        )


class CandidateScorer:
    """Scores all targets for all samples of a memory.

    Attributes:
        scores: float32 [B, C], the sum of the log-probabilities of a target's own tokens.
        lengths: int64 [C], a target's tokens, the end of sequence included.
        last: int64 [B, C], the last record of each target; it has no record for tokens behind it, which are certain.
            Records are kept when asked for.
        prefix_scores: float32 [B, P], log-probabilities of the forced first tokens.
    """

    def __init__(
        self,
        model: Any,
        memory: Any,
        batch_size: int,
        candidates: CandidateSet,
        *,
        prefix: Tensor | None,
        special: SpecialTokens,
        max_positions: int | None,
        temperature: float,
        max_rows: int,
        keep_records: bool,
    ) -> None:
        if max_rows < 1:
            raise OfakernValueError(f"{_WHERE}: max_rows must be at least 1, got {max_rows}")
        if prefix is None:
            prefix = torch.zeros(batch_size, 0, dtype=torch.int64)
        if prefix.dim() != 2 or len(prefix) != batch_size:
            raise OfakernValueError(f"{_WHERE}: prefix must be [{batch_size}, P], got {list(prefix.shape)}")
        self._model, self._memory, self._candidates = model, memory, candidates
        self._automaton = candidates.automaton
        self._special, self._temperature, self._max_rows = special, temperature, max_rows
        self._prefix: Numbers = prefix.cpu().numpy()
        self._prefix_lengths: Numbers = (self._prefix != special.pad).sum(1)
        assert self._automaton.longest is not None  # CandidateSet has seen to that
        self._fed = 1 + int(self._prefix_lengths.max(initial=0)) + self._automaton.longest
        if max_positions is not None and self._fed > max_positions:
            raise OfakernValueError(
                f"{_WHERE}: forced tokens and candidates must fit the decoder's positions ({max_positions}), "
                f"got {self._fed}"
            )
        self._has_hidden = getattr(model, "decode_hidden", None) is not None
        self._records = Records() if keep_records else None
        self.scores: Floats = np.full((batch_size, len(candidates)), -np.inf, np.float32)
        self.lengths: Numbers = np.zeros(len(candidates), np.int64)
        self.last: Numbers = np.full((batch_size, len(candidates) if keep_records else 0), -1, np.int64)
        self.prefix_scores: Floats = np.zeros(self._prefix.shape, np.float32)

    def run(self) -> tuple[Numbers, Floats]:
        """Fills the attributes; returns the records kept: the one before each, and its log-probability."""
        samples = np.arange(len(self._prefix))
        start = np.full_like(samples, self._automaton.start)
        path = np.full((len(samples), 1), self._special.bos)
        zero = np.zeros_like(samples)
        self._waiting = [Front(samples, path, start, zero.astype(np.float64), zero, zero - 1)]
        if self._candidates.decided[self._automaton.start] and not self._prefix_lengths.any():
            self._waiting = []  # a single target: nothing to choose
            self.scores[:], self.lengths[:] = 0, self._candidates.left[self._automaton.start]
        while self._waiting:
            front = self._waiting.pop()
            if len(front):
                self._follow(front)
        return (self._records or Records()).finish()

    def _follow(self, front: Front) -> None:
        state = self._feed_all_but_last(front)
        while True:
            front, origin = self._step(state, front)
            if not len(front):
                return
            cuts = range(self._max_rows, len(front), self._max_rows)
            self._waiting += [front.rows(slice(cut, cut + self._max_rows)) for cut in reversed(cuts)]
            front, origin = front.rows(slice(self._max_rows)), origin[: self._max_rows]
            state.reorder(torch.from_numpy(origin))

    def _feed_all_but_last(self, front: Front) -> Any:
        """A decode state with the front's rows; every distinct prefix is fed once."""
        new = np.diff(front.sample, prepend=-1) != 0  # the first row of each distinct prefix
        counts = np.bincount(front.sample[new], minlength=len(self._prefix))
        state = self._model.begin_decode(self._memory, counts.tolist(), self._fed)
        for place in range(1, front.path.shape[1]):
            self._feed(state, front.path[new, place - 1])
            prefix = new.cumsum() - 1
            new[1:] |= np.diff(front.path[:, place]) != 0
            state.reorder(torch.from_numpy(prefix[new]))
        return state

    def _feed(self, state: Any, tokens: Numbers) -> Tensor:
        """The decoder's output [rows, D], or logits [rows, V] of a model that only gives these."""
        call = self._model.decode_hidden if self._has_hidden else self._model.decode_step
        found: Tensor = call(state, torch.from_numpy(np.ascontiguousarray(tokens)))
        return found

    def _step(self, state: Any, front: Front) -> tuple[Front, Numbers]:
        """The next front, and the row that each of its rows comes from."""
        out = self._feed(state, front.path[:, -1])
        place = front.path.shape[1] - 1
        forced = place < self._prefix_lengths[front.sample]
        if not forced.any():
            return self._branch(state, front, out, np.arange(len(front)))
        held = np.flatnonzero(forced)
        tokens = self._prefix[front.sample[held], place]
        gains, _ = self._full(state, out, held, np.arange(len(held)), tokens)
        self.prefix_scores[front.sample[held], place] = gains
        going = front.rows(held)
        path = np.concatenate((going.path, tokens[:, None]), 1)
        going = Front(going.sample, path, going.state, going.total, going.number, going.record)
        rest, origin = self._branch(state, front, out, np.flatnonzero(~forced))
        origin = np.concatenate((held, origin))
        order = origin.argsort(kind="stable")
        return _joined(going, rest).rows(order), origin[order]

    def _branch(self, state: Any, front: Front, out: Tensor, chosen: Numbers) -> tuple[Front, Numbers]:
        """Scores the transitions of the rows `chosen`, notes those that decide, and goes on with the others."""
        found, going = self._candidates, front.rows(chosen)
        row, edge = found.transitions(going.state)
        gains = self._gains(state, out, chosen, going.state, row, edge)
        record = going.record[row]
        if self._records is not None:
            record = self._records.add(record, gains)
        target, total = found.targets[edge], going.total[row] + gains
        number, sample = going.number[row] + found.before[edge], going.sample[row]
        ends = found.decided[target]
        at = sample[ends], number[ends]
        self.scores[at] = total[ends]
        if self._records is not None:
            self.last[at] = record[ends]
        place = front.path.shape[1] - self._prefix_lengths[sample[ends]]
        self.lengths[number[ends]] = place + found.left[target[ends]]
        go = ~ends
        path = np.concatenate((going.path[row[go]], found.tokens[edge[go], None]), 1)
        following = Front(sample[go], path, target[go], total[go], number[go], record[go])
        return following, chosen[row[go]]

    def _gains(self, state: Any, out: Tensor, chosen: Numbers, states: Numbers, row: Numbers, edge: Numbers) -> Floats:
        """float32: the log-probability of each transition `edge` of the row `chosen[row]`."""
        tokens = self._candidates.tokens[edge]
        gathered = self._gathers(out)
        narrow = self._automaton.is_narrow(states) if gathered else np.zeros(len(states), bool)
        values, norm = np.empty(len(row), np.float32), np.zeros(len(states), np.float32)
        if narrow.any():
            tables = self._automaton.tables
            rows = out if narrow.all() and len(chosen) == len(out) else out[torch.from_numpy(chosen[narrow])]
            picked = torch.from_numpy(states[narrow])
            found, _, _ = gathered_linear(rows, self._model.output_weight, picked, tables.first, tables.tokens)
            values[narrow[row]] = found.numpy() / self._temperature
        wide = np.flatnonzero(~narrow)
        if len(wide):
            mine = ~narrow[row]
            place = (np.cumsum(~narrow) - 1)[row[mine]]
            values[mine], norm[wide] = self._full(state, out, chosen[wide], place, tokens[mine], normalised=False)
        own = self._automaton.arrays.renormalise[states]
        begins = np.flatnonzero(np.diff(row, prepend=-1))  # every row has a transition
        if own.any():
            norm = np.where(own, _log_sum_exp(values, begins, row), norm)
        if not np.isfinite(norm).all():
            raise OfakernRuntimeError(f"{_WHERE}: logits must be finite, got NaN or infinity")
        return values - norm[row]

    def _gathers(self, out: Tensor) -> bool:
        """Whether the logits of a few tokens can be had alone."""
        if not self._has_hidden or out.device.type != "cpu":
            return False
        return bool(self._model.output_weight.dtype == out.dtype)

    def _full(
        self, state: Any, out: Tensor, rows: Numbers, place: Numbers, tokens: Numbers, *, normalised: bool = True
    ) -> tuple[Floats, Floats]:
        """Of `tokens`, each of the row rows[place] (ascending): logits or log-probabilities; and each row's norm."""
        values, norms = np.empty(len(tokens), np.float32), np.empty(len(rows), np.float32)
        for begin in range(0, len(rows), _FULL_ROWS):
            part = torch.from_numpy(rows[begin : begin + _FULL_ROWS])
            logits = out[part.to(out.device)]
            if self._has_hidden:
                logits = self._model.step_logits(state, logits)
            logits = logits.float().cpu() / self._temperature
            lo, hi = place.searchsorted((begin, begin + len(part)))
            at = torch.from_numpy(place[lo:hi] - begin), torch.from_numpy(tokens[lo:hi])
            values[lo:hi] = logits[at].numpy()
            norms[begin : begin + len(part)] = logits.logsumexp(1).numpy()
        return (values - norms[place] if normalised else values), norms


def _joined(a: Front, b: Front) -> Front:
    names = Front.__dataclass_fields__
    return Front(*(np.concatenate((getattr(a, name), getattr(b, name))) for name in names))


def _log_sum_exp(values: Floats, begins: Numbers, row: Numbers) -> Floats:
    """float32 [R] over each row's run of `values`."""
    most = np.maximum.reduceat(values, begins)
    summed: Floats = most + np.log(np.add.reduceat(np.exp(values - most[row]), begins))
    return summed
