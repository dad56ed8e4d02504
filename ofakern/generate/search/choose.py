"""From a step's logits to every group's candidates: what the ops are told about the rows, and who takes which op."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ofakern.generate.config import GenerationConfig
from ofakern.generate.search.automata import Automata
from ofakern.generate.search.candidates import Candidates, penalise_chosen
from ofakern.generate.search.contract import SpecialTokens
from ofakern.generate.search.ofasys import prefix_candidates
from ofakern.generate.search.random import uniforms
from ofakern.generate.search.restrict import Adjustments, restrictions
from ofakern.generate.search.states import on_gpu
from ofakern.generate.search.table import Array, Table
from ofakern.generate.search.whole import WholeChoice
from ofakern.ops.beam_step import (
    BeamCandidates,
    RaggedLogits,
    StepRules,
    beam_step,
    refuse_invalid_candidates,
    refuse_invalid_draws,
    sample_step,
)

__all__ = ["Chooser"]

_KEPT_RULES = ("temperature", "repetition_penalty", "ngram", "unk_penalty")  # of `_Fixed.rules`
_WIDEST = 1024  # `beam_step` on a GPU


@dataclass(frozen=True)
class _Fixed:
    """What follows from a table's groups alone, and is kept while they stay.

    base: int64 [R], where the states of a row's automaton begin, -1 without one. levels: bool [G] each, the searched
    groups in the order in which they choose. sampled: bool [G]. filters: those of `sample_step`.
    """

    rules: StepRules
    offsets: Tensor
    counts_history: bool
    base: Array
    levels: tuple[Array, ...]
    sampled: Array
    filters: dict[str, Any]
    width: int


class Chooser:
    """Asks `beam_step` and `sample_step` for the candidates of a table's groups."""

    def __init__(self, special: SpecialTokens, automata: Automata) -> None:
        self._special = special
        self._automata = automata
        self._kept: _Fixed | None = None
        self._version = -1

    def base(self, table: Table) -> Array:
        """int64 [R]: where the states of each row's automaton begin in `Automata.tables`; -1 without one."""
        return self._fixed(table).base

    def bound(self, table: Table) -> Array | None:
        """int64 [R], states in `Automata.tables`, when at this step all rows follow automata and nothing is forced."""
        base, groups, steps = self._fixed(table).base, table.groups, table.steps
        forced = (steps < groups["prefix"]) | ((steps >= groups["limit"]) & ~groups["bounded"])
        if bool((base < 0).any()) or bool(forced.any()):
            return None
        return table.states + base

    def __call__(
        self, logits: Tensor | RaggedLogits, table: Table, configs: Mapping[int, GenerationConfig], alive: Array
    ) -> Candidates:
        """The candidates of the groups `alive` (bool [G]). configs: of the running requests, by id.

        Raises `InvalidLogitsError` with the row where logits are no numbers.
        """
        fixed = self._fixed(table)
        adjustments = restrictions(table, configs)
        rules = self._rules(fixed, table, logits)
        found = Candidates.none(len(table.groups), fixed.width)
        odd = _leaves_prefix(table) & alive
        if odd.any():
            assert isinstance(logits, Tensor)
            for groups, parts in prefix_candidates(logits.cpu(), table, odd, self._special):
                found.put(groups, *parts)
        for number, level in enumerate(fixed.levels):
            if number:
                penalise_chosen(adjustments, found, table, level, self._special.eos)
            level = level & alive & ~odd
            if level.any():
                own = _with(rules, adjustments, table, level)
                got = _candidates(logits, table, fixed, own)
                found.put(level, *(part.numpy()[level] for part in got))
        sampled = fixed.sampled & alive
        if sampled.any():
            self._draw(found, logits, table, sampled, _with(rules, adjustments, table, sampled))
        return found

    def _draw(
        self, found: Candidates, logits: Tensor | RaggedLogits, table: Table, sampled: Array, rules: StepRules
    ) -> None:
        fixed, groups = self._fixed(table), table.groups[table.group]
        numbers = uniforms(groups["seed"], groups["number"], table.steps[table.group])
        tokens, log_probs = sample_step(logits, torch.from_numpy(numbers), rules, **fixed.filters)
        if on_gpu(_values(logits)):
            refuse_invalid_draws(tokens)
        rows = sampled[table.group]  # one of each group
        found.put_draws(sampled, rows, table.sums, tokens.cpu().numpy(), log_probs.cpu().numpy())

    def _fixed(self, table: Table) -> _Fixed:
        if self._kept is None or self._version != table.version:
            self._kept, self._version = _fixed(table, self._special, self._automata), table.version
        return self._kept

    def whole(
        self,
        table: Table,
        configs: Mapping[int, GenerationConfig],
        alive: Array,
        span: tuple[int, int] | None,
        weight: Tensor,
    ) -> WholeChoice | str:
        """The same choice as the ending of a CUDA graph, or why it cannot be one.

        span: of the logits, where they are those of a range only. weight: the output's `[V, D]`.
        """
        fixed = self._fixed(table)
        if (reason := _why_not_whole(fixed, table, alive)) is not None:
            return reason
        rows = len(table.group)
        given = ((name, getattr(fixed.rules, name)) for name in _KEPT_RULES if span is None or name != "ngram")
        rules: dict[str, Array] = {name: values.numpy() for name, values in given if values is not None}
        if span is None:  # there at every step, so that one graph serves them all
            rules |= {"forced": np.full(rows, -1, np.int32), "no_eos": np.zeros(rows, np.bool_)}
        rules |= self._told(fixed, table, span is not None)
        restricted = None
        if table.groups["restricted"].any():
            empty = np.zeros(rows + 1, np.int32), np.zeros(0, np.int32), np.zeros(0, np.float32)
            restricted = restrictions(table, configs).csr(rows) or empty
        filters = {name: values.numpy() for name, values in fixed.filters.items()}
        groups = table.groups[table.group]
        if fixed.sampled.any():
            filters["uniforms"] = uniforms(groups["seed"], groups["number"], table.steps[table.group])
        tables = (self._automata.tables, self._automata.tables_on(weight.device)) if "states" in rules else None
        return WholeChoice(
            rules=rules,
            filters=filters,
            restricted=restricted,
            tables=tables,
            searched=fixed.levels[0] & alive,
            drawn=fixed.sampled & alive,
            sums=table.sums,
            offsets=table.offsets,
            group=table.group,
            width=fixed.width,
            span=span,
            vocabulary=weight.shape[0],
            ids=(self._special.pad, self._special.eos, self._special.unk),
        )

    def _rules(self, fixed: _Fixed, table: Table, logits: Tensor | RaggedLogits) -> StepRules:
        """The rules of this step, for all rows."""
        ragged = isinstance(logits, RaggedLogits)
        told: dict[str, Any] = {name: torch.from_numpy(x) for name, x in self._told(fixed, table, ragged).items()}
        if "states" in told:
            told["tables"] = self._automata.tables_on(_values(logits).device)
        if ragged:
            told["ngram"] = None
        return replace(fixed.rules, **told)

    def _told(self, fixed: _Fixed, table: Table, ragged: bool) -> dict[str, Array]:
        """Rules that change from step to step, by their names in `StepRules`, where any row has one."""
        groups, steps, rows = table.groups, table.steps, table.group
        changes: dict[str, Array] = {}
        if fixed.counts_history:
            first = int(groups["counted"].min())
            changes["history"] = table.tokens[:, first:]
            changes["counted_from"] = (groups["counted"] - first)[rows].astype(np.int32)
        if ragged:  # closed sets and ranges: neither a prefix, nor an end, nor free text
            return changes
        at_end = steps >= groups["limit"]
        in_prefix = np.flatnonzero((steps < groups["prefix"]) & ~at_end)
        if len(in_prefix) or at_end.any():
            forced = np.where(at_end, self._special.eos, -1)
            forced[in_prefix] = table.prefixes[in_prefix, steps[in_prefix]]
            changes["forced"] = forced[rows].astype(np.int32)
        early = steps < groups["earliest"]
        if early.any():
            changes["no_eos"] = early[rows]
        if (fixed.base >= 0).any():
            outside = (fixed.base < 0) | (steps < groups["prefix"])[rows]
            changes["states"] = np.where(outside, -1, table.states + fixed.base).astype(np.int32)
        return changes


