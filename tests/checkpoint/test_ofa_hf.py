"""OFA's Hugging Face format: keys both ways, every recorded case and search, what the parity command must notice."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ofakern.checkpoint.golden_hf import HfCase, case_names, load_hf_model, run_hf_case
from ofakern.checkpoint.ledger import Ledger
from ofakern.checkpoint.ofa_hf import config_from_hf, config_to_hf, fairseq_to_hf, load_hf_weights, to_hf_weights
from ofakern.cli.main import main
from ofakern.data.batch import Example, PackedBatch, Segment
from ofakern.errors import CheckpointError, DataError, OfakernValueError
from ofakern.model import OFAPlus
from ofakern.nn.relative import (
    SpecialRows,
    grid_block,
    grid_coordinates,
    grid_extent,
    special_coordinates,
    text_bucket,
    with_special,
)

FOLDER = Path(__file__).parents[1] / "golden" / "ofa_hf"
CONFIG: dict[str, Any] = json.loads((FOLDER / "config.json").read_text())
NAMES = case_names(FOLDER)


@pytest.fixture(scope="module")
def model() -> OFAPlus:
    return load_hf_model(FOLDER)


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return load_file(FOLDER / "model.fp16.safetensors")


@pytest.mark.parametrize("name", NAMES)
def test_recorded_case(name: str, model: OFAPlus) -> None:
    result = run_hf_case(FOLDER, name, model)
    assert result.checks and [(c.group, c.name) for c in result.checks if not c.passed] == []


def test_every_key_goes_both_ways(weights: dict[str, Tensor]) -> None:
    model = OFAPlus(config_from_hf(CONFIG))
    ledger = Ledger(weights, "here")
    load_hf_weights(model, ledger)
    assert len(ledger.fates) == len(weights) == 293 and ledger.left() == []
    back = to_hf_weights(model)
    computed = {key for key, fate in ledger.fates.items() if fate == "follows from the configuration"}
    assert set(back) == set(weights) - computed and computed == {"decoder.image_position_idx"}
    assert all(torch.equal(tensor, weights[key].to(tensor.dtype)) for key, tensor in back.items())
    described: dict[str, Any] = json.loads((FOLDER / "state_dict_keys.json").read_text())
    buckets = {f"{side}.{kind}_rp_bucket" for side in ("encoder", "decoder") for kind in ("token", "image")}
    assert set(described) == set(back) | computed | buckets
    assert all(described[key]["shape"] == list(tensor.shape) for key, tensor in back.items())
    again = config_to_hf(model.config)
    assert config_from_hf(again) == model.config
    assert {key: again[key] for key in again if key in CONFIG and key != "architectures"}.items() <= CONFIG.items()
    # With the integer buffers that published files hold, nothing is left over either.
    ledger = Ledger({**weights, **dict.fromkeys(buckets, torch.zeros(1, dtype=torch.int64))}, "here")
    load_hf_weights(model, ledger)
    assert ledger.left() == [] and ledger.fates["encoder.token_rp_bucket"] == "follows from the configuration"


SIZES: dict[str, Any] = json.loads((FOLDER / "real_sizes.json").read_text())


def published(size: str) -> OFAPlus:
    """A published size without memory for its weights."""
    shape = SIZES[size]["config"]
    fields = {"d_model": shape["d_model"], "resnet_type": shape["resnet_type"], "vocab_size": 59457}
    for side in ("encoder", "decoder"):
        layers = shape[f"{side}_layers"]
        fields |= {f"{side}_layers": layers, f"{side}_ffn_dim": shape["ffn"], f"{side}_attention_heads": shape["heads"]}
    tables = {"token_bucket_size": 256, "image_bucket_size": 42, "code_image_size": 128}
    with torch.device("meta"):
        return OFAPlus(config_from_hf({**CONFIG, **fields, **tables, "max_position_embeddings": 1024}))


@pytest.mark.parametrize("size", SIZES)
def test_published_sizes(size: str) -> None:
    model = published(size)
    unused = [p for key, p in model.named_parameters() if key.startswith("decoder.") and "type_embedding" in key]
    assert sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in unused) == SIZES[size]["params"]
    keys = to_hf_weights(model)
    assert len(keys) + 5 == SIZES[size]["n_state_dict_keys"]  # five integer buffers are computed
    if size == "tiny":
        recorded = json.loads((FOLDER / "real_tiny_keys.json").read_text())
        buffers = {key for key, (_, dtype) in recorded.items() if dtype == "int64" and "num_batches" not in key}
        assert {key: list(t.shape) for key, t in keys.items()} == {
            key: shape for key, (shape, _) in recorded.items() if key not in buffers
        }


def test_fairseq_names() -> None:
    expected = {
        "encoder.layers.0.attn_ln.weight": "encoder.layers.0.self_attn_mid_layer_norm.weight",
        "decoder.layers.1.encoder_attn.c_attn": "decoder.layers.1.cross_attn.c_attn",
        "decoder.layers.1.encoder_attn_layer_norm.bias": "decoder.layers.1.cross_attn_layer_norm.bias",
        "decoder.layers.1.cross_attn_ln.bias": "decoder.layers.1.cross_attn_mid_layer_norm.bias",
        "encoder.layers.1.ffn_layernorm.bias": "encoder.layers.1.ffn_layer_norm.bias",
        "encoder.layers.1.self_attn_layer_norm.bias": "encoder.layers.1.self_attn_layer_norm.bias",
        "encoder.pos_ln.bias": "encoder.pos_ln.bias",
    }
    assert {key: fairseq_to_hf(key) for key in expected} == expected


def test_bad_files_and_models_that_do_not_fit(weights: dict[str, Tensor], model: OFAPlus) -> None:
    network = OFAPlus(config_from_hf(CONFIG))
    key = "encoder.layers.0.fc1.weight"
    for changed, message in (
        ({k: v for k, v in weights.items() if k != key}, f"1 missing: {key}"),
        ({**weights, "encoder.surprise": torch.zeros(1)}, "1 unknown: encoder.surprise"),
        ({**weights, key: torch.zeros(2, 2)}, "1 of another shape"),
        ({**weights, "decoder.output_projection.weight": torch.zeros(728, 64)}, "they are tied"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_hf_weights(network, Ledger(changed, "here"))
    for field, value in (("decoder_ffn_dim", 256), ("entangle_position_embedding", True), ("encoder_layerdrop", 0.1)):
        with pytest.raises(CheckpointError, match=field.removeprefix("decoder_")):
            config_from_hf({**CONFIG, field: value})
    with pytest.raises(CheckpointError, match="got none for 'd_model'"):
        config_from_hf({k: v for k, v in CONFIG.items() if k != "d_model"})
    beyond = copy.deepcopy(model)
    object.__setattr__(beyond.config, "modal_ffn", True)
    with pytest.raises(CheckpointError, match="beyond OFA"):
        to_hf_weights(beyond)


def test_sampled_patches_are_those_of_the_whole_image(model: OFAPlus) -> None:
    """All patches in another order give the same answer: an encoder has no order but its positions."""
    case = HfCase.read(FOLDER, "imgtext_b2_sample5")
    image, text = case.arrays["in.patch_images"][0], torch.tensor([0, 20, 30, 2])
    target = [Segment(2, "text", 1, torch.tensor([0, 5, 6]))]

    def logits(positions: Tensor | None, length: int | None = None) -> Tensor:
        source = [Segment(0, "image_resnet", 2, image, length, positions), Segment(1, "text", 1, text)]
        with torch.no_grad():
            return model.logits(model(PackedBatch.collate([Example(source, target, torch.zeros(3).long())])))

    torch.testing.assert_close(logits(torch.randperm(49)), logits(None), rtol=1e-4, atol=1e-4)
    with pytest.raises(OfakernValueError, match=r"positions must be in \[0, 49\), got 3 .. 60"):
        logits(torch.tensor([3, 60]))
    with pytest.raises(DataError, match=r"positions must be int64 \[3\]"):
        logits(torch.tensor([3, 6]), 3)


def test_token_buckets_are_the_recorded_ones() -> None:
    recorded = load_file(FOLDER / "buckets.safetensors")
    difference = torch.arange(-1023, 1024)
    for size in (32, 256):
        key = next(k for k in recorded if f"{size}.by_relpos" in k)
        assert torch.equal(text_bucket(difference, size, 1024), recorded[key].long())


@pytest.mark.parametrize("size", [16, 42])
def test_image_buckets_are_the_recorded_ones(size: int) -> None:
    """The whole matrix, special token first, by its hash."""
    grid, own = grid_block(size, size, size), grid_coordinates(size, size)
    special = with_special(grid, SpecialRows.of_image(size))
    q, k = (torch.cat([torch.tensor([c]), own]) for c in special_coordinates(grid_extent(size, size)))
    found = special.index[q[:, None] - k - special.dmin]
    recorded = load_file(FOLDER / "buckets.safetensors")
    rows = recorded[f"image_bucket_{size}.rows_0_1_last"].long()
    assert torch.equal(found[[0, 1, size + 3, -1]], rows)
    assert digest(found) == bytes(recorded[f"image_bucket_{size}.sha_full"].tolist())


@pytest.mark.parametrize("size", [32, 256])
def test_whole_token_bucket_matrices_have_the_recorded_hash(size: int) -> None:
    place = torch.arange(1024)
    found = text_bucket(place[:, None] - place, size, 1024)
    recorded = load_file(FOLDER / "buckets.safetensors")[f"token_bucket_{size}.sha_full"]
    assert digest(found) == bytes(recorded.tolist())


def digest(table: Tensor) -> bytes:
    return hashlib.sha256(table.long().contiguous().numpy().tobytes()).digest()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_as_plain_torch(dtype: torch.dtype) -> None:
    """Relative L2 error of the logits at most twice that of the same model with attention in plain torch."""
    models = {backend: load_hf_model(FOLDER, backend).to(dtype) for backend in ("auto", "reference")}
    for name in ("text_b3_pad", "imgtext_b2_pad_96x128", "mixed_code_text_b2"):
        case = HfCase.read(FOLDER, name)
        everyone = range(case.samples)
        recorded = case.arrays["logits"][case.rows(False, everyone)].double()

        def error(model: OFAPlus, case: HfCase = case, recorded: Tensor = recorded) -> float:
            with torch.no_grad():
                logits = model.logits(model(case.batch(range(case.samples))))
            assert logits.dtype == dtype
            return float((logits.double() - recorded).norm() / recorded.norm())

        assert error(models["auto"]) <= 2 * error(models["reference"]) + torch.finfo(dtype).eps


def test_the_command_notices_a_change(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("config.json", "summary.json", "case_text_b1.safetensors", "model.fp16.safetensors"):
        (tmp_path / name).write_bytes((FOLDER / name).read_bytes())
    report = tmp_path / "report.json"
    assert main(["parity", str(tmp_path), "--json", str(report)]) == 0
    assert list(json.loads(report.read_text())["cases"]) == ["text_b1"]
    case = load_file(tmp_path / "case_text_b1.safetensors")
    case["logits"][0, 0, 0] += 0.01
    save_file(case, tmp_path / "case_text_b1.safetensors")
    assert main(["parity", str(tmp_path)]) == 1 and "DIFFERS" in capsys.readouterr().out
