"""OFA's files: Hugging Face folders both ways, fairseq checkpoints, what is refused."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ofakern.checkpoint import GeneralistModel
from ofakern.checkpoint.golden_hf import HfCase, load_hf_model
from ofakern.checkpoint.ofa_files import is_hf_folder
from ofakern.checkpoint.ofa_hf import fairseq_to_hf
from ofakern.cli.main import main
from ofakern.errors import CheckpointError
from ofakern.model import OFAPlus
from ofakern.text import Tokenizer

GOLDEN = Path(__file__).parents[1] / "golden"
FOLDER = GOLDEN / "ofa_hf"
CONFIG: dict[str, Any] = json.loads((FOLDER / "config.json").read_text())
TEXTS = 495  # ids 4 .. 498 of the recorded vocabulary


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recorded model with a tokenizer of its size, as the hub's folders are."""
    folder = tmp_path_factory.mktemp("ofa")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    weights = {key: tensor.float() for key, tensor in load_file(FOLDER / "model.fp16.safetensors").items()}
    torch.save(weights, folder / "pytorch_model.bin")
    resources = GOLDEN / "ofasys" / "main" / "resources"
    tokens = list(json.loads((resources / "bpe_encoder.json").read_text()))
    tokens += [f"madeupword{i:04}" for i in range(TEXTS - len(tokens))]
    vocab = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, **{t: i + 4 for i, t in enumerate(tokens)}, "<mask>": 499}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    added = {f"<code_{i}>": 500 + i for i in range(128)} | {f"<bin_{i}>": 628 + i for i in range(100)}
    (folder / "added_tokens.json").write_text(json.dumps(added))
    shutil.copy(resources / "bpe_vocab.bpe", folder / "merges.txt")
    return folder


def same_outputs(network: OFAPlus) -> None:
    case = HfCase.read(FOLDER, "text_b3_pad")
    with torch.no_grad():
        logits = network.logits(network(case.batch(range(3))))
    owner, place = case.rows(False, range(3))
    torch.testing.assert_close(logits, case.arrays["logits"][owner, place], rtol=1e-4, atol=1e-4)


def test_a_folder_of_the_hub_and_back(hf_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(hf_folder), str(tmp_path / "ours")]) == 0
    assert "293 keys, 0 left over" in capsys.readouterr().out
    model = GeneralistModel.from_pretrained(tmp_path / "ours")
    same_outputs(model.network)
    assert model.preprocess.box_image_size == 512
    assert len(model.tokenizer.vocabulary.range("bin")) == 100 and model.tokenizer.vocabulary.mask == 499
    ids = model.tokenizer.encode("the cat and the dog")
    assert len(ids) > 3 and all(4 <= i < 499 for i in ids) and model.tokenizer.decode(ids) == "the cat and the dog"
    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "theirs"), "--to", "ofa_hf"]) == 0
    stored = torch.load(hf_folder / "pytorch_model.bin", weights_only=True)
    written = torch.load(tmp_path / "theirs" / "pytorch_model.bin", weights_only=True)
    assert set(stored) - set(written) == {"decoder.image_position_idx"} and not set(written) - set(stored)
    assert all(torch.equal(tensor, stored[key]) for key, tensor in written.items())
    for name in ("vocab.json", "added_tokens.json"):
        ours, theirs = (json.loads((f / name).read_text()) for f in (tmp_path / "theirs", hf_folder))
        assert ours == theirs
    assert is_hf_folder(tmp_path / "theirs")
    again = GeneralistModel.from_pretrained(tmp_path / "theirs")
    same_outputs(again.network)
    assert again.tokenizer.encode("the cat and the dog") == ids


def test_the_answer_follows_an_instruction(hf_folder: Path) -> None:
    model = GeneralistModel.from_pretrained(hf_folder)
    answer = model.inference("what is it? [TEXT:q] -> [TEXT:a]", {"q": "the cat"}, num_beams=2, max_new_tokens=4)
    assert 1 <= len(answer.tokens) <= 5


