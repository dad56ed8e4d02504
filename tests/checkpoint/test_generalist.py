"""The whole road on a small model: train on three instructions, answer, save, load, answer the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from scenes import COLOURS, scenes, small_config, small_model, tasks

import ofakern
from ofakern.checkpoint import GeneralistModel
from ofakern.errors import CheckpointError, DataError, InstructionError, OfakernRuntimeError, OfakernValueError
from ofakern.metrics import box_iou
from ofakern.modality.output import Output
from ofakern.tasks import Task
from ofakern.train import Trainer

QUIET: dict[str, Any] = {"progress": False, "tensorboard": False}
ROWS = scenes()
QUESTIONS = [{"img": row["img"], "q": row["q"]} for row in ROWS]
GROUNDING = '[IMAGE:img] which region does the text " [TEXT:name] " describe? -> [BOX:box]'


@pytest.fixture(scope="module")
def trained() -> GeneralistModel:
    """A model that knows the six scenes by heart; its vocabulary was trained on the tasks' texts."""
    model = small_model()
    settings: dict[str, Any] = {"learning_rate": 1e-2, "betas": (0.9, 0.98), "warmup_ratio": 0.1, "weight_decay": 0.0}
    result = Trainer(**QUIET, **settings, max_updates=120, label_smoothing=0.0).fit(model=model, tasks=tasks())
    assert result.updates == 120
    return model


