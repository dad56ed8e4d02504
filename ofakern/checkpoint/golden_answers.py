"""The recorded searches of OFASys cases: the same tokens, scores to 1e-4."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ofakern.checkpoint.golden import read_json
from ofakern.checkpoint.golden_case import Case
from ofakern.checkpoint.parity import Check, compare
from ofakern.errors import DataError
from ofakern.generate import ChoiceTokens, GenerationConfig, Hypothesis, compile_target, generate
from ofakern.model import DecodeState, OFAPlus, SegmentWriter
from ofakern.text import Tokenizer, Vocabulary

SPECIALS = 4
EOS = 2


class Cut(SegmentWriter):
    """With a range, only specials and ids in [lo, hi) are written; an end at `free_end` tokens costs nothing."""

    def __init__(
        self,
        model: OFAPlus,
        adaptor: str,
        modality: int,
        ids: tuple[int, int] | None = None,
        free_end: int | None = None,
    ) -> None:
        super().__init__(model, adaptor, modality)
        self._ids, self._free_end = ids, free_end

    def decode_step(self, state: DecodeState, tokens: Tensor) -> Tensor:
        last = state.length == self._free_end
        logits = super().decode_step(state, tokens)
        if self._ids is not None:
            logits[:, SPECIALS : self._ids[0]] = -torch.inf
            logits[:, self._ids[1] :] = -torch.inf
        if last:
            end = logits[:, EOS].clone()
            logits.fill_(-torch.inf)
            logits[:, EOS] = end
        return logits


def id_range(text: str | None) -> tuple[int, int] | None:
    """`lo,hi` or `(lo,hi)` as two numbers."""
    if text is None:
        return None
    lo, hi = text.strip("()").split(",")
    return int(lo), int(hi)


def answer_checks(model: OFAPlus, case: Case, directory: Path) -> list[Check]:
    """Every recorded search of a case."""
    checks = []
    for name, entry in (case.meta.get("generation") or {}).items():
        found = recorded_search(model, case, directory, name, entry)
        for expected in entry["outputs"]:
            b, n = expected["b"], expected["n"]
            got, label = found[b][n], f"{name} {b}.{n}"
            checks.append(compare("answers", f"{label} tokens", np.array(got.tokens), np.array(expected["tokens"])))
            checks.append(compare("answers", f"{label} score", np.array(got.score), np.array(expected["score"])))
            key = f"gen.{name}.b{b}.n{n}.positional_scores"
            steps = np.array(got.token_scores)
            checks.append(compare("answers", f"{label} token scores", steps, case.arrays[key], floor=1e-4))
    return checks


def recorded_search(
    model: OFAPlus, case: Case, directory: Path, name: str, entry: Mapping[str, Any]
) -> list[list[Hypothesis]]:
    """Our search with the settings of a recorded one."""
    kwargs = dict(entry["kwargs"])
    settings: dict[str, Any] = {"no_repeat_ngram_size": 0, "length_penalty": 0.0, "compat": "ofasys"}
    if kwargs.pop("normalize_scores", False):
        del settings["length_penalty"]
    ids = id_range(kwargs.pop("constraint_range", None))
    kwargs.pop("constraint_trie", None)
    automaton = None
    if entry["closed_set"]:
        tokenizer = _tokenizer(directory)
        choices = ChoiceTokens(tuple(tuple(tokenizer.encode(text)) for text in entry["closed_set"]))
        automaton = compile_target([choices], eos=EOS, vocabulary_size=model.config.vocab_size)
    prefix = case.arrays.get(f"gen.{name}.prefix_tokens")
    forced = torch.from_numpy(prefix) if prefix is not None and prefix.shape[1] else None
    writer = Cut(model, case.target.adaptor, int(case.target.modality), ids)
    with torch.inference_mode():
        memory = model.encode(case.batch(range(case.samples)).source)
    config = GenerationConfig().replace(**{**settings, **kwargs})
    return generate(writer, memory, case.samples, config, automaton=automaton, prefix=forced)


def _tokenizer(directory: Path) -> Tokenizer:
    resources = directory / "resources"
    if not resources.is_dir():
        raise DataError(f"parity: a case with a closed set must have its BPE in {resources}, got none")
    vocabulary = Vocabulary(read_json(directory / "dictionary.json")["symbols"])
    names = ("bpe_encoder.json", "bpe_vocab.bpe", "bpe_dict.txt")
    return Tokenizer.from_files(*(resources / name for name in names), vocabulary=vocabulary)