def _candidates(logits: Tensor | RaggedLogits, table: Table, fixed: _Fixed, rules: StepRules) -> BeamCandidates:
    """On the CPU. A GPU's come back in one copy, which is what a step waits for."""
    sums = torch.from_numpy(table.sums)
    found = beam_step(logits, sums, fixed.offsets, fixed.width, rules)
    if not on_gpu(_values(logits)):
        return found
    bits = torch.stack([part.view(torch.int32) for part in found]).cpu()
    found = BeamCandidates(bits[0].view(torch.float32), bits[1], bits[2], bits[3].view(torch.float32))
    refuse_invalid_candidates(found, fixed.offsets)
    return found


def _values(logits: Tensor | RaggedLogits) -> Tensor:
    return logits if isinstance(logits, Tensor) else logits.values


def _fixed(table: Table, special: SpecialTokens, automata: Automata) -> _Fixed:
    groups, rows = table.groups, table.groups[table.group]

    def used(name: str, unused: float) -> Tensor | None:
        return torch.from_numpy(rows[name].copy()) if (groups[name] != unused).any() else None

    rules = StepRules(
        temperature=used("temperature", 1),
        repetition_penalty=used("repetition", 1),
        ngram=used("ngram", 0),
        unk_penalty=used("unk", 0),
        pad=special.pad,
        eos=special.eos,
        unk=special.unk,
    )
    base = np.full(len(rows), -1)
    has = rows["automaton"] >= 0
    if has.any():
        assert automata.tables is not None  # which brings `base` up to date
        base[has] = automata.base[rows["automaton"][has]]
    sampled = groups["sampled"]
    filters = {name: used(name, off) for name, off in (("top_k", 0), ("top_p", 1), ("typical_p", 1), ("min_p", 0))}
    return _Fixed(
        rules=rules,
        offsets=_int32(table.offsets),
        counts_history=rules.ngram is not None or rules.repetition_penalty is not None,
        base=base,
        levels=tuple(~sampled & (groups["level"] == n) for n in range(int(groups["level"].max(initial=0)) + 1)),
        sampled=sampled,
        filters={name: values for name, values in filters.items() if values is not None},
        width=int(2 * groups["width"].max(initial=1)),
    )


