"""An OFASys trainer checkpoint: every key accounted for, the recorded answer, symbols matched, bad files refused."""

from __future__ import annotations

import argparse
import json
import shutil
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ofakern.checkpoint import GeneralistModel
from ofakern.checkpoint.foreign import read_foreign
from ofakern.checkpoint.ofasys import EMBEDDING, config_from_ofasys
from ofakern.checkpoint.ofasys_files import config_to_ofasys, write_ofasys_file
from ofakern.checkpoint.pickles import read_pickle
from ofakern.cli.main import main
from ofakern.errors import CheckpointError
from ofakern.modality.audio.adaptor import AudioFbankConfig, AudioTargetConfig
from ofakern.model import OFAPlus
from ofakern.text import Tokenizer, Vocabulary

GOLDEN = Path(__file__).parents[1] / "golden" / "ofasys"
CHECKPOINT = GOLDEN / "checkpoint.pt"
EXPECTED = json.loads((GOLDEN / "checkpoint_expected.json").read_text())["inference"]


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bpe")
    resources = GOLDEN / "main" / "resources"
    shutil.copy(resources / "bpe_encoder.json", folder / "encoder.json")
    shutil.copy(resources / "bpe_vocab.bpe", folder / "vocab.bpe")
    return folder


@pytest.fixture(scope="module")
def data() -> dict[str, Any]:
    return read_pickle(CHECKPOINT)


def check_answer(model: GeneralistModel) -> None:
    for instruction in (EXPECTED["instruction"], "gigaword"):
        answer = model.inference(
            instruction, EXPECTED["data"], beam_size=EXPECTED["beam_size"], max_len=EXPECTED["max_len"], lenpen=0.0
        )
        assert answer.tokens == EXPECTED["tokens"] and answer.text == EXPECTED["text"]
        assert answer.score == pytest.approx(EXPECTED["score"], abs=1e-4)


def test_the_recorded_answer_and_every_key(bpe: Path) -> None:
    model, account = GeneralistModel.from_foreign(CHECKPOINT, bpe=bpe)
    check_answer(model)
    check_answer(GeneralistModel.from_pretrained(CHECKPOINT, bpe=bpe))
    assert len(account.fates) == 170 and account.ledger.left() == []
    derived = {key for key, fate in account.fates.items() if fate == "follows from the configuration"}
    sides = ("encoder", "decoder")
    assert derived == {f"{s}.{k}" for s in sides for k in ("version", "adaptor.text.token_rp_bucket")}
    assert account.fates["decoder.adaptor.embed_tokens.weight"] == f"tied to {EMBEDDING}"
    loaded = {key for key, fate in account.fates.items() if fate == "loaded"}
    assert loaded == set(model.network.state_dict()) - {"decoder.adaptor.embed_tokens.weight"}
    assert sorted(model.tasks) == ["gigaword", "text_infilling"]