def fairseq_file(folder: Path, **changes: Any) -> Path:
    """What OFA's trainer would have written for the recorded model."""
    ours = OFAPlus(load_hf_model(FOLDER).config).state_dict()
    layers = {fairseq_to_hf(key): key for key in ours if ".layers." in key}
    weights: dict[str, Tensor] = {
        layers.get(key, key): value for key, value in load_file(FOLDER / "model.fp16.safetensors").items()
    }
    weights |= {f"{side}.version": torch.tensor([3.0]) for side in ("encoder", "decoder")}
    weights["classification_heads.x.dense.weight"] = torch.zeros(2, 2)
    arguments = {key: value for key, value in CONFIG.items() if key.startswith(("encoder_", "decoder_"))}
    arguments |= {f"{side}_embed_dim": 64 for side in ("encoder", "decoder")}
    arguments |= {f"{side}_ffn_embed_dim": 128 for side in ("encoder", "decoder")}
    for name in ("resnet_type", "resnet_drop_path_rate", "dropout", "attention_dropout", "activation_dropout"):
        arguments[name] = CONFIG[name]
    for name in ("attn_scale_factor", "token_bucket_size", "image_bucket_size", "code_image_size"):
        arguments[name] = CONFIG[name]
    for name in ("add_type_embedding", "layernorm_embedding", "patch_layernorm_embedding", "code_layernorm_embedding"):
        arguments[name] = True
    arguments |= dict.fromkeys(
        ("scale_attn", "scale_fc", "scale_heads", "no_scale_embedding", "disable_entangle"), True
    )
    arguments |= {"max_source_positions": 128, "activation_fn": "gelu", **changes}
    path = folder / "checkpoint_best.pt"
    namespace = argparse.Namespace(**arguments)
    torch.save({"args": None, "cfg": {"model": namespace}, "model": weights, "extra_state": {}}, path)
    return path


def test_a_fairseq_checkpoint(hf_folder: Path, tmp_path: Path) -> None:
    tokenizer: Tokenizer = GeneralistModel.from_pretrained(hf_folder).tokenizer
    path = fairseq_file(tmp_path)
    model, account = GeneralistModel.from_foreign(path, tokenizer=tokenizer)
    same_outputs(model.network)
    assert account.ledger.left() == [] and len(account.fates) == 293 + 3
    assert "classification head" in str(account)
    with pytest.raises(CheckpointError, match="encoder.json, vocab.bpe, dict.txt"):
        GeneralistModel.from_pretrained(path)
    with pytest.raises(CheckpointError, match="scale_attn, scale_fc and scale_heads"):
        GeneralistModel.from_pretrained(fairseq_file(tmp_path, scale_fc=False), tokenizer=tokenizer)
    entangled = GeneralistModel.from_pretrained(fairseq_file(tmp_path, disable_entangle=False), tokenizer=tokenizer)
    assert entangled.config.entangle_decoder


def test_damaged_folders(hf_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(hf_folder, folder)
    whole = (folder / "pytorch_model.bin").read_bytes()
    (folder / "pytorch_model.bin").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="whole torch.save file"):
        GeneralistModel.from_pretrained(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"model.safetensors or pytorch_model.bin"):
        GeneralistModel.from_pretrained(folder)
    save_file({"other": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="must have 728 rows"):
        GeneralistModel.from_pretrained(folder)
    (folder / "model.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match="whole safetensors file"):
        GeneralistModel.from_pretrained(folder)
    shutil.copy(FOLDER / "model.fp16.safetensors", folder / "model.safetensors")
    same_outputs(GeneralistModel.from_pretrained(folder).network)
    (folder / "vocab.json").write_text(json.dumps({"<s>": 0}))
    with pytest.raises(CheckpointError, match="must number 728 tokens"):
        GeneralistModel.from_pretrained(folder)


def test_a_model_that_the_format_cannot_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = GeneralistModel(tokenizer=Tokenizer.train(["the cat"], 256), dim=32, ffn_dim=32, heads=2, encoder_layers=1)
    model.save_pretrained(tmp_path / "model")
    assert main(["convert", str(tmp_path / "model"), str(tmp_path / "out"), "--to", "ofa_hf"]) == 2
    assert "adaptors must be text, image_resnet and image_vqgan" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
