"""`all_candidates`: every answer of a closed set scored, against an exhaustive search; evaluation; what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scenes import COLOURS, scenes, small_model, tasks

from ofakern.checkpoint import GeneralistModel
from ofakern.errors import OfakernValueError
from ofakern.tasks import Task
from ofakern.train import Trainer

ROWS = scenes()
PROMPTED = "[IMAGE:img] [TEXT:q] -> [TEXT:q,no_loss] the colour [TEXT:answer,closed_set] of it"


@pytest.fixture(scope="module")
def model() -> GeneralistModel:
    """Untrained, but for a vocabulary; embeddings are spread so that answers differ."""
    model = small_model()
    model.prepare(tasks())
    with torch.no_grad():
        for parameter in model.network.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return model


@pytest.mark.parametrize("instruction", ["vqa", PROMPTED])
@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_equal_to_an_exhaustive_search(model: GeneralistModel, instruction: str, penalty: float) -> None:
    rows = [{**row, "q": question} for row, question in zip(ROWS, ("which?", "what colour is it?") * 3, strict=True)]
    asked: dict[str, Any] = {"closed_set": COLOURS, "num_return_sequences": 4, "length_penalty": penalty}
    searched = model.inference(instruction, rows, num_beams=6, early_stopping="never", no_repeat_ngram_size=0, **asked)
    found = model.inference(instruction, rows, all_candidates=True, batch_size=4, **asked)
    for got, wanted in zip(found, searched, strict=True):
        assert [o.tokens for o in got] == [o.tokens for o in wanted]
        assert [o.values for o in got] == [o.values for o in wanted]
        assert [o.score for o in got] == pytest.approx([o.score for o in wanted], abs=1e-4)


def test_probabilities_of_all_answers_sum_to_one(model: GeneralistModel) -> None:
    found = model.inference("vqa", ROWS[0], all_candidates=True, length_penalty=0.0, num_return_sequences=6)
    assert sorted(o.text for o in found) == sorted(COLOURS)
    assert sum(torch.tensor([o.score for o in found]).exp().tolist()) == pytest.approx(1.0, abs=1e-4)
    assert model.inference("vqa", ROWS[0], all_candidates=True, length_penalty=0.0).text == found[0].text


def test_a_task_is_evaluated_by_all_candidates(model: GeneralistModel) -> None:
    settings = {"all_candidates": True, "length_penalty": 0.0}
    best = [model.inference("vqa", row, **settings).text for row in ROWS]
    rows = [{**row, "answer": text} for row, text in zip(ROWS, best, strict=True)]
    instruction = "[IMAGE:img] [TEXT:q] -> [TEXT:answer,closed_set]"
    task = Task(
        "vqa", instruction, micro_batch_size=6, metrics=["accuracy"], closed_set=COLOURS, generation=settings
    ).add_dataset(rows, "test")
    numbers = Trainer(progress=False, tensorboard=False).evaluate(model=model, tasks=[task])
    assert numbers["vqa"]["accuracy"] == 1.0


def test_known_text_in_the_middle_is_each_rows_own(model: GeneralistModel) -> None:
    instruction = "[IMAGE:img] -> [TEXT:answer,closed_set] then [TEXT:name,no_loss] [TEXT:second,closed_set]"
    rows = [{**row, "name": name} for row, name in zip(ROWS, ("red", "a green block") * 3, strict=True)]
    whole = model.inference(instruction, rows, closed_set=COLOURS, all_candidates=True)
    for row, output in zip(rows, whole, strict=True):
        alone = model.inference(instruction, row, closed_set=COLOURS, all_candidates=True)
        assert alone.values == output.values and alone.score == pytest.approx(output.score, abs=1e-4)


def test_refusals(model: GeneralistModel) -> None:
    with pytest.raises(OfakernValueError, match="closed sets and fixed text"):
        model.inference("caption", ROWS[0], all_candidates=True)
    with pytest.raises(OfakernValueError, match="do_sample must be False with all_candidates"):
        model.inference("vqa", ROWS[0], all_candidates=True, do_sample=True)
    with pytest.raises(OfakernValueError, match="unk_penalty must be"):
        model.inference("vqa", ROWS[0], all_candidates=True, unk_penalty=1.0)
    with pytest.raises(OfakernValueError, match="must not be streamed"):
        model.inference("vqa", ROWS[0], all_candidates=True, stream=print)
