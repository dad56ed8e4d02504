"""Recorded parts of OFASys beside its model: the image tokenizer, the diffusion loss and a DDIM sample.

Layout: `vqgan.npz` (weights by formula from `vqgan_keys.json`), `diffusion_loss.npz`, `ddim_sample.npz`; the last two
were made with the model of the folder `main` beside it.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ofakern.checkpoint.denoise import denoised
from ofakern.checkpoint.golden import formula_tensor, load_model, read_json
from ofakern.checkpoint.golden_variants import formula_rule
from ofakern.checkpoint.ofasys import PAD
from ofakern.checkpoint.parity import CaseResult, compare
from ofakern.data.batch import Example, PackedBatch, Segment
from ofakern.errors import DataError
from ofakern.instruction.modality import Modality
from ofakern.modality.image.vqgan import VQGAN, VQGANConfig
from ofakern.modality.motion.diffusion import NoiseSchedule, diffusion_distance, per_motion_mean, sample_motion
from ofakern.modality.motion.features import orthonormal_features
from ofakern.model import OFAPlus

EXTRA_CASES = ("vqgan", "diffusion_loss", "ddim_sample")
_VQGAN_PIXELS = 32
_TRAIN_STEPS = 50  # of the recorded sampler's schedule


def is_extra(directory: Path) -> bool:
    return (directory / "vqgan.npz").is_file()


def extra_runner(directory: Path, backend: str = "auto") -> Callable[[str], CaseResult]:
    """What recomputes one of `EXTRA_CASES`; the model is read when it is first needed."""
    models: list[OFAPlus] = []

    def run(name: str) -> CaseResult:
        arrays = _arrays(directory / f"{name}.npz")
        if name == "vqgan":
            return _vqgan(name, directory, arrays)
        if not models:
            models.append(load_model(directory.parent / "main", backend)[0])
        return (_loss if name == "diffusion_loss" else _sample)(name, models[0], arrays)

    return run


@torch.no_grad()
def _vqgan(name: str, directory: Path, arrays: dict[str, np.ndarray]) -> CaseResult:
    shapes: dict[str, list[int]] = read_json(directory / "vqgan_keys.json")
    weights = {}
    for key, shape in shapes.items():
        full = f"vqgan.{key}"
        weights[key] = formula_tensor(shape, zlib.crc32(full.encode()), *formula_rule(full, shape))
    model = VQGAN(VQGANConfig.from_weights(weights, _VQGAN_PIXELS)).eval()
    model.load_taming(weights)
    image, codes = torch.from_numpy(arrays["image"]), torch.from_numpy(arrays["codes"])
    found = {
        "quant_in": model.latents(image),
        "logits": model.code_logits(image),
        "noiseless_argmax": model.encode(image).view(arrays["noiseless_argmax"].shape),
        "decoded": model.decode(codes),
    }
    group = {"decoded": "decoder", "noiseless_argmax": "codes"}
    checks = [compare(group.get(key, "encoder"), key, value, arrays[key]) for key, value in found.items()]
    return CaseResult(name, checks)


@torch.no_grad()
def _loss(name: str, model: OFAPlus, arrays: dict[str, np.ndarray]) -> CaseResult:
    schedule = NoiseSchedule.cosine(arrays["alphas_cumprod"].shape[0])
    batch, lengths = _batch(arrays, "x_start")
    clean = batch.target.segments[0].value
    noise = torch.cat([torch.from_numpy(row)[:n] for row, n in zip(arrays["noise"], lengths, strict=True)])
    t = torch.repeat_interleave(torch.from_numpy(arrays["t"]), torch.tensor(lengths))
    memory = model.encode(batch.source)
    predicted = denoised(model, memory, batch.target, schedule.noised(clean, noise, t), t)
    distance = diffusion_distance(predicted, clean, schedule.weights(t))
    checks = [
        compare("schedule", "alphas_cumprod", schedule.alphas_cumprod, arrays["alphas_cumprod"]),
        compare("loss", "loss", per_motion_mean(distance, lengths).mean(), arrays["loss"]),
    ]
    return CaseResult(name, checks)


@torch.no_grad()
def _sample(name: str, model: OFAPlus, arrays: dict[str, np.ndarray]) -> CaseResult:
    schedule = NoiseSchedule.cosine(_TRAIN_STEPS)
    batch, lengths = _batch(arrays, "x_T")
    memory = model.encode(batch.source)
    steps = arrays["timesteps"].shape[0]
    start = batch.target.segments[0].value
    found = sample_motion(
        lambda x, t: denoised(model, memory, batch.target, x, t), start, schedule, steps, project=orthonormal_features
    )
    recorded = np.concatenate([row[:n] for row, n in zip(arrays["output"], lengths, strict=True)])
    places = np.array(schedule.timesteps(steps))
    checks = [
        compare("schedule", "timesteps", places, arrays["timesteps"]),
        compare("sample", "output", found, recorded),
    ]
    return CaseResult(name, checks)


def _batch(arrays: dict[str, np.ndarray], motion: str) -> tuple[PackedBatch, list[int]]:
    """The recorded texts and motions, and the frames of each motion."""
    examples, lengths = [], []
    for tokens, frames, padded in zip(arrays["src_tokens"], arrays[motion], arrays["masks"], strict=True):
        text = torch.from_numpy(tokens[tokens != PAD]).long()
        value = torch.from_numpy(frames[~padded]).float()
        lengths.append(value.shape[0])
        target = Segment(1, "motion_6d", int(Modality.MOTION), value)
        labels: Tensor = torch.zeros(value.shape[0], dtype=torch.int64)
        examples.append(Example([Segment(0, "text", int(Modality.TEXT), text)], [target], labels))
    return PackedBatch.collate(examples), lengths


def _arrays(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise DataError(f"parity: recording must have a file {path}, got none")
    with np.load(path) as arrays:
        return {key: arrays[key] for key in arrays.files}
