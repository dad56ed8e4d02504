"""The oracle of `beam_step` and `sample_step` in plain torch: whole rows, no shortcuts. Imports nothing of ours.

Softmax and probabilities are float64; a log-probability is rounded to float32 once, sums of them are float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ofakern.ops.beam_step.rules import AutomatonTables, RaggedLogits, StepRules

NEVER = float("-inf")


class InvalidRow(RuntimeError):
    """Logits or sums of a live row that are no numbers."""

    def __init__(self, name: str, row: int) -> None:
        super().__init__(f"{name} must be finite or -inf, and not all -inf, got NaN or infinity in row {row}")
        self.name, self.row = name, row


def beam_step_reference(
    logits: Tensor | RaggedLogits, sums: Tensor, row_offsets: Tensor, width: int, rules: StepRules
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """scores, origins, tokens, log_probs `[B,width]`; see `BeamCandidates`. InvalidRow: a live row is no numbers."""
    live = sums != NEVER if rules.live is None else rules.live & (sums != NEVER)
    row = torch.arange(len(sums), device=sums.device)
    live &= (row >= row_offsets[0]) & (row < row_offsets[-1])
    log_probs = step_log_probs(logits, rules, live)
    _refuse(live & ~torch.isfinite(sums), "sums")
    batch, vocabulary = len(row_offsets) - 1, log_probs.shape[1]
    scores, own = sums.new_full((batch, width), NEVER), sums.new_full((batch, width), NEVER)
    origins = sums.new_zeros((batch, width), dtype=torch.int32)
    tokens = sums.new_full((batch, width), -1, dtype=torch.int32)
    for sample in range(batch):
        rows = slice(int(row_offsets[sample]), int(row_offsets[sample + 1]))
        flat = (log_probs[rows] + sums[rows, None]).flatten()
        # A stable sort leaves equal scores in the order of rows, then tokens.
        places = flat.sort(descending=True, stable=True).indices[:width]
        places = places[flat[places] > NEVER]
        found = len(places)
        scores[sample, :found] = flat[places]
        origins[sample, :found] = (places // vocabulary).int()
        tokens[sample, :found] = (places % vocabulary).int()
        own[sample, :found] = log_probs[rows].flatten()[places]
    return scores, origins, tokens, own


def sample_step_reference(
    logits: Tensor | RaggedLogits,
    uniforms: Tensor,
    rules: StepRules,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    typical_p: Tensor | None = None,
    min_p: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A token int32 `[R]` of each row and its log-probability float32 `[R]` before the filters; or -1, -inf."""
    rows = len(uniforms)
    live = uniforms.new_ones(rows, dtype=torch.bool) if rules.live is None else rules.live
    log_probs = step_log_probs(logits, rules, live)
    tokens = uniforms.new_full((rows,), -1, dtype=torch.int32)
    own = uniforms.new_full((rows,), NEVER)
    for row in range(rows):
        kept = kept_tokens(
            log_probs[row],
            0 if top_k is None else int(top_k[row]),
            1.0 if top_p is None else float(top_p[row]),
            1.0 if typical_p is None else float(typical_p[row]),
            0.0 if min_p is None else float(min_p[row]),
        )
        if len(kept):
            cumulative = _weights(log_probs[row, kept]).cumsum(0)
            above = (cumulative > float(uniforms[row]) * cumulative[-1]).nonzero()
            tokens[row] = kept[int(above[0])]
            own[row] = log_probs[row, tokens[row]]
    return tokens, own


def kept_tokens(log_probs: Tensor, top_k: int, top_p: float, typical_p: float, min_p: float) -> Tensor:
    """int64, ascending: what the filters leave of a row `[V]`, each taken over what the one before has left.

    top_k: the k most probable (0: all). top_p: the most probable whose predecessors hold less than top_p. min_p: those
    at least min_p times as probable as the best. typical_p: those whose surprise is nearest to the entropy, as top_p.
    Equal ones: smaller token first.
    """
    kept = log_probs.sort(descending=True, stable=True).indices
    kept = kept[log_probs[kept] > NEVER]
    if top_k > 0:
        kept = kept[:top_k]
    if top_p < 1:
        kept = _nucleus(kept, log_probs, top_p)
    weights = _weights(log_probs[kept])
    if min_p > 0:
        kept, weights = kept[weights >= min_p], weights[weights >= min_p]
    kept = kept.sort().values
    if typical_p < 1 and len(kept):
        own, weights = log_probs[kept].double(), _weights(log_probs[kept])
        centre = (weights * own).sum() / weights.sum()  # log-probability of a token whose surprise is the entropy
        distance = (own - centre).abs().float()
        kept = _nucleus(kept[distance.sort(stable=True).indices], log_probs, typical_p).sort().values
    return kept


def _nucleus(ordered: Tensor, log_probs: Tensor, mass: float) -> Tensor:
    weights = _weights(log_probs[ordered])
    before = torch.cat((weights.new_zeros(1), weights.cumsum(0)[:-1]))
    inside = before[: len(ordered)] < mass * weights.sum()
    inside[:1] = True
    return ordered[inside]


def _weights(log_probs: Tensor) -> Tensor:
    """float64 probabilities in proportion: the best has 1."""
    return log_probs.sub(log_probs.max()).double().exp() if len(log_probs) else log_probs.double()


