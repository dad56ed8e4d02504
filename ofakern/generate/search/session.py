"""Searches of many requests at once, each with its own settings, over one decode state.

The beam search is fairseq's, which OFA and OFASys use: 2 x beams candidates a step, an answer ends only from within the
best beams, a sample is done with its num_beams-th answer. A step costs a fixed number of calls on whole arrays: Python
runs per request that ends or streams, never per beam or vocabulary entry. The bookkeeping stays on the CPU, wherever
the model is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ofakern.errors import OfakernRuntimeError, OfakernValueError
from ofakern.generate.config import GenerationConfig
from ofakern.generate.search.automata import Automata
from ofakern.generate.search.candidates import Candidates
from ofakern.generate.search.choose import Chooser
from ofakern.generate.search.contract import Finished, Hypothesis, SearchRequest, SpecialTokens, StepDecoder, TokenEvent
from ofakern.generate.search.plan import Running, plan_request
from ofakern.generate.search.restrict import forbidden_ids
from ofakern.generate.search.states import DecodeStates, choosable
from ofakern.generate.search.stream import certain_tokens, last_tokens
from ofakern.generate.search.table import EARLY, NEVER_EARLY, Array, Table
from ofakern.generate.search.whole import LogitsEnding, of_range
from ofakern.ops.beam_step import InvalidLogitsError, RaggedLogits
from ofakern.ops.gathered_linear import gathered_linear
from ofakern.ops.graph_use import GraphUse

__all__ = ["SearchSession"]


class SearchSession:
    """Runs requests that come and go, one token of each at every `step`.

    An answer depends on its request alone: not on what runs beside it, and when drawn not on its place either.

    Args:
        model: what writes the answers; `add` may name another.
        special: vocabulary ids.
        cuda_graphs: steps run as CUDA graphs, of models whose `begin_decode` takes the argument: docs/GPU.md.
    """

    def __init__(self, model: StepDecoder, special: SpecialTokens | None = None, *, cuda_graphs: bool = False) -> None:
        self._model = model
        self._special = special or SpecialTokens()
        self._automata = Automata()
        self._chooser = Chooser(self._special, self._automata)
        self._table = Table()
        self._states = DecodeStates(cuda_graphs)
        self._running: dict[int, Running] = {}
        self._configs: dict[int, GenerationConfig] = {}
        self._unchecked: list[Running] = []
        self._next_id = 0

    @property
    def running(self) -> int:
        """Requests that are not finished."""
        return len(self._running)

    @property
    def graph_use(self) -> GraphUse:
        """Which steps ran as CUDA graphs, and why others did not."""
        return self._states.graph_use

    @torch.inference_mode()
    def add(self, memory: Any, requests: Sequence[SearchRequest], model: StepDecoder | None = None) -> list[int]:
        """Start a request for every sample of `memory`; returns their ids, by which `step` reports them.

        Raises OfakernValueError, and starts nothing, when an answer cannot fit into the decoder's positions.
        """
        if not requests:
            return []
        planned = [plan_request(self._next_id + n, request, self._special) for n, request in enumerate(requests)]
        longest = max(int(one.records["limit"][0]) for one in planned)
        self._states.begin(model or self._model, memory, [one.groups for one in planned], longest + 1)
        self._forget_automata()
        for one in planned:
            automaton, states = one.request.automaton, np.zeros(one.groups, np.int64)
            if automaton is not None:
                one.records["automaton"] = self._automata.number(automaton)
                states += automaton.start
            self._table.add(one.records, [one.prefix] * one.groups, states, self._special.bos)
            self._running[one.id], self._configs[one.id] = one, one.config
        self._unchecked += [one for one in planned if one.records["restricted"][0]]
        self._next_id += len(planned)
        return [one.id for one in planned]

    def cancel(self, id: int) -> bool:
        """End a request without an answer, nor an event; False when it does not run."""
        if id not in self._running:
            return False
        self._leave([id])
        return True

    @torch.inference_mode()
    def step(self) -> list[Finished | TokenEvent]:
        """One more token for every running request: the tokens that became certain, and the requests that ended."""
        if not self._running:
            return []
        tokens = self._table.tokens[:, -1]
        found = self._by_graph(tokens) if self._states.cuda_graphs else self._logits(tokens)
        self._continue(found if isinstance(found, Candidates) else self._choose(found))
        events = self._streamed()
        ended = [one for one in self._running.values() if one.groups == 0 or one.error is not None]
        for one in ended:
            events += self._finished(one)
        self._leave([one.id for one in ended])
        return events

    # ------------------------------------------------------------------------------------------------- the choice

    def _logits(self, tokens: Array) -> Tensor | RaggedLogits:
        """Those of the next token; only of what is allowed, where that is known to be little."""
        states, span = self._allowed()
        narrow = states is not None and span is None and self._automata.narrow(states)
        fed = self._states.hidden(tokens) if span is not None or narrow else None
        if states is None or fed is None:
            logits = self._states.logits(tokens)
            self._check_ids(logits.shape[1])
            return logits
        hidden, model, state = fed
        weight = model.output_weight
        self._check_ids(weight.shape[0])
        if span is not None:
            return of_range(choosable(model.step_logits(state, hidden, span)), span, weight.shape[0])
        if hidden.device.type != "cpu" or hidden.dtype != weight.dtype:
            return choosable(model.step_logits(state, hidden))
        tables, rows = self._automata.tables, torch.from_numpy(states.astype(np.int32))
        return RaggedLogits(*gathered_linear(hidden, weight, rows, tables.first, tables.tokens), weight.shape[0])

    def _allowed(self) -> tuple[Array | None, tuple[int, int] | None]:
        """The states of all rows, where all follow automata, and the one range that they then choose from, if any."""
        states = self._chooser.bound(self._table)
        return states, None if states is None else self._automata.span(states)

    def _by_graph(self, tokens: Array) -> Tensor | RaggedLogits | Candidates:
        """The step as one CUDA graph, its choice in it where that can be; without a graph where there can be none."""
        model: Any = self._states.only_model
        if model is None:
            self._states.note_chosen_after("the states of several models run beside each other")
            return self._logits(tokens)
        weight: Tensor = model.output_weight
        _, span = self._allowed()
        self._check_ids(weight.shape[0])
        choice = self._chooser.whole(self._table, self._configs, self._alive(), span, weight)
        ending = LogitsEnding(span) if isinstance(choice, str) else choice
        results = self._states.replay(tokens, ending)
        if results is None:
            return self._logits(tokens)
        if isinstance(choice, str):
            self._states.note_chosen_after(choice)
        else:
            try:
                return choice.read(results[0], len(results[-1]))
            except InvalidLogitsError as error:
                self._fail(error)
        logits = choosable(results[-1][: len(tokens)])
        return logits if span is None else of_range(logits, span, weight.shape[0])

    def _check_ids(self, vocabulary: int) -> None:
        """A request that forbids ids beyond the vocabulary fails alone."""
        for one in self._unchecked:
            largest = max(forbidden_ids(one.config))
            if largest >= vocabulary:
                one.error = OfakernValueError(
                    f"generate: forbidden ids must be in the vocabulary ({vocabulary}), got {largest}"
                )
        self._unchecked.clear()

    def _alive(self) -> Array:
        """bool [G]: groups of requests without an error."""
        failed = [one.id for one in self._running.values() if one.error is not None]
        groups = self._table.groups["request"]
        return ~np.isin(groups, failed) if failed else np.ones(len(groups), np.bool_)

    def _choose(self, logits: Tensor | RaggedLogits) -> Candidates:
        """The candidates; a request whose logits are no numbers fails alone."""
        while True:
            try:
                return self._chooser(logits, self._table, self._configs, self._alive())
            except InvalidLogitsError as error:
                self._fail(error)

    def _fail(self, error: InvalidLogitsError) -> None:
        """The request of that row ends with an error."""
        group = self._table.groups[self._table.group[error.row]]
        step = self._table.clock - int(group["start"])
        failure = OfakernRuntimeError(f"generate: logits must be finite, got NaN at step {step}")
        failure.__cause__ = error
        self._running[int(group["request"])].error = failure

    # ------------------------------------------------------------------------------------------------ its results

    def _continue(self, candidates: Candidates) -> None:
        """Take the answers that end, and move the best other candidates into the rows."""
        table, eos = self._table, self._special.eos
        groups = table.groups
        self._end(candidates, candidates.ending(groups["width"], eos))
        kept = candidates.continuing(groups["width"], eos)
        dead = np.asarray(~kept.any(1))
        done: Array = dead | self._is_done(candidates, kept)
        for group in np.flatnonzero(done).tolist():
            one = self._running[int(groups["request"][group])]
            one.groups -= 1
            if bool(dead[group]) and one.groups == 0 and not any(one.found) and one.error is None:
                self._give_up(one, group)
        groups_on, column = (kept & ~done[:, None]).nonzero()
        parents = table.offsets[groups_on] + candidates.origins[groups_on, column]
        tokens = candidates.tokens[groups_on, column]
        states = self._advance(parents, tokens)
        chosen = candidates.gains[groups_on, column], candidates.scores[groups_on, column]
        self._states.reorder(parents)
        table.grow(parents, tokens, *chosen, states)

    def _advance(self, parents: Array, tokens: Array) -> Array:
        """int64: the automata's states after `tokens`; a forced prefix does not move them."""
        table, base = self._table, self._chooser.base(self._table)
        states: Array = table.states[parents]
        moving = ((table.steps >= table.groups["prefix"])[table.group] & (base >= 0))[parents]
        if moving.any():
            own = base[parents[moving]]
            states[moving] = self._automata.advance(states[moving] + own, tokens[moving]) - own
        return states

    def _end(self, candidates: Candidates, ends: Array) -> None:
        """Take the answers that end within the best beams, in the order of their scores."""
        table, groups = self._table, self._table.groups
        offsets = table.offsets
        for group, column in zip(*ends.nonzero(), strict=True):
            record = groups[group]
            if record["early"] == EARLY and record["found"] >= record["width"]:
                continue
            row = offsets[group] + candidates.origins[group, column]
            begin = int(record["start"]) + 1
            tokens = (*table.tokens[row, begin:].tolist(), self._special.eos)
            gains = (*table.gains[row, begin:].tolist(), float(candidates.gains[group, column]))
            score = float(candidates.scores[group, column]) / len(tokens) ** float(record["power"])
            found = self._running[int(record["request"])].found[record["number"]]
            found.append(Hypothesis(tokens, score, gains))
            groups["found"][group] += 1
            if len(found) >= record["width"]:
                groups["worst"][group] = sorted((one.score for one in found), reverse=True)[record["width"] - 1]

    def _is_done(self, candidates: Candidates, kept: Array) -> Array:
        """bool [G]: groups that need no more steps."""
        groups = self._table.groups
        enough: Array = groups["found"] >= groups["width"]
        if not enough.any():
            return enough
        length = self._table.steps + 1  # tokens a running beam has after this step
        longest = np.where((groups["early"] == NEVER_EARLY) & (groups["power"] > 0), groups["limit"] + 1, length)
        best = candidates.scores[np.arange(len(groups)), kept.argmax(1)]
        hopeless = best / longest ** groups["power"] <= groups["worst"]
        done: Array = enough & ((groups["early"] == EARLY) | hopeless)
        return done

    def _give_up(self, one: Running, group: int) -> None:
        """Where every continuation is forbidden and nothing ended, what stands so far is the answer."""
        table = self._table
        row = table.offsets[group]
        begin = int(table.groups["start"][group]) + 1
        tokens, gains = table.tokens[row, begin:].tolist(), table.gains[row, begin:].tolist()
        score = float(table.sums[row]) / max(len(tokens), 1) ** one.config.length_penalty
        one.found[table.groups["number"][group]].append(Hypothesis(tuple(tokens), score, tuple(gains)))

    # --------------------------------------------------------------------------------------------------- reporting

    def _streamed(self) -> list[Finished | TokenEvent]:
        """What became certain of the requests that stream."""
        events: list[Finished | TokenEvent] = []
        for one in [one for one in self._running.values() if one.streams and one.groups and one.error is None]:
            events += self._told(one, certain_tokens(one, self._table))
        return events

    def _finished(self, one: Running) -> list[Finished | TokenEvent]:
        events: list[Finished | TokenEvent] = []
        if one.streams and one.error is None:
            events += self._told(one, last_tokens(one))
        answers = [] if one.error is not None else one.answers()
        return [*events, Finished(one.id, answers, one.error)]

    def _told(self, one: Running, events: list[TokenEvent]) -> list[TokenEvent]:
        """The events that `step` returns: those of a request without a callback, which is called here."""
        if one.request.on_token is None:
            return events
        try:
            for event in events:
                one.request.on_token(event)
        except Exception as error:  # the caller's own: it ends this request and reaches the caller with its end
            one.error = error
        return []

    def _leave(self, ids: Sequence[int]) -> None:
        if not ids:
            return
        for id in ids:  # a callback may have cancelled one that has just ended
            self._running.pop(id, None)
            self._configs.pop(id, None)
        rows = np.flatnonzero(~np.isin(self._table.groups["request"], ids)[self._table.group])
        if len(rows) < len(self._table.group):
            self._states.reorder(rows)
            self._table.keep(rows)

    def _forget_automata(self) -> None:
        """So that a session that serves for days keeps only the automata it uses."""
        groups = self._table.groups
        renumbered = self._automata.forget(groups["automaton"])
        if renumbered is not None:
            has = groups["automaton"] >= 0
            groups["automaton"][has] = renumbered[groups["automaton"][has]]
            self._table.version += 1