def _with(rules: StepRules, adjustments: Adjustments, table: Table, groups: Array) -> StepRules:
    """The rules for the rows of `groups` (bool [G])."""
    changes: dict[str, Any] = {}
    if not groups.all():
        changes["live"] = torch.from_numpy(groups[table.group])
    csr = adjustments.csr(len(table.group))
    if csr is not None:
        names = ("adjust_first", "adjust_tokens", "adjust_values")
        changes.update(zip(names, map(torch.from_numpy, csr), strict=True))
    return replace(rules, **changes) if changes else rules


def _why_not_whole(fixed: _Fixed, table: Table, alive: Array) -> str | None:
    if len(fixed.levels) > 1:
        return "groups of diverse beams choose one after the other"
    if bool((_leaves_prefix(table) & alive).any()):
        return "beams in a forced prefix that they may leave choose on the CPU"
    if fixed.width > _WIDEST:
        return f"the kernel chooses at most {_WIDEST} candidates, got {fixed.width}"
    return None


def _leaves_prefix(table: Table) -> Array:
    """bool [G]: groups in a forced prefix that may be left, as OFASys has it."""
    groups, steps = table.groups, table.steps
    odd: Array = groups["ofasys"] & (groups["automaton"] < 0)
    return odd & (steps < groups["prefix"]) & (steps < groups["limit"])


def _int32(values: Array) -> Tensor:
    return torch.from_numpy(np.array(values, np.int32))
