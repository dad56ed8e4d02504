"""The searches give the recorded answers of OFASys: the same tokens, scores to 1e-4."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ofakern.checkpoint.golden import load_model
from ofakern.checkpoint.golden_case import Case
from ofakern.generate import ChoiceTokens, GenerationConfig, Hypothesis, compile_target, generate
from ofakern.model import OFAPlus

FOLDER = Path(__file__).resolve().parents[1] / "golden" / "ofasys" / "main"
CASES = ("text2text", "text_b1", "caption", "closed_set", "prefix_decoder_prompt", "grounding_box_out", "asr")
# "yes", "no", "maybe so" in the recorded vocabulary.
ANSWERS = ((269, 110, 5), (269, 176, 170), (142, 110, 214, 238, 170))


def recorded() -> list[tuple[str, str]]:
    found = []
    for case in CASES:
        meta = json.loads((FOLDER / f"{case}.json").read_text())
        found += [(case, name) for name in meta["generation"]]
    return found


@pytest.fixture(scope="module")
def model() -> OFAPlus:
    return load_model(FOLDER)[0]


def answer(model: OFAPlus, case: Case, name: str, **changes: Any) -> list[list[Hypothesis]]:
    entry = case.meta["generation"][name]
    settings = {"no_repeat_ngram_size": 0, "length_penalty": 0.0, "compat": "ofasys"}
    kwargs = {k: v for k, v in entry["kwargs"].items() if k not in ("constraint_trie", "normalize_scores")}
    if entry["kwargs"].get("normalize_scores"):
        del settings["length_penalty"]
    config = GenerationConfig().replace(**{**settings, **kwargs, **changes})
    automaton = None
    if entry["closed_set"]:
        automaton = compile_target([ChoiceTokens(ANSWERS)], eos=2, vocabulary_size=model.config.vocab_size)
    prefix = case.arrays.get(f"gen.{name}.prefix_tokens")
    forced = torch.from_numpy(prefix) if prefix is not None and prefix.shape[1] else None
    with torch.inference_mode():
        memory = model.encode(case.batch(range(case.samples)).source)
    return generate(model, memory, case.samples, config, automaton=automaton, prefix=forced)


@pytest.mark.parametrize(("case_name", "name"), recorded())
def test_answers_are_the_recorded_ones(model: OFAPlus, case_name: str, name: str) -> None:
    case = Case(FOLDER, case_name, model)
    found = answer(model, case, name)
    for expected in case.meta["generation"][name]["outputs"]:
        got = found[expected["b"]][expected["n"]]
        assert list(got.tokens) == expected["tokens"]
        assert got.score == pytest.approx(expected["score"], abs=1e-4)
        key = f"gen.{name}.b{expected['b']}.n{expected['n']}.positional_scores"
        torch.testing.assert_close(
            torch.tensor(got.token_scores), torch.from_numpy(case.arrays[key]), rtol=0, atol=1e-4
        )


def test_prefixes_are_forced_unless_ofasys_is_asked_for(model: OFAPlus) -> None:
    case = Case(FOLDER, "prefix_decoder_prompt", model)
    prefix = case.arrays["gen.beam5.prefix_tokens"].tolist()
    wrong = answer(model, case, "beam5")
    right = answer(model, case, "beam5", compat=None, max_len=6)
    for sample, forced in enumerate(prefix):
        assert list(wrong[sample][0].tokens[: len(forced)]) != forced
        assert all(list(hypothesis.tokens[: len(forced)]) == forced for hypothesis in right[sample])
