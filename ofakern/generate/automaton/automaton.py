"""A finite automaton over vocabulary ids: what a target may look like, one integer per row of a search.

A state allows explicit tokens (closed sets, fixed text) and ranges of ids (bins, text). All of it is tensors in
compressed rows, so a step of a search costs no Python per row and a kernel takes the tables as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ofakern.errors import OfakernValueError
from ofakern.generate.automaton.tables import AutomatonTables

_WHERE = "TokenAutomaton.from_tensors"
_Ids = npt.NDArray[np.int32]
_Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Arrays:
    """An automaton of S states, E explicit transitions and Q ranges.

    Attributes:
        first: int32 `[S+1]`; the transitions of state s are first[s] .. first[s+1].
        tokens, targets, elements: int32 `[E]`; tokens ascend within a state. Elements are those of the target, in
            reading order.
        range_first: int32 `[S+1]`. ranges: int32 `[Q,3]`: lo, hi, target. range_elements: int32 `[Q]`.
        renormalise, free: bool `[S]`.
    """

    first: _Ids
    tokens: _Ids
    targets: _Ids
    elements: _Ids
    range_first: _Ids
    ranges: _Ids
    range_elements: _Ids
    renormalise: _Flags
    free: _Flags


class TokenAutomaton:
    """States and what each allows. Build one with `compile_target`; it is shared, so leave its tensors as they are.

    Explicit tokens come before ranges; a token that is not allowed leads to the last state, where nothing may follow.

    Attributes:
        start: the state in which a target starts, after its forced prefix.
        final: the state behind the end of sequence.
        longest: most tokens a target can have before its end of sequence; None when it has no bound.
        tables: what `ops.beam_step` takes.
        renormalise: bool [S]; probabilities of this state are taken over the allowed tokens only.
        free: bool [S]; states of free text, where n-grams may be blocked.
    """

    def __init__(self, arrays: Arrays, start: int, final: int, vocabulary_size: int, longest: int | None) -> None:
        self.arrays = arrays
        self.start, self.final = start, final
        self.vocabulary_size = vocabulary_size
        self.longest = longest
        self._sink = len(arrays.first) - 2
        self.tables = AutomatonTables(
            *(
                torch.from_numpy(getattr(arrays, name))
                for name in ("first", "tokens", "targets", "range_first", "ranges", "renormalise", "free")
            )
        )

    @property
    def renormalise(self) -> Tensor:
        return self.tables.renormalise

    @property
    def free(self) -> Tensor:
        return self.tables.free

    def unnormalised(self) -> TokenAutomaton:
        """The same, all probabilities taken over the whole vocabulary."""
        changed = {field.name: getattr(self.arrays, field.name) for field in fields(Arrays)}
        changed["renormalise"] = np.zeros_like(self.arrays.renormalise)
        return TokenAutomaton(Arrays(**changed), self.start, self.final, self.vocabulary_size, self.longest)

    def is_narrow(self, states: npt.NDArray[np.int64]) -> _Flags:
        """bool [rows]: whether the logits of few tokens are all that a step in this state needs.

        So it is where probabilities are taken over explicit tokens only.
        """
        arrays = self.arrays
        degree = arrays.first[states + 1] - arrays.first[states]
        few = degree <= self.vocabulary_size // 4  # else the whole product is the cheaper one
        explicit = arrays.range_first[states + 1] == arrays.range_first[states]
        narrow: _Flags = arrays.renormalise[states] & few & explicit
        return narrow

    # ------------------------------------------------------------------------------------------- what may come next

    def allowed(self, states: Tensor) -> Tensor:
        """bool [rows, V]: the tokens that may come next in `states` (int64 [rows])."""
        # Most rows of a batch are in few states.
        distinct, place = states.unique(return_inverse=True)  # type: ignore[no-untyped-call]
        rows, tokens = _run_members(self.tables.first, distinct)
        mask = torch.zeros(len(distinct), self.vocabulary_size, dtype=torch.bool)
        mask[rows, self.tables.tokens[tokens].long()] = True
        position = torch.arange(self.vocabulary_size)
        for row, number in zip(*_run_members(self.tables.range_first, distinct), strict=True):
            lo, hi, _ = self.tables.ranges[number].tolist()
            mask[row] |= (position >= lo) & (position < hi)
        return mask[place]

    def advance(self, states: Tensor, tokens: Tensor) -> Tensor:
        """int64 [rows]: the states after `tokens` (int64 [rows]); explicit tokens come before ranges."""
        after = torch.full_like(states, self._sink)
        rows, numbers = _run_members(self.tables.range_first, states)
        lo, hi, target = self.tables.ranges[numbers].long().unbind(1)
        inside = (tokens[rows] >= lo) & (tokens[rows] < hi)
        after[rows[inside]] = target[inside]
        place = self._place(states, tokens)
        return torch.where(place >= 0, self.tables.targets[place].long(), after) if len(self.arrays.tokens) else after

    def _place(self, states: Tensor, tokens: Tensor) -> Tensor:
        """The transition of each row's token, -1 where there is none."""
        key = states * self.vocabulary_size + tokens
        place = torch.searchsorted(self._keys, key).clamp(max=len(self._keys) - 1)
        return torch.where(self._keys[place] == key, place, -1)

    @cached_property
    def _keys(self) -> Tensor:
        """(state, token) of each transition as one number, ascending."""
        counts = np.diff(self.arrays.first)
        states = np.repeat(np.arange(len(counts)), counts)
        return torch.from_numpy(states * self.vocabulary_size + self.arrays.tokens)

    def trace(self, tokens: Sequence[int]) -> list[int]:
        """For each token the number of the element it belongs to; -1 from where the automaton does not allow them.

        Elements count in reading order, those of repeated groups included; the end of sequence comes after the last.
        """
        found: list[int] = []
        place = self.start
        for token in tokens:
            after = self._after(place, token)
            if after is None:
                break
            place, element = after
            found.append(element)
        return found + [-1] * (len(tokens) - len(found))

    def _after(self, state: int, token: int) -> tuple[int, int] | None:
        arrays = self.arrays
        begin, end = arrays.first[state : state + 2]
        place = begin + arrays.tokens[begin:end].searchsorted(token)
        if place < end and arrays.tokens[place] == token:
            return int(arrays.targets[place]), int(arrays.elements[place])
        for number in range(*arrays.range_first[state : state + 2]):
            lo, hi, target = arrays.ranges[number].tolist()
            if lo <= token < hi:
                return target, int(arrays.range_elements[number])
        return None

    # ------------------------------------------------------------------------------------------------------- tensors

    def to_tensors(self) -> dict[str, Tensor]:
        """All of it as named tensors, for a safetensors file."""
        longest = -1 if self.longest is None else self.longest
        header = torch.tensor([self.start, self.final, self.vocabulary_size, longest])
        return {"header": header} | {f.name: torch.from_numpy(getattr(self.arrays, f.name)) for f in fields(Arrays)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> TokenAutomaton:
        """The inverse of `to_tensors`. Raises OfakernValueError for tensors that are no automaton."""
        names = ["header", *(field.name for field in fields(Arrays))]
        if missing := [name for name in names if name not in tensors]:
            raise OfakernValueError(f"{_WHERE}: tensors must hold {', '.join(names)}, got no {missing[0]}")
        header = tensors["header"]
        if header.dtype != torch.int64 or header.shape != (4,):
            raise OfakernValueError(f"{_WHERE}: header must be int64 [4], got {header.dtype} {list(header.shape)}")
        start, final, vocabulary_size, longest = header.tolist()
        arrays = Arrays(**{field.name: tensors[field.name].contiguous().numpy() for field in fields(Arrays)})
        _check(arrays, start, final, vocabulary_size)
        return cls(arrays, start, final, vocabulary_size, None if longest < 0 else longest)


def _run_members(first: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row's run first[state] .. first[state+1]: (row, member) of all members, int64."""
    begins = first[states].long()
    counts = first[states + 1].long() - begins
    rows = torch.repeat_interleave(torch.arange(len(states)), counts)
    within = torch.arange(len(rows)) - (counts.cumsum(0) - counts)[rows]
    return rows, begins[rows] + within


def _check(arrays: Arrays, start: int, final: int, vocabulary_size: int) -> None:
    """What kernels rely on, in a file that anybody may have written."""
    states, edges, spans = len(arrays.first) - 1, len(arrays.tokens), len(arrays.ranges)
    wanted = {
        "first": (states + 1,),
        "tokens": (edges,),
        "targets": (edges,),
        "elements": (edges,),
        "range_first": (states + 1,),
        "ranges": (spans, 3),
        "range_elements": (spans,),
        "renormalise": (states,),
        "free": (states,),
    }
    for name, shape in wanted.items():
        array = getattr(arrays, name)
        dtype = np.bool_ if name in ("renormalise", "free") else np.int32
        if array.dtype != dtype or array.shape != shape:
            raise OfakernValueError(
                f"{_WHERE}: {name} must be {np.dtype(dtype)} {list(shape)}, got {array.dtype} {list(array.shape)}"
            )
    for name, count in (("first", edges), ("range_first", spans)):
        run = getattr(arrays, name)
        if states < 1 or run[0] != 0 or run[-1] != count or (np.diff(run) < 0).any():
            raise OfakernValueError(f"{_WHERE}: {name} must rise from 0 to {count}, got another run")
    for name, values, most in (
        ("tokens", arrays.tokens, vocabulary_size),
        ("targets", arrays.targets, states),
        ("ranges", arrays.ranges[:, :2], vocabulary_size + 1),
        ("ranges", arrays.ranges[:, 2], states),
        ("header", np.array([start, final]), states),
    ):
        if len(values) and not 0 <= values.min() <= values.max() < most:
            raise OfakernValueError(f"{_WHERE}: {name} must be in [0, {most}), got {values.min()} .. {values.max()}")