def test_the_command_prints_the_account_and_writes_a_model(
    bpe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["convert", str(CHECKPOINT), str(tmp_path / "model"), "--bpe", str(bpe), "--keys"]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "170 keys, 0 left over" in out and f"{EMBEDDING}: loaded" in out
    check_answer(GeneralistModel.from_pretrained(tmp_path / "model"))
    assert main(command) == 2 and "must not be there yet" in capsys.readouterr().err


def test_rows_are_matched_by_symbol(bpe: Path, data: dict[str, Any]) -> None:
    symbols = sorted(data["global_dict_indices"], key=lambda s: data["global_dict_indices"][s])
    text = [s for s in symbols if s.startswith("<text>")]
    other = Vocabulary([*symbols[:4], *reversed(text), "<mask>", "<bin>_0", "<bin>_1"])
    tokenizer = Tokenizer.from_files(bpe / "encoder.json", bpe / "vocab.bpe", vocabulary=other)
    model, account = GeneralistModel.from_foreign(CHECKPOINT, tokenizer=tokenizer)
    rows, stored = model.network.output_weight, data["model"][EMBEDDING]
    for symbol in ("<s>", "<mask>", text[0], text[-1]):
        assert torch.equal(rows[other.index(symbol)], stored[data["global_dict_indices"][symbol]])
    assert "322 rows matched by symbol, 2 new" in str(account)
    answer = model.inference(EXPECTED["instruction"], EXPECTED["data"], num_beams=5, max_len=10, lenpen=0.0)
    assert answer.text == EXPECTED["text"]


def test_back_to_an_ofasys_file(bpe: Path, data: dict[str, Any], tmp_path: Path) -> None:
    assert main(["convert", str(CHECKPOINT), str(tmp_path / "model"), "--bpe", str(bpe)]) == 0
    assert main(["convert", str(tmp_path / "model"), str(tmp_path / "back.pt"), "--to", "ofasys"]) == 0
    back = read_pickle(tmp_path / "back.pt")
    lost = set(data["model"]) - set(back["model"])
    assert lost == {k for k in data["model"] if k.endswith(("_rp_bucket", "version"))}
    assert set(back["model"]) <= set(data["model"]) and back["global_dict_indices"] == data["global_dict_indices"]
    assert all(torch.equal(tensor, data["model"][key]) for key, tensor in back["model"].items())
    stored = data["configstore"]["model"]["unify"]
    for part in ("encoder", "decoder"):
        written_part = back["configstore"]["model"]["unify"][part]
        assert written_part.items() <= stored[part].items()
    text = back["configstore"]["model"]["unify"]["adaptor"]["text"]
    assert text.items() <= stored["adaptor"]["text"].items()
    check_answer(GeneralistModel.from_pretrained(tmp_path / "back.pt", bpe=bpe))
    model = GeneralistModel.from_pretrained(tmp_path / "model")
    with pytest.raises(CheckpointError, match="options beyond OFASys must be off, got max_segments"):
        config_to_ofasys(replace(model.config, max_segments=2))
    with pytest.raises(CheckpointError, match="text must have no options beyond OFASys, got bucket_range"):
        adaptors = (replace(model.config.adaptors[0], bucket_range=64),)  # type: ignore[call-arg]
        config_to_ofasys(replace(model.config, adaptors=adaptors))


def test_a_model_that_hears_and_speaks_comes_back(bpe: Path, data: dict[str, Any], tmp_path: Path) -> None:
    """Its two audio adaptors go to OFASys's format and back, options and all; of the loss nothing is written there."""
    sound = AudioFbankConfig(max_position=16, prenet_dim=8, postnet_conv_dim=8, guided_attention=1.0)
    target = AudioTargetConfig(max_position=16, prenet_dim=8, postnet_conv_dim=8, n_frames_per_step=2)
    model = GeneralistModel.from_pretrained(CHECKPOINT, bpe=bpe)
    network = OFAPlus(replace(model.config, adaptors=(*model.config.adaptors, sound, target)), seed=0)
    write_ofasys_file(tmp_path / "speech.pt", network, model.tokenizer.vocabulary, {})
    stored = torch.load(tmp_path / "speech.pt", weights_only=True)
    # OFASys's file has both halves on both sides, and a scale of positions that nothing reads.
    stored["model"]["encoder.adaptor.audio_fbank.feat_proj.weight"] = torch.zeros(80, 64)
    stored["model"]["decoder.adaptor.audio_fbank.subsample.out.0.bias"] = torch.zeros(64)
    stored["model"]["decoder.adaptor.audio_tgt_fbank.pos_emb_alpha"] = torch.ones(1)
    stored["model"]["decoder.adaptor.audio_fbank.mask_emb"] = torch.zeros(64)
    torch.save(stored, tmp_path / "speech.pt")
    read = read_foreign(tmp_path / "speech.pt", bpe=bpe)
    resolved = {"entangle_position_embedding": False}  # what OFASys says where ours leaves it to the model
    expected = replace(sound, guided_attention=0.0, **resolved), replace(target, **resolved)
    assert read.config.adaptors[-2:] == expected
    again = OFAPlus(read.config)
    ledger = read.load(again)
    assert not ledger.left() and "other half" in ledger.fates["encoder.adaptor.audio_fbank.feat_proj.weight"]
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in network.state_dict().items())