def step_log_probs(logits: Tensor | RaggedLogits, rules: StepRules, live: Tensor) -> Tensor:
    """float32 `[R,V]` log-probabilities after the rules; -inf where a token may not follow and in rows not `live`."""
    x, given = _dense(logits)
    rows, vocabulary = x.shape
    allowed = given.clone()
    _constrain(allowed, rules)
    forced = live.new_full((rows,), -1, dtype=torch.int64) if rules.forced is None else rules.forced.long()
    is_forced = torch.arange(vocabulary, device=x.device) == forced[:, None]
    within = allowed | is_forced
    if rules.states is not None and rules.tables is not None:
        within |= ((rules.states < 0) | ~rules.tables.renormalise[rules.states.long()])[:, None]
    within &= given
    _penalise_repetition(x, rules)
    if rules.temperature is not None:
        x = x * (1.0 / rules.temperature)[:, None]
    log_probs = torch.log_softmax(x.double().masked_fill(~within, NEVER), 1).float()
    log_probs[~live | ~within.any(1)] = NEVER
    _refuse(log_probs.isnan().any(1), "logits")
    if 0 <= rules.pad < vocabulary:
        log_probs[:, rules.pad] = NEVER
    if rules.unk_penalty is not None and 0 <= rules.unk < vocabulary:
        log_probs[:, rules.unk] -= rules.unk_penalty
    alone = torch.where(is_forced, log_probs, NEVER)
    log_probs = log_probs.masked_fill(~allowed, NEVER)
    _ban(log_probs, rules)
    _adjust(log_probs, rules)
    return torch.where((forced >= 0)[:, None], alone, log_probs)


def _refuse(bad: Tensor, name: str) -> None:
    if bool(bad.any()):
        raise InvalidRow(name, int(bad.nonzero()[0]))


def _dense(logits: Tensor | RaggedLogits) -> tuple[Tensor, Tensor]:
    """float32 `[R,V]` that may be written, and bool: where a logit is given at all."""
    if isinstance(logits, Tensor):
        x = logits.to(torch.float32, copy=True)
        return x, torch.ones_like(x, dtype=torch.bool)
    row = torch.repeat_interleave(logits.first.long().diff())
    x = torch.zeros(len(logits.first) - 1, logits.vocabulary, device=logits.values.device)
    given = torch.zeros_like(x, dtype=torch.bool)
    x[row, logits.tokens.long()] = logits.values.float()
    given[row, logits.tokens.long()] = True
    return x, given


def _constrain(allowed: Tensor, rules: StepRules) -> None:
    """Clears, in place, what the automaton does not allow."""
    if rules.states is None or rules.tables is None:
        return
    for row, state in enumerate(rules.states.tolist()):
        if state >= 0:
            allowed[row] &= _of_state(rules.tables, state, torch.zeros_like(allowed[row]))


def _of_state(tables: AutomatonTables, state: int, allowed: Tensor) -> Tensor:
    allowed[tables.tokens[tables.first[state] : tables.first[state + 1]].long()] = True
    for lo, hi, _ in tables.ranges[tables.range_first[state] : tables.range_first[state + 1]].tolist():
        allowed[lo:hi] = True
    return allowed


def _counted(rules: StepRules, row: int) -> list[int]:
    """The tokens of a row's history that count, from `counted_from` on."""
    assert rules.history is not None
    begin = 0 if rules.counted_from is None else max(int(rules.counted_from[row]), 0)
    tokens: list[int] = rules.history[row, begin:].tolist()
    return tokens


def _penalise_repetition(x: Tensor, rules: StepRules) -> None:
    if rules.repetition_penalty is None:
        return
    for row in range(len(x)):
        seen = torch.tensor(
            sorted({token for token in _counted(rules, row) if 0 <= token < x.shape[1]}), device=x.device
        ).long()
        value, penalty = x[row, seen], rules.repetition_penalty[row]
        x[row, seen] = torch.where(value > 0, value / penalty, value * penalty)


def _ban(log_probs: Tensor, rules: StepRules) -> None:
    """The end of sequence before the least length, and tokens that would repeat an n-gram; in free states."""
    rows, vocabulary = log_probs.shape
    for row in range(rows):
        if rules.states is not None and rules.tables is not None and rules.states[row] >= 0:
            if not rules.tables.free[rules.states[row]]:
                continue
        if rules.no_eos is not None and bool(rules.no_eos[row]) and 0 <= rules.eos < vocabulary:
            log_probs[row, rules.eos] = NEVER
        size = 0 if rules.ngram is None else int(rules.ngram[row])
        if size > 0:
            tokens = _counted(rules, row)
            tail = tokens[len(tokens) - size + 1 :]
            for begin in range(len(tokens) - size + 1):
                last = tokens[begin + size - 1]
                if tokens[begin : begin + size - 1] == tail and 0 <= last < vocabulary:
                    log_probs[row, last] = NEVER


def _adjust(log_probs: Tensor, rules: StepRules) -> None:
    if rules.adjust_first is None or rules.adjust_tokens is None or rules.adjust_values is None:
        return
    for row in range(len(log_probs)):
        for entry in range(int(rules.adjust_first[row]), int(rules.adjust_first[row + 1])):
            if 0 <= rules.adjust_tokens[entry] < log_probs.shape[1]:
                log_probs[row, rules.adjust_tokens[entry]] += rules.adjust_values[entry]
