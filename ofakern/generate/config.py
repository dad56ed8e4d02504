"""How an answer is searched for: transformers' names, OFASys's names accepted beside them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
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
    "return_n_best": "num_return_sequences",
    "guidance_weight": "guidance",
    "num_inference_steps": "diffusion_steps",
    "max_iter": "max_new_tokens",
    "eos_prob_threshold": "stop_threshold",
}

_INTEGERS = {
    "num_beams": 1,
    "max_new_tokens": 1,
    "min_new_tokens": 0,
    "no_repeat_ngram_size": 0,
    "top_k": 0,
    "num_return_sequences": 1,
    "seed": 0,
    "diffusion_steps": 1,
    "frames": 1,
}


@dataclass(frozen=True)
class GenerationConfig:
    """Search settings. A value that is given is used, 0 and False included; None asks for the default of the slot.

    Attributes:
        num_beams: beams of the search; 1 is greedy. None: 5, or 1 for a closed set.
        max_new_tokens: most tokens after the forced prefix, the end of sequence not counted. A closed set or a box
            ends by itself and is never cut.
        min_new_tokens: the end of sequence is not allowed before this many tokens.
        length_penalty: n-best are ranked by sum of log-probabilities / tokens ** length_penalty; 0 is the plain sum.
        no_repeat_ngram_size: no n-gram of free text is generated twice; 0 allows it. None: 3 when beams are searched.
        temperature: logits are divided by it.
        do_sample: draw `num_return_sequences` answers instead of searching, from the `top_k` best tokens (0: all)
            that hold `top_p` of the probability, with the seed `seed`.
        num_return_sequences: answers per sample, best first; at most num_beams unless sampling.
        early_stopping: True: a sample is done with its num_beams-th finished answer (fairseq, OFASys). False: it goes
            on until no running beam can still beat the worst of them.
        stop_threshold: written speech ends with the first step whose stop probability exceeds it.
        unk_penalty: subtracted from the log-probability of the unknown token.
        diffusion_steps: denoising steps of a motion. sampler: "ddim" (nothing random after the first noise) or "ddpm".
        guidance: w of (1 + w) * prediction - w * prediction for empty text; 0 is off.
        frames: of a generated motion. None: the slot's `max_length`, else 120.
        compat: "ofasys": forced prefixes and free text exactly as OFASys treats them (see `search`).
    """

    num_beams: int | None = None
    max_new_tokens: int = 256
    min_new_tokens: int = 0
    length_penalty: float = 1.0
    no_repeat_ngram_size: int | None = None
    temperature: float = 1.0
    do_sample: bool = False
    top_k: int = 0
    top_p: float = 1.0
    num_return_sequences: int = 1
    early_stopping: bool = True
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
        if not self.temperature > 0:
            raise OfakernValueError(f"{_WHERE}: temperature must be above 0, got {self.temperature!r}")
        if not 0 <= self.stop_threshold <= 1:
            raise OfakernValueError(f"{_WHERE}: stop_threshold must be in [0, 1], got {self.stop_threshold!r}")
        if not 0 < self.top_p <= 1:
            raise OfakernValueError(f"{_WHERE}: top_p must be in (0, 1], got {self.top_p!r}")
        if self.sampler not in ("ddim", "ddpm"):
            raise OfakernValueError(f"{_WHERE}: sampler must be 'ddim' or 'ddpm', got {self.sampler!r}")
        if not self.guidance >= 0:
            raise OfakernValueError(f"{_WHERE}: guidance must not be negative, got {self.guidance!r}")
        if self.compat not in (None, "ofasys"):
            raise OfakernValueError(f"{_WHERE}: compat must be None or 'ofasys', got {self.compat!r}")
        beams = self.num_beams
        if beams is not None and not self.do_sample and self.num_return_sequences > beams:
            raise OfakernValueError(
                f"{_WHERE}: num_return_sequences must be at most num_beams ({beams}), got {self.num_return_sequences}\n"
                f"Try: num_beams={self.num_return_sequences}"
            )

    def replace(self, **kwargs: Any) -> GenerationConfig:
        """A copy with `kwargs` (either family of names) in place; an unknown name raises OfakernTypeError."""
        known = {field.name for field in dataclasses.fields(self)}
        changes: dict[str, Any] = {}
        for given, value in kwargs.items():
            if given == "normalize_scores":  # fairseq's switch for what length_penalty 0 says here
                if not value:
                    changes["length_penalty"] = 0.0
                continue
            name = OFASYS_NAMES.get(given, given)
            if name not in known:
                raise OfakernTypeError(
                    f"{_WHERE}: argument must be one of {', '.join(sorted(known))}, got {given!r}"
                    f"\nTry: OFASys's names work too: {', '.join(sorted(OFASYS_NAMES))}"
                )
            if name in changes:
                raise OfakernTypeError(f"{_WHERE}: {name} must be given once, got it again as {given!r}")
            changes[name] = value
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