def written(data: dict[str, Any], folder: Path, **changes: Any) -> Path:
    path = folder / "changed.pt"
    torch.save({**data, **changes}, path)
    return path


def test_foreign_and_misshapen_files_are_named(bpe: Path, data: dict[str, Any], tmp_path: Path) -> None:
    weights: OrderedDict[str, torch.Tensor] = data["model"]
    key = "encoder.layers.0.fc1.weight"
    cases: list[tuple[dict[str, Any], str]] = [
        ({"model": {k: v for k, v in weights.items() if k != key}}, f"1 missing: {key}"),
        ({"model": {**weights, "encoder.surprise": torch.zeros(2)}}, "1 unknown: encoder.surprise"),
        ({"model": {**weights, key: torch.zeros(3, 4)}}, r"1 of another shape: .*\[3, 4\] instead of \[256, 64\]"),
        ({"model": {**weights, "decoder.adaptor.embed_tokens.weight": torch.zeros(322, 64)}}, "they are tied"),
        ({"model": {**weights, EMBEDDING: torch.zeros(300, 64)}}, "must have 322 rows"),
        ({"configstore": {"model": {}, "task": {}}}, "must configure one model"),
        ({"configstore": [1]}, "config store and dictionary"),
        ({"configstore": {"model": {"unify": {"encoder": 3}}, "task": {}}}, "must"),
        ({"model": [1]}, "must hold tensors by name, got list"),
        ({"model": {**weights, "x": "text"}}, "got str for 'x'"),
        ({"global_dict_indices": {"<s>": 0, "<pad>": 2}}, "number its symbols"),
        ({"global_dict_indices": 5}, "config store and dictionary"),
    ]
    for changes, message in cases:
        with pytest.raises(CheckpointError, match=message):
            GeneralistModel.from_pretrained(written(data, tmp_path, **changes), bpe=bpe)
    torch.save({"weights": torch.zeros(2)}, tmp_path / "foreign.pt")
    with pytest.raises(CheckpointError, match="got no configstore, global_dict_indices, model"):
        GeneralistModel.from_pretrained(tmp_path / "foreign.pt", bpe=bpe)
    with pytest.raises(CheckpointError, match="encoder.json and vocab.bpe"):
        GeneralistModel.from_pretrained(written(data, tmp_path))


class Payload:
    """Stands for a class that a checkpoint must not bring along."""

    def __init__(self) -> None:
        self.value = 1


def test_a_pickle_with_code_is_refused_and_names_it(tmp_path: Path) -> None:
    path = tmp_path / "code.pt"
    torch.save({"model": {}, "payload": Payload(), "path": Path("x")}, path)
    with pytest.raises(CheckpointError) as caught:
        GeneralistModel.from_pretrained(path)
    assert f"{Payload.__module__}.Payload" in str(caught.value) and "pathlib" in str(caught.value)
    torch.save({"model": {}, "payload": Payload()}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match="Payload"):
        GeneralistModel.from_pretrained(path)
    torch.save({"args": argparse.Namespace(arch="x")}, path)
    assert read_pickle(path)["args"].arch == "x"


def test_damaged_files(tmp_path: Path) -> None:
    whole = CHECKPOINT.read_bytes()
    path = tmp_path / "cut.pt"
    for content in (whole[: len(whole) // 2], whole[:40], b"", b"no checkpoint at all"):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=str(path)):
            GeneralistModel.from_pretrained(path)
    with pytest.raises(CheckpointError, match="dictionary"):
        torch.save([1, 2], path)
        GeneralistModel.from_pretrained(path)


def test_every_adaptor_of_ofasys_goes_there_and_back() -> None:
    recorded = json.loads((GOLDEN / "main" / "config.json").read_text())["model"]
    config, missing = config_from_ofasys(recorded, 434)
    names = {"text", "image_resnet", "image_vqgan", "audio_fbank", "video_image_sequence", "motion_6d"}
    assert {adaptor.name for adaptor in config.adaptors} == names and not missing
    assert config_from_ofasys(config_to_ofasys(config), 434) == (config, [])
