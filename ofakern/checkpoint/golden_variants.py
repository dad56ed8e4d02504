"""Recorded flag variants of OFASys: one small model per set of flags, weights by formula, one shared set of inputs.

Layout: `index.json` (name -> ok), `inputs.npz`, and per variant `<name>.json` (configuration, keys, loss, gradient
norms, answers) and `<name>.npz` (encoder and decoder outputs for batches of 1 and 2).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ofakern.checkpoint.golden import formula_tensor, read_json
from ofakern.checkpoint.ledger import Ledger
from ofakern.checkpoint.ofasys import EMBEDDING, PAD, config_from_ofasys, load_ofasys_weights
from ofakern.checkpoint.parity import CaseResult, compare, gradient_norm_checks
from ofakern.data.batch import IGNORE_LABEL, Example, PackedBatch, Segment
from ofakern.errors import DataError, OfakernError
from ofakern.generate import GenerationConfig, generate
from ofakern.instruction.modality import Modality
from ofakern.modality.audio.adaptor import tokens_in_ofasys, tokens_of
from ofakern.model import OFAPlus
from ofakern.nn.loss import label_smoothed_cross_entropy

INPUTS = "inputs.npz"
_SOURCES = {
    "audio": ("audio_fbank", Modality.AUDIO, "fbank"),
    "patch": ("image_patch_embed", Modality.IMAGE, "image32"),
    "vit": ("image_vit", Modality.IMAGE, "image64"),
    "resnet": ("image_resnet", Modality.IMAGE, "image64"),
}
_MAX_ANSWER = 8


def is_variants(directory: Path) -> bool:
    return (directory / INPUTS).is_file()


def formula_rule(key: str, shape: list[int]) -> tuple[float, float]:
    """(offset, std) by which the recording drew a tensor, from its key and shape."""
    last = key.rsplit(".", 1)[-1]
    if last in ("running_mean", "running_var"):
        return (0.0, 0.1) if last == "running_mean" else (1.0, 0.2)
    if last in ("c_attn", "w_resid", "pos_emb_alpha"):
        return 1.0, 0.3
    if "rel_pos_table" in key:
        return 0.0, 0.5
    if key == "decoder.layer_norm.weight":
        return 0.0, 1.0
    if last == "weight" and len(shape) == 1:
        return (0.3, 0.06) if ".bn3." in key else (1.0, 0.2)
    if last == "bias":
        return 0.0, 0.1
    if "embed_tokens" in key:
        return 0.0, 0.3
    embeddings = ("type_embedding", "cls_token", "mask_emb", "noise_level_emb", "positional_embedding")
    if any(name in key for name in embeddings) or ("embed_" in key and "position" in key):
        return 0.0, 0.5
    fan_in = math.prod(shape[1:])
    if "decoder.layers" in key and last == "weight" and len(shape) == 2:
        return 0.0, 1.6 / math.sqrt(fan_in)
    if len(shape) >= 2:
        return 0.0, math.sqrt(2.0 if len(shape) == 4 else 1.0) / math.sqrt(fan_in)
    return 0.0, 0.3


def formula_weights(shapes: Mapping[str, list[int]]) -> dict[str, Tensor]:
    """All recorded tensors; integer buffers as zeros (nothing reads them); the tied copy is its owner."""
    integers = ("_rp_bucket", "_position_idx", "num_batches_tracked", "version")
    weights = {}
    for key, shape in shapes.items():
        if key.endswith(integers):
            weights[key] = torch.zeros((), dtype=torch.int64)
        elif key != "decoder.adaptor.embed_tokens.weight":
            weights[key] = formula_tensor(shape, zlib.crc32(key.encode()), *formula_rule(key, shape))
    weights["decoder.adaptor.embed_tokens.weight"] = weights[EMBEDDING]
    return weights


class Variant:
    """A variant's recording and its batches."""

    def __init__(self, directory: Path, name: str) -> None:
        self.name = name
        self.meta = read_json(directory / f"{name}.json")
        self.inputs = _arrays(directory / INPUTS)
        self.arrays = _arrays(directory / f"{name}.npz") if self.meta.get("ok", True) else {}

    def model(self, compat: str = "ofasys", backend: str = "auto") -> OFAPlus:
        """The variant's model in eval mode. Raises an OfakernError when these flags make no model."""
        options = {**self.meta["config_model"], "adaptor": self.meta["config_adaptors"]}
        keys = self.meta["keys"]
        config, missing = config_from_ofasys(options, keys[EMBEDDING][0], compat)
        model = OFAPlus(config, backend=backend).eval()
        load_ofasys_weights(model, Ledger(formula_weights(keys), self.name), missing)
        return model

    def batch(self, samples: int, compat: str = "ofasys") -> PackedBatch:
        """The first `samples` samples, audio lengths as that implementation counts them or as they are."""
        return PackedBatch.collate([self._example(b, compat) for b in range(samples)])

    def kept(self, samples: int) -> tuple[list[np.ndarray], list[int]]:
        """Per sample the recorded source positions that are not padding, and its number of target tokens."""
        masks = self.arrays[f"B{samples}.encoder_padding_mask"]
        lengths = (self.inputs["prev_output_tokens"][:samples] != PAD).sum(1)
        return [np.flatnonzero(~mask) for mask in masks], lengths.tolist()

    def _example(self, b: int, compat: str) -> Example:
        adaptor, modality, array = _SOURCES[self.meta["kind"]]
        value = torch.from_numpy(self.inputs[array][b])
        if adaptor == "audio_fbank":
            frames, padded = int(self.inputs["fbank_lengths"][b]), value.shape[0]
            length = tokens_in_ofasys(frames, padded) if compat else tokens_of(frames)
            first = Segment(0, adaptor, int(modality), value if compat else value[:frames], length)
        else:
            patch = adaptor == "image_patch_embed"
            first = Segment(0, adaptor, int(modality), value, self._image_tokens(value, patch))
        target = _tokens(self.inputs["prev_output_tokens"][b])
        labels = torch.from_numpy(self.inputs["target"][b]).long()[: len(target)]
        text = Segment(1, "text", int(Modality.TEXT), _tokens(self.inputs["src_tokens"][b]))
        return Example(
            [first, text],
            [Segment(2, "text", int(Modality.TEXT), target)],
            labels.masked_fill(labels == PAD, IGNORE_LABEL),
        )

    def _image_tokens(self, value: Tensor, patch: bool) -> int:
        recorded = int(self.arrays["B1.encoder_padding_mask"].shape[1])
        return recorded - int((self.inputs["src_tokens"][0] != PAD).sum()) if patch else (value.shape[1] // 16) ** 2


def run_variant(directory: Path, name: str, backend: str = "auto") -> CaseResult:
    """All checks of a variant, for a batch of one and of two."""
    variant = Variant(directory, name)
    result = CaseResult(name)
    if not variant.meta.get("ok", True):
        result.unavailable = f"the recording is an error of OFASys ({variant.meta.get('error', '')}); {_ours(variant)}"
        return result
    model = variant.model(backend=backend)
    for samples in (1, 2):
        _run_batch(model, variant, samples, result)
    return result


def _ours(variant: Variant) -> str:
    try:
        variant.model()
    except OfakernError as error:
        return f"here: {str(error).splitlines()[0]}"
    return "here the patches simply have no relative bias"


def _run_batch(model: OFAPlus, variant: Variant, samples: int, result: CaseResult) -> None:
    arrays, meta, group = variant.arrays, variant.meta, f"batch of {samples}"
    batch = variant.batch(samples)
    rows, lengths = variant.kept(samples)
    model.zero_grad(set_to_none=True)
    memory = model.encode(batch.source)
    hidden = model.decode(batch.target, memory)
    encoder = arrays[f"B{samples}.encoder_out"]
    recorded = {
        "encoder_out": np.concatenate([encoder[at, b] for b, at in enumerate(rows)]),
        "position_embeddings": np.concatenate(
            [arrays[f"B{samples}.position_embeddings"][b, at] for b, at in enumerate(rows)]
        ),
    }
    for key in ("last_hidden_state", "logits"):
        recorded[key] = np.concatenate([arrays[f"B{samples}.{key}"][b, :n] for b, n in enumerate(lengths)])
    logits = model.logits(hidden)
    ours = {
        "encoder_out": memory.states,
        "position_embeddings": memory.positions,
        "last_hidden_state": hidden,
        "logits": logits,
    }
    result.checks += [compare(group, key, ours[key], value) for key, value in recorded.items()]
    sums = label_smoothed_cross_entropy(hidden, model.output_weight, batch.labels)
    result.checks.append(compare(group, "loss", sums.loss.detach(), np.array(meta[f"B{samples}.loss_sum"])))
    sums.loss.backward()  # type: ignore[no-untyped-call]
    gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    result.checks += gradient_norm_checks(meta[f"B{samples}.grad_norms"], gradients)
    model.zero_grad(set_to_none=True)
    for name, beams in (("beam5", 5), ("greedy", 1)):
        answers = meta.get(f"B{samples}.{name}")
        if answers:
            result.checks += _answer_checks(model, batch, answers, beams, f"{group}, {name}")


def _answer_checks(model: OFAPlus, batch: PackedBatch, answers: Any, beams: int, group: str) -> list[Any]:
    config = GenerationConfig(
        num_beams=beams,
        num_return_sequences=beams,
        max_new_tokens=_MAX_ANSWER,
        length_penalty=0.0,
        no_repeat_ngram_size=3 if beams > 1 else 0,  # OFASys's default
        compat="ofasys",
    )
    with torch.no_grad():
        found = generate(model, model.encode(batch.source), batch.samples, config)
    checks = []
    for b, sample in enumerate(answers):
        for n, expected in enumerate(sample):
            tokens = np.array(found[b][n].tokens)
            checks.append(compare(group, f"tokens {b}.{n}", tokens, np.array(expected["tokens"])))
            checks.append(compare(group, f"score {b}.{n}", np.array(found[b][n].score), np.array(expected["score"])))
    return checks


def _tokens(values: np.ndarray) -> Tensor:
    tokens = torch.from_numpy(values).long()
    return tokens[tokens != PAD]


def _arrays(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise DataError(f"parity: recording must have a file {path}, got none")
    with np.load(path) as arrays:
        return {key: arrays[key] for key in arrays.files}