@pytest.fixture(scope="module")
def saved(trained: GeneralistModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    trained.save_pretrained(folder)
    return folder


def everything(model: GeneralistModel) -> list[Any]:
    captions = model.inference("caption", ROWS, num_return_sequences=3)
    answers = model.inference("vqa", QUESTIONS)
    boxes = model.inference("grounding", ROWS, num_beams=2)
    return [
        [(o.text, o.box, o.score, o.tokens) for o in (answer if isinstance(answer, list) else [answer])]
        for answer in (*captions, *answers, *boxes)
    ]


def test_scenes_are_learnt(trained: GeneralistModel) -> None:
    assert [o.text for o in trained.inference("caption", ROWS)] == [row["cap"] for row in ROWS]
    assert [o.text for o in trained.inference("vqa", QUESTIONS)] == [row["answer"] for row in ROWS]
    for output, row in zip(trained.inference("grounding", ROWS), ROWS, strict=True):
        assert box_iou(output.box, [float(x) for x in row["box"].split(",")]) > 0.7
        assert output.image.size == (40, 32)


def test_evaluation(trained: GeneralistModel) -> None:
    held = tasks()
    for task in held:
        task.add_dataset(ROWS, "test")
    numbers = Trainer(**QUIET).evaluate(model=trained, tasks=held)
    assert numbers["vqa"]["accuracy"] == 1.0 and numbers["grounding"]["grounding/mean_iou"] > 0.7
    assert numbers["caption"]["nll"] < 0.1 and "accuracy" not in numbers["caption"]


def test_reloads_and_answers_the_same(trained: GeneralistModel, saved: Path) -> None:
    loaded = ofakern.GeneralistModel.from_pretrained(saved)
    assert everything(loaded) == everything(trained)
    assert loaded.tasks == trained.tasks and loaded.config == trained.config
    for name, tensor in trained.network.state_dict().items():
        assert torch.equal(tensor, loaded.network.state_dict()[name]), name
    names = {"model.safetensors", "config.json", "tokenizer.json", "vocabulary.json", "plans.json"}
    assert {path.name for path in saved.iterdir()} == names | {"generation_config.json"}
    assert not [path for path in saved.parent.iterdir() if path.name.startswith(".")]


def test_saving_over_a_model_keeps_other_files(trained: GeneralistModel, saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "notes.txt").write_text("keep me")
    trained.save_pretrained(folder)
    trained.save_pretrained(folder)
    assert (folder / "notes.txt").read_text() == "keep me"
    assert (folder / "model.safetensors").read_bytes() == (saved / "model.safetensors").read_bytes()


def test_one_row_or_many(trained: GeneralistModel) -> None:
    one = trained.inference("vqa", QUESTIONS[1])
    assert isinstance(one, Output) and one.values == {"answer": "green"}
    many = trained.inference("vqa", QUESTIONS, batch_size=4)
    assert [o.text for o in many] == [trained.inference("vqa", row).text for row in QUESTIONS]
    assert many[1].score == pytest.approx(one.score, abs=1e-4)
    assert trained.inference("vqa", []) == []
    both = trained.inference(["vqa", "caption"], [QUESTIONS[0], ROWS[0]])
    assert [o.text for o in both] == ["red", ROWS[0]["cap"]]
    assert trained("vqa", QUESTIONS[0]).text == "red"
    assert trained("vqa", {**QUESTIONS[0], "answer": "no such colour"}) == trained("vqa", QUESTIONS[0])


def test_n_best_and_ofasys_names(trained: GeneralistModel) -> None:
    best = trained.inference("caption", ROWS[0], beam_size=3, return_n_best=3, max_len=12, no_repeat_ngram_size=0)
    assert len(best) == 3 and [o.score for o in best] == sorted((o.score for o in best), reverse=True)
    assert best[0].text == ROWS[0]["cap"]
    drawn = trained.inference("caption", ROWS[0], sampling=True, return_n_best=2, seed=1)
    assert len(drawn) == 2


def test_int8_weights_give_the_answers(trained: GeneralistModel) -> None:
    exact = trained.inference("caption", ROWS[0], beam_size=1)
    try:
        rounded = trained.quantize("int8").inference("caption", ROWS[0], beam_size=1)
    finally:
        trained.quantize(None)
    assert rounded.text == exact.text == ROWS[0]["cap"]
    assert 0 < abs(rounded.score - exact.score) < 0.05


def test_a_closed_set_can_be_given(trained: GeneralistModel) -> None:
    instruction = "[IMAGE:img] [TEXT:q] -> [TEXT:answer]"
    for answers in (["blue", "green"], {"blue": 0, "green": 1}):
        found = trained.inference(instruction, QUESTIONS, closed_set=answers)
        assert {o.text for o in found} <= {"blue", "green"}
    everything_allowed = trained.inference("vqa", QUESTIONS[0], closed_set=list(COLOURS), num_return_sequences=6)
    assert {o.text for o in everything_allowed} == set(COLOURS)
    assert sum(2.718281828 ** sum_scores(o) for o in everything_allowed) == pytest.approx(1.0, abs=1e-3)


def sum_scores(output: Output) -> float:
    assert output.score is not None
    return output.score * len(output.tokens)


def test_new_instructions_are_followed(trained: GeneralistModel) -> None:
    prompted = trained.inference("[IMAGE:img] what is it? -> a red [TEXT:cap]", ROWS[0], max_new_tokens=6)
    start = trained.tokenizer.encode("a red")
    assert prompted.tokens[: len(start)] == start
    assert prompted.text == trained.tokenizer.decode(prompted.tokens[len(start) :])
    several = trained.inference(
        "[IMAGE:img] -> [BOX:where] colour [TEXT:what,closed_set] block", ROWS[0], closed_set=COLOURS
    )
    assert several.values.keys() == {"where", "what"} and several.text in COLOURS and len(several.box) == 4
    group = trained.inference("[IMAGE:img] objects? -> ([BOX:b] [TEXT:t])*", ROWS[0], max_new_tokens=20)
    assert len(group.values["b"]) == len(group.boxes) >= 1


def test_wrong_use(trained: GeneralistModel) -> None:
    with pytest.raises(InstructionError):
        trained.inference("[IMAGE:img] -> [TXT:a]", ROWS[0])
    with pytest.raises(OfakernValueError, match="caption, grounding, vqa"):
        trained.inference("captions", ROWS[0])
    with pytest.raises(DataError, match="row 1: column 'img'"):
        trained.inference("caption", [ROWS[0], {"image": 3}])
    with pytest.raises(DataError, match="row 0"):
        trained.inference("caption", [{"img": "/nowhere/at/all.png"}])
    with pytest.raises(OfakernValueError, match="adaptors must include 'video_image_sequence'"):
        trained.inference("[VIDEO:v] what happens? -> [TEXT:words]", {"v": "x.mp4"})
    with pytest.raises(OfakernRuntimeError, match="for_tasks"):
        GeneralistModel(small_config()).inference("[TEXT:a] -> [TEXT:b]", {"a": "x"})
    with pytest.raises(OfakernValueError, match="adaptors must include 'image_vit'"):
        trained.inference("[IMAGE:img,adaptor=image_vit] -> [TEXT:b]", ROWS[0])


def test_damaged_checkpoints_are_named(saved: Path, tmp_path: Path) -> None:
    def damaged(change: Any) -> str:
        folder = tmp_path / "damaged"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(saved, folder)
        change(folder)
        with pytest.raises(CheckpointError) as error:
            GeneralistModel.from_pretrained(folder)
        return str(error.value)

    def edit_weights(change: Any) -> Any:
        def edit(folder: Path) -> None:
            tensors = load_file(folder / "model.safetensors")
            change(tensors)
            save_file(tensors, folder / "model.safetensors")

        return edit

    def truncate(folder: Path) -> None:
        content = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(content[: len(content) // 2])

    key = "decoder.layer_norm.weight"
    assert f"1 missing: {key}" in damaged(edit_weights(lambda tensors: tensors.pop(key)))
    assert "1 unexpected: extra" in damaged(edit_weights(lambda tensors: tensors.update(extra=torch.zeros(1))))
    assert f"{key} [3] instead of [32]" in damaged(edit_weights(lambda t: t.update({key: torch.zeros(3)})))
    assert "whole safetensors file" in damaged(truncate)
    for name in ("config.json", "plans.json", "vocabulary.json", "tokenizer.json", "generation_config.json"):
        assert name in damaged(lambda folder, name=name: (folder / name).unlink())
        assert name in damaged(lambda folder, name=name: (folder / name).write_text('{"model": '))
    with pytest.raises(CheckpointError, match="saved model"):
        GeneralistModel.from_pretrained(tmp_path / "none")
    assert json.loads((saved / "config.json").read_text())["model"]["dim"] == 32


@pytest.mark.parametrize("extra", [{}, {"bf16": True}])
def test_resume_of_the_real_model_is_exact(tmp_path: Path, extra: dict[str, Any]) -> None:
    def model(seed: int) -> GeneralistModel:
        return small_model(seed=seed, dropout=0.1, decoder_drop_path=0.1, encoder_drop_path=0.1)

    settings: dict[str, Any] = {**QUIET, **extra, "max_updates": 5}
    whole, cut, resumed = model(0), model(0), model(7)
    Trainer(**settings).fit(model=whole, tasks=tasks())
    stop = _StopAfter(3)
    with pytest.raises(_Stop):
        Trainer(**settings, output_dir=tmp_path, save_every=2).fit(
            model=cut, tasks=[*tasks()[:2], stop.hook(tasks()[2])]
        )
    Trainer(**settings, output_dir=tmp_path).fit(model=resumed, tasks=tasks(), resume=True)
    for name, tensor in whole.network.state_dict().items():
        assert torch.equal(tensor, resumed.network.state_dict()[name]), name


class _Stop(Exception):
    pass


class _StopAfter:
    """A crash while the samples of the n-th update are read."""

    def __init__(self, updates: int) -> None:
        self.left = updates * 6

    def hook(self, task: Task) -> Task:
        def count(row: Any) -> Any:
            self.left -= 1
            if self.left < 0:
                raise _Stop
            return row

        task.preprocess = count
        return task


def test_broken_images_are_skipped(tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.png"
    Image.new("RGB", (8, 8)).save(damaged)
    damaged.write_bytes(damaged.read_bytes()[:40])
    rows = [*ROWS, {**ROWS[0], "img": str(damaged)}, {**ROWS[0], "img": str(tmp_path / "none.png")}]
    caption = Task("caption", "[IMAGE:img] -> [TEXT:cap]", micro_batch_size=8).add_dataset(rows, "train")
    result = Trainer(**QUIET, max_updates=1, max_broken_share=0.3).fit(model=small_model(), tasks=caption)
    assert "8 samples, 2 broken" in result.broken[0]
    with pytest.raises(DataError, match="must be at most 10.00%"):
        Trainer(**QUIET, max_updates=9).fit(model=small_model(), tasks=caption)


def test_a_size_by_name() -> None:
    model = GeneralistModel.from_size("tiny", dim=32, heads=2, ffn_dim=32, encoder_layers=1, decoder_layers=1)
    assert model.config.dim == 32 and "vocabulary=59457" in repr(model)
