"""A request's settings as the table's records: how many groups of beams, how long, forbidden by what."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ofakern.errors import OfakernValueError
from ofakern.generate.config import GenerationConfig
from ofakern.generate.search.contract import Hypothesis, SearchRequest, SpecialTokens
from ofakern.generate.search.table import EARLY, LATE, NEVER_EARLY, Array, group_type

__all__ = ["Running", "plan_request"]


@dataclass
class Running:
    """A request that is being answered.

    Attributes:
        config: its settings, none of them None. groups: those that still run.
        found: each group's answers. sent: of each sequence, the tokens that were streamed.
    """

    id: int
    request: SearchRequest
    config: GenerationConfig
    records: Array
    prefix: Array
    groups: int = 0
    found: list[list[Hypothesis]] = field(default_factory=list)
    sent: list[int] = field(default_factory=list)
    error: Exception | None = None

    @property
    def streams(self) -> bool:
        return self.request.stream or self.request.on_token is not None

    def answers(self) -> list[Hypothesis]:
        """The best ones, best first; equal scores in the order in which they were found."""
        found = [answer for group in self.found for answer in group]
        return sorted(found, key=lambda answer: -answer.score)[: self.config.num_return_sequences]


def plan_request(id: int, request: SearchRequest, special: SpecialTokens) -> Running:
    """OfakernValueError when the answer cannot fit into the decoder's positions."""
    automaton = request.automaton
    config = request.config.resolved(closed=automaton is not None and bool(automaton.renormalise[automaton.start]))
    prefix = np.array([token for token in request.prefix if token != special.pad], np.int32)
    assert config.num_beams is not None  # resolved() leaves no None
    if config.do_sample:
        count, width = config.num_return_sequences, 1
    else:
        count, width = config.num_beam_groups, config.num_beams // config.num_beam_groups
    records = np.zeros(count, group_type)
    for name, value in _settings(config, request, len(prefix)).items():
        records[name] = value
    records["request"], records["number"], records["width"] = id, np.arange(count), width
    records["level"] = 0 if config.do_sample else np.arange(count)
    return Running(id, request, config, records, prefix, count, [[] for _ in range(count)], [0] * count)


def _settings(config: GenerationConfig, request: SearchRequest, prefix: int) -> dict[str, Any]:
    ofasys = config.compat == "ofasys"
    early = {True: EARLY, False: LATE, "never": NEVER_EARLY}[config.early_stopping]
    return {
        "sampled": config.do_sample,
        "early": EARLY if config.num_beams == 1 or config.do_sample else early,
        "worst": -np.inf,
        "power": config.length_penalty,
        "prefix": prefix,
        "limit": _limit(config, request, prefix),
        "bounded": request.automaton is not None and request.automaton.longest is not None,
        "earliest": config.min_new_tokens + (0 if ofasys else prefix),
        # fairseq, and so OFASys, count the start token among the n-grams: it matters where `<s>` is generated.
        "counted": 0 if ofasys else 1 + prefix,
        "automaton": -1,
        "ofasys": ofasys,
        "restricted": bool(config.suppress_tokens or config.begin_suppress_tokens or config.bad_words_ids),
        "ngram": config.no_repeat_ngram_size,
        "repetition": config.repetition_penalty,
        "unk": config.unk_penalty,
        "temperature": config.temperature,
        "diversity": config.diversity_penalty,
        "seed": config.seed,
        "top_k": config.top_k,
        "top_p": config.top_p,
        "typical_p": config.typical_p,
        "min_p": config.min_p,
    }


def _limit(config: GenerationConfig, request: SearchRequest, prefix: int) -> int:
    """The step at which the end of sequence is forced: the most tokens before it."""
    longest = None if request.automaton is None else request.automaton.longest
    needed = prefix + (longest or 0)
    if longest is None:  # OFASys counts the forced prefix as part of the length
        limit = config.max_new_tokens + (0 if config.compat == "ofasys" else prefix)
    else:
        limit = needed
    if request.max_positions is None:
        return limit
    if needed > request.max_positions - 1:
        raise OfakernValueError(
            "generate: forced and fixed target tokens must fit the decoder's positions "
            f"({request.max_positions - 1}), got {needed}"
        )
    return min(limit, request.max_positions - 1)
