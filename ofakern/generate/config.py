"""How an answer is searched for: transformers' names, OFASys's names accepted beside them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ofakern.errors import OfakernTypeError, OfakernValueError

_WHERE = "generation"

#: OFASys's (and fairseq's) argument names and what they are called here.
OFASYS_NAMES: Mapping[str, str] = {
    "beam": "num_beams",
    "beam_size": "num_beams",
    "max_len": "max_new_tokens",
    "min_len": "min_new_tokens",
    "lenpen": "length_penalty",
    "len_penalty": "length_penalty",
    "sampling": "do_sample",
    "sampling_topk": "top_k",
    "sampling_topp": "top_p",
    "diverse_beam_groups": "num_beam_groups",
    "diverse_beam_strength": "diversity_penalty",
    "unkpen": "unk_penalty",
    "return_n_best": "num_return_sequences",
    "guidance_weight": "guidance",
    "num_inference_steps": "diffusion_steps",
    "max_iter": "max_new_tokens",
    "eos_prob_threshold": "stop_threshold",
}

#: fairseq writes "off" as -1 where transformers and this library have another value.
_FAIRSEQ_OFF: Mapping[str, Any] = {
    "sampling_topk": 0,
    "sampling_topp": 1.0,
    "diverse_beam_groups": 1,
    "diverse_beam_strength": 0.0,
}

#: What transformers also calls a length, counting the start token and the end, which nothing here does.
_NEAR_NAMES: Mapping[str, str] = {
    "max_length": "max_new_tokens, which counts neither the start token nor the end",
    "min_length": "min_new_tokens, which counts neither the start token nor the end",
}

_INTEGERS = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "max_new_tokens": 1,
    "min_new_tokens": 0,
    "no_repeat_ngram_size": 0,
    "top_k": 0,
    "num_return_sequences": 1,
    "seed": 0,
    "diffusion_steps": 1,
    "frames": 1,
}

# What would change an answer's score, and does not when all candidates are scored.
_OF_A_SEARCH = {
    "do_sample",
    "num_beam_groups",
    "repetition_penalty",
    "suppress_tokens",
    "begin_suppress_tokens",
    "bad_words_ids",
    "unk_penalty",
}

# Of real numbers: how the rule reads, and whether a value keeps it.
_REALS: Mapping[str, tuple[str, Callable[[float], bool]]] = {
    "length_penalty": ("be finite", math.isfinite),
    "unk_penalty": ("be a number", lambda x: not math.isnan(x)),
    "temperature": ("be above 0", lambda x: 0 < x < math.inf),
    "repetition_penalty": ("be above 0", lambda x: 0 < x < math.inf),
    "diversity_penalty": ("not be negative", lambda x: 0 <= x < math.inf),
    "top_p": ("be in (0, 1]", lambda x: 0 < x <= 1),
    "typical_p": ("be in (0, 1]", lambda x: 0 < x <= 1),
    "min_p": ("be in [0, 1]", lambda x: 0 <= x <= 1),
    "stop_threshold": ("be in [0, 1]", lambda x: 0 <= x <= 1),
    "guidance": ("not be negative", lambda x: x >= 0),
}


@dataclass(frozen=True)
class GenerationConfig:
    """Search settings. A value that is given is used, 0 and False included; None asks for the default of the slot.

    docs/GENERATION.md has them with examples.

    Attributes:
        num_beams: beams of the search; 1 is greedy. None: 5, or 1 for a closed set.
        num_beam_groups, diversity_penalty: diverse beam search: that many groups of beams, one after the other in each
            step; `diversity_penalty` is taken from a token's log-probability for every beam of an earlier group that
            has just taken it.
        max_new_tokens: most tokens after the forced prefix, the end of sequence not counted. A closed set or a box
            ends by itself and is never cut.
        min_new_tokens: the end of sequence is not allowed before this many tokens.
        length_penalty: n-best are ranked by sum of log-probabilities / tokens ** length_penalty; 0 is the plain sum.
        no_repeat_ngram_size: no n-gram of free text is generated twice; 0 allows it. None: 3 when beams are searched.
        repetition_penalty: above 1 makes tokens that were generated already less likely, by Keskar et al.'s rule.
        suppress_tokens, begin_suppress_tokens: ids that are never generated, or not as the first token.
        bad_words_ids: sequences of ids that are never generated.
        temperature: logits are divided by it.
        do_sample: draw `num_return_sequences` answers instead of searching, from the `top_k` best tokens (0: all)
            that hold `top_p` of the probability, have at least `min_p` times the best one's and are the `typical_p`
            most typical (Meister et al.).
        seed: of the draws. A draw is a function of seed, number of the answer and step, not of the batch.
        num_return_sequences: answers per sample, best first; at most num_beams unless sampling or all_candidates.
        all_candidates: score every answer of a closed set instead of searching for the best (OFA's all-candidate
            evaluation; with `length_penalty` 0 exactly that). Beams play no role; only `temperature` and
            `length_penalty` change a score.
        early_stopping: True: a sample is done with its num_beams-th finished answer (fairseq, OFASys). False: it goes
            on while the best running beam's score, at its present length, beats the worst of them (transformers'
            heuristic). "never": until no running beam of any length can beat it.
        stop_threshold: written speech ends with the first step whose stop probability exceeds it.
        unk_penalty: subtracted from the log-probability of the unknown token.
        diffusion_steps: denoising steps of a motion. sampler: "ddim" (nothing random after the first noise) or "ddpm".
        guidance: w of (1 + w) * prediction - w * prediction for empty text; 0 is off.
        frames: of a generated motion. None: the slot's `max_length`, else 120.
        compat: "ofasys": forced prefixes and free text exactly as OFASys treats them (see `scoring`).
    """

    num_beams: int | None = None
    num_beam_groups: int = 1
    diversity_penalty: float = 0.0
    max_new_tokens: int = 256
    min_new_tokens: int = 0
    length_penalty: float = 1.0
    no_repeat_ngram_size: int | None = None
    repetition_penalty: float = 1.0
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    temperature: float = 1.0
    do_sample: bool = False
    top_k: int = 0
    top_p: float = 1.0
    typical_p: float = 1.0
    min_p: float = 0.0
    num_return_sequences: int = 1
    all_candidates: bool = False
    early_stopping: bool | Literal["never"] = True
    unk_penalty: float = 0.0
    stop_threshold: float = 0.5
    seed: int = 0
    diffusion_steps: int = 50
    sampler: Literal["ddim", "ddpm"] = "ddim"
    guidance: float = 0.0
    frames: int | None = None
    compat: str | None = None

    def __post_init__(self) -> None:
        for name, least in _INTEGERS.items():
            value = getattr(self, name)
            if value is None and name in ("num_beams", "no_repeat_ngram_size", "frames"):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise OfakernValueError(f"{_WHERE}: {name} must be an integer of at least {least}, got {value!r}")
        for name, (rule, kept) in _REALS.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not kept(value):
                raise OfakernValueError(f"{_WHERE}: {name} must {rule}, got {value!r}")
        for name in ("suppress_tokens", "begin_suppress_tokens"):
            object.__setattr__(self, name, _ids(name, getattr(self, name)))
        self._check_bad_words()
        if self.early_stopping not in (True, False, "never"):
            raise OfakernValueError(
                f"{_WHERE}: early_stopping must be True, False or 'never', got {self.early_stopping!r}"
            )
        if self.sampler not in ("ddim", "ddpm"):
            raise OfakernValueError(f"{_WHERE}: sampler must be 'ddim' or 'ddpm', got {self.sampler!r}")
        if self.compat not in (None, "ofasys"):
            raise OfakernValueError(f"{_WHERE}: compat must be None or 'ofasys', got {self.compat!r}")
        self._check_beams()
        if self.all_candidates:
            self._check_all_candidates()

    def _check_all_candidates(self) -> None:
        for field in dataclasses.fields(self):
            if field.name in _OF_A_SEARCH and getattr(self, field.name) != field.default:
                raise OfakernValueError(
                    f"{_WHERE}: {field.name} must be {field.default!r} with all_candidates, "
                    f"got {getattr(self, field.name)!r}"
                )

    def _check_bad_words(self) -> None:
        words = self.bad_words_ids
        if isinstance(words, (str, int)) or not all(isinstance(word, (list, tuple)) and word for word in words):
            raise OfakernValueError(f"{_WHERE}: bad_words_ids must be sequences of ids, got {words!r}")
        object.__setattr__(self, "bad_words_ids", tuple(_ids("bad_words_ids", word) for word in words))

    def _check_beams(self) -> None:
        beams, groups = self.num_beams, self.num_beam_groups
        if beams is not None and not self.do_sample and not self.all_candidates and self.num_return_sequences > beams:
            raise OfakernValueError(
                f"{_WHERE}: num_return_sequences must be at most num_beams ({beams}), got {self.num_return_sequences}\n"
                f"Try: num_beams={self.num_return_sequences}"
            )
        if groups == 1:
            if self.diversity_penalty:
                raise OfakernValueError(
                    f"{_WHERE}: num_beam_groups must be above 1 for a diversity_penalty, got 1\n"
                    f"Try: num_beam_groups={beams or 5}"
                )
            return
        if self.do_sample or self.compat:
            kind = "do_sample" if self.do_sample else f"compat={self.compat!r}"
            raise OfakernValueError(f"{_WHERE}: num_beam_groups must be 1 with {kind}, got {groups}")
        if beams is None or beams % groups:
            raise OfakernValueError(
                f"{_WHERE}: num_beams must be a multiple of num_beam_groups ({groups}), got {beams}\n"
                f"Try: num_beams={groups * max(1, round((beams or groups) / groups))}"
            )
        if not self.diversity_penalty > 0:
            raise OfakernValueError(
                f"{_WHERE}: diversity_penalty must be above 0 for groups to differ, got {self.diversity_penalty!r}"
            )

    def replace(self, **kwargs: Any) -> GenerationConfig:
        """A copy with `kwargs` (either family of names) in place; None, as transformers writes "off", is the default.

        An unknown name raises OfakernTypeError.
        """
        known = {field.name: field.default for field in dataclasses.fields(self)}
        changes: dict[str, Any] = {}
        for given, value in kwargs.items():
            if given == "normalize_scores":  # fairseq's switch for what length_penalty 0 says here
                if not value:
                    changes["length_penalty"] = 0.0
                continue
            name = OFASYS_NAMES.get(given, given)
            if value == -1 and given in _FAIRSEQ_OFF:
                value = _FAIRSEQ_OFF[given]
            if name not in known:
                hint = f"OFASys's names work too: {', '.join(sorted(OFASYS_NAMES))}"
                raise OfakernTypeError(
                    f"{_WHERE}: argument must be one of {', '.join(sorted(known))}, got {given!r}"
                    f"\nTry: {_NEAR_NAMES.get(given, hint)}"
                )
            if name in changes:
                raise OfakernTypeError(f"{_WHERE}: {name} must be given once, got it again as {given!r}")
            changes[name] = known[name] if value is None else value
        return dataclasses.replace(self, **changes)

    def resolved(self, *, closed: bool) -> GenerationConfig:
        """A copy without None: `closed` says that the target is chosen from a closed set."""
        beams = self.num_beams
        if beams is None:
            beams = max(1 if closed else 5, self.num_return_sequences)
        ngram = self.no_repeat_ngram_size
        if ngram is None:
            ngram = 3 if beams > 1 and not self.do_sample else 0
        return dataclasses.replace(self, num_beams=beams, no_repeat_ngram_size=ngram)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for generation_config.json."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GenerationConfig:
        """The inverse of `to_dict`; unknown names raise OfakernTypeError."""
        return cls().replace(**dict(values))


def _ids(name: str, values: Any) -> tuple[int, ...]:
    """JSON's lists become tuples, so that a configuration stays hashable."""
    if not isinstance(values, (list, tuple)) or not all(type(value) is int and value >= 0 for value in values):
        raise OfakernValueError(f"{_WHERE}: {name} must hold vocabulary ids, got {values!r}")
    return tuple(values)
