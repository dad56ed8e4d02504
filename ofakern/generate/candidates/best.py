"""Scores of all candidates, and the best of them as answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ofakern.errors import OfakernValueError
from ofakern.generate.automaton import ChoiceTokens, TokenAutomaton, compile_target
from ofakern.generate.candidates.numbering import CandidateSet, Numbers
from ofakern.generate.candidates.scoring import CandidateScorer, Floats
from ofakern.generate.config import GenerationConfig
from ofakern.generate.search import Hypothesis, SpecialTokens

#: Rows of a decoding step: enough for whole matrix products, few enough to hold their keys and values.
MAX_ROWS = 1024


@torch.inference_mode()
def score_candidates(
    model: Any,
    memory: Any,
    batch_size: int,
    candidates: TokenAutomaton | Sequence[Sequence[int]],
    *,
    prefix: Tensor | None = None,
    special: SpecialTokens | None = None,
    max_positions: int | None = None,
    temperature: float = 1.0,
    max_rows: int = MAX_ROWS,
) -> Tensor:
    """The log-probability of every candidate for every sample, each taken over the candidates that share its prefix.

    That is OFA's all-candidate evaluation. A prefix that candidates share is decoded once, and only while there is
    something to choose behind it; only the output rows of tokens that may follow are computed.

    Args:
        model: `begin_decode` and `decode_step`; with `decode_hidden`, `step_logits` and `output_weight` it is faster.
        memory: what `model.encode` returned for these samples.
        candidates: token sequences without start and end tokens, or the automaton of a target that is made of closed
            sets and fixed text (whose tokens are scored over the whole vocabulary).
        prefix: int64 [B, P] forced first tokens, padded with `special.pad` behind; they are not counted.
        max_positions: most tokens the decoder takes, start token included.
        max_rows: of one step; more are taken one part after the other.

    Returns:
        float32 [B, C] on the CPU, in the order of the sequences; for an automaton in that of its `CandidateSet`.

    Raises:
        OfakernValueError: a target with free text, ranges or repeated groups, or one that does not fit the positions.
        OfakernRuntimeError: logits that are no numbers.
    """
    special = special or SpecialTokens()
    columns = None
    if not isinstance(candidates, TokenAutomaton):
        sequences = [tuple(map(int, sequence)) for sequence in candidates]
        automaton = _automaton_of(sequences, model, special.eos)
        found = CandidateSet(automaton)
        columns = [found.number((*sequence, special.eos)) for sequence in sequences]
    else:
        found = CandidateSet(candidates)
    scorer = CandidateScorer(
        model,
        memory,
        batch_size,
        found,
        prefix=prefix,
        special=special,
        max_positions=max_positions,
        temperature=temperature,
        max_rows=max_rows,
        keep_records=False,
    )
    scorer.run()
    scores = torch.from_numpy(scorer.scores)
    return scores if columns is None else scores[:, columns]


def _automaton_of(sequences: Sequence[tuple[int, ...]], model: Any, eos: int) -> TokenAutomaton:
    weight = getattr(model, "output_weight", None)
    highest = max((max(sequence, default=0) for sequence in sequences), default=0)
    size = max(highest, eos) + 1 if weight is None else weight.shape[0]
    return compile_target([ChoiceTokens(tuple(sequences))], eos=eos, vocabulary_size=size)


@torch.inference_mode()
def best_candidates(
    model: Any,
    memory: Any,
    batch_size: int,
    config: GenerationConfig,
    *,
    automaton: TokenAutomaton | None,
    prefix: Tensor | None = None,
    special: SpecialTokens | None = None,
    max_positions: int | None = None,
) -> list[list[Hypothesis]]:
    """For each sample the `config.num_return_sequences` best of all targets: what a search with as many beams finds.

    Scores are those of `generate`, the forced prefix and `length_penalty` included (0 is OFA's evaluation); equal ones
    stand in the order of their tokens. Raises as `score_candidates` does.
    """
    if automaton is None:
        raise OfakernValueError("generation: all_candidates must have a target of closed sets, got none")
    special = special or SpecialTokens()
    found = CandidateSet(automaton)
    scorer = CandidateScorer(
        model,
        memory,
        batch_size,
        found,
        prefix=prefix,
        special=special,
        max_positions=max_positions,
        temperature=config.temperature,
        max_rows=MAX_ROWS,
        keep_records=True,
    )
    before, gains = scorer.run()
    forced = [] if prefix is None else [[t for t in row if t != special.pad] for row in prefix.tolist()]
    answers = []
    for sample in range(batch_size):
        head = tuple(forced[sample]) if forced else ()
        head_scores = tuple(scorer.prefix_scores[sample, : len(head)].tolist())
        lengths = scorer.lengths + len(head)
        totals = scorer.scores[sample] + np.float32(sum(head_scores))
        ranked = (totals / lengths.astype(np.float64) ** config.length_penalty).astype(np.float32)
        answers.append(
            [
                Hypothesis(
                    (*head, *found.sequence(number)),
                    float(ranked[number]),
                    (*head_scores, *_gains(scorer.last[sample, number], before, gains, int(scorer.lengths[number]))),
                )
                for number in _best(ranked, config.num_return_sequences)
            ]
        )
    return answers


def _best(scores: Floats, count: int) -> list[int]:
    """The numbers of the best `count` scores, best first; of equal ones the smaller number."""
    count = min(count, len(scores))
    least = np.partition(scores, len(scores) - count)[len(scores) - count]
    enough = np.flatnonzero(scores >= least)
    ranked: list[int] = enough[(-scores[enough]).argsort(kind="stable")][:count].tolist()
    return ranked


def _gains(record: int, before: Numbers, gains: Floats, length: int) -> tuple[float, ...]:
    """Each token's log-probability; 0 for those behind the last record."""
    found: list[float] = []
    while record >= 0:
        found.append(float(gains[record]))
        record = int(before[record])
    return (*reversed(found), *[0.0] * (length - len(found)))
