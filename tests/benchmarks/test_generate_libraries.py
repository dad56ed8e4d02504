"""`bench generate`: other libraries, where they are installed, decode as many tokens by another model, one for all."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks.core import Unavailable
from benchmarks.model import bench_generate
from benchmarks.model import generate_libraries as libraries

TEXT = replace(bench_generate.CASES["small_96_b2"], image=0, source=24)


@pytest.fixture(scope="module")
def case() -> libraries.Case:
    pytest.importorskip("transformers")
    return libraries.case_of(TEXT, torch.float32)


def test_the_model_has_the_cases_size(case: libraries.Case) -> None:
    config = TEXT.config()
    weights = case.model.model.decoder.layers[0]
    assert len(case.model.model.decoder.layers) == config.decoder_layers
    assert weights.fc1.weight.shape == (config.ffn_dim, config.dim)
    assert case.model.lm_head.weight.shape == (config.vocab_size, config.dim)
    assert case.tokens.shape == (TEXT.batch, TEXT.length) and case.steps == TEXT.tokens + 1


def test_phases_give_one_score(case: libraries.Case) -> None:
    whole = libraries.transformers_peer(case, True)
    assert whole.steps.keys() == {"decode", "whole"} and not whole.exact
    torch.testing.assert_close(whole.steps["decode"](), whole.steps["whole"]())
    assert libraries.transformers_peer(case, False).steps.keys() == {"decode"}


def test_ctranslate2_runs_the_same_model(case: libraries.Case) -> None:
    pytest.importorskip("ctranslate2")
    made: Any = libraries.translate(libraries.translator("ctranslate2", case), case)
    with torch.inference_mode():
        targets = torch.tensor([[int(word[1:]) for word in one.hypotheses[0]] for one in made])
        fed = torch.cat([torch.full((TEXT.batch, 1), libraries.BOS), targets[:, :-1]], 1)
        logits = case.model(input_ids=case.tokens, decoder_input_ids=fed).logits
        logits[:, :, libraries.EOS] = -torch.inf  # CTranslate2 takes its probabilities over what may come
        wanted = logits.log_softmax(2).gather(2, targets[:, :, None]).sum((1, 2))
    torch.testing.assert_close(torch.tensor([one.scores[0] for one in made]), wanted, rtol=1e-4, atol=1e-4)


def test_what_they_cannot_is_told(case: libraries.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Unavailable, match="beams only"):
        libraries.case_of(replace(TEXT, candidates=True), torch.float32)
    with pytest.raises(Unavailable, match="its model has no image"):
        libraries.ctranslate2_peer("ctranslate2", case, False)
    monkeypatch.setitem(sys.modules, "ctranslate2", None)
    with pytest.raises(Unavailable, match="ctranslate2 is not installed"):
        libraries.ctranslate2_peer("ctranslate2", case, True)
