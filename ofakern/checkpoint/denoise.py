"""Motions by diffusion: the network as a denoiser, its training loss, and sampling with guidance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ofakern.data.batch import IGNORE_LABEL, PackedBatch, PackedSide
from ofakern.errors import OfakernValueError
from ofakern.generate import GenerationConfig
from ofakern.modality.motion.adaptor import MotionAdaptor
from ofakern.modality.motion.diffusion import NoiseSchedule, diffusion_distance, sample_motion
from ofakern.modality.motion.features import orthonormal_features
from ofakern.model import Memory, OFAPlus
from ofakern.nn.loss import LossSums

__all__ = ["MOTION_ADAPTOR", "denoised", "is_motion", "motion_loss", "sampled_motions", "schedule_of"]

MOTION_ADAPTOR = "motion_6d"
TRAIN_STEPS = 1000
_EVALUATION_SEED = 0


def is_motion(side: PackedSide) -> bool:
    """Whether a target is the frames of a motion."""
    return any(values.adaptor == MOTION_ADAPTOR for values in side.segments)


def schedule_of(network: OFAPlus) -> NoiseSchedule:
    """1000 diffusion steps, or as many as the adaptor has noise levels beside the clean one."""
    return NoiseSchedule.cosine(min(TRAIN_STEPS, _adaptor(network).config.max_noise_levels - 1))


def denoised(network: OFAPlus, memory: Memory, side: PackedSide, noisy: Tensor, t: Tensor) -> Tensor:
    """The clean frames `[N, D]` predicted from noisy ones; t int64 `[N]`: each frame's diffusion step."""
    values = side.segments[0]
    noised = replace(side, segments=[replace(values, value=noisy, levels=t + 1)])
    return _adaptor(network).output(network.decode(noised, memory), noisy.shape[1])


def motion_loss(network: OFAPlus, batch: PackedBatch) -> LossSums:
    """The sum over frames of the weighted distance between predicted and clean ones; `nll` is the same, detached.

    Every motion gets a diffusion step and noise from torch's generator, in evaluation from a fixed one.
    """
    side, schedule = batch.target, schedule_of(network)
    values = side.segments[0]
    if len(side.segments) != 1:
        raise OfakernValueError(f"motion_loss: target must be motions only, got {len(side.segments)} kinds")
    generator = None if network.training else torch.Generator().manual_seed(_EVALUATION_SEED)
    clean = values.value
    drawn = torch.randint(schedule.steps, (values.lengths.shape[0],), generator=generator)
    noise = torch.randn(clean.shape, generator=generator).to(clean)
    t = drawn.to(clean.device).repeat_interleave(values.lengths.long(), output_size=clean.shape[0])
    predicted = denoised(network, network.encode(batch.source), side, schedule.noised(clean, noise, t), t)
    distance = diffusion_distance(predicted.float(), clean, schedule.weights(t))
    loss = distance.where(batch.labels != IGNORE_LABEL, 0.0).sum()
    return LossSums(loss, loss.detach(), (batch.labels != IGNORE_LABEL).sum())


def sampled_motions(
    network: OFAPlus, batch: PackedBatch, config: GenerationConfig, seeds: Sequence[int], guided: bool
) -> list[Tensor]:
    """The features `[T, D]` of each target motion, whose segments' values give T and D.

    seeds: of each motion's noise. guided: the batch's second half are the same motions for the empty prompt, and a
    prediction is (1 + w) times the first minus w times the second, w = config.guidance.
    """
    side = batch.target
    memory = network.encode(batch.source)
    noises = [torch.Generator().manual_seed(seed) for seed in seeds]
    lengths = side.lengths_cpu[: len(seeds)]
    width = side.segments[0].value.shape[1]
    start = [torch.randn((n, width), generator=noise) for n, noise in zip(lengths, noises, strict=True)]

    def predict(noisy: Tensor, t: Tensor) -> Tensor:
        if not guided:
            return denoised(network, memory, side, noisy, t)
        with_prompt, without = denoised(network, memory, side, noisy.repeat(2, 1), t.repeat(2)).chunk(2)
        return (1 + config.guidance) * with_prompt - config.guidance * without

    generator = torch.Generator().manual_seed(seeds[0] if seeds else 0)
    found = sample_motion(
        predict,
        torch.cat(start).to(network.device),
        schedule_of(network),
        config.diffusion_steps,
        sampler=config.sampler,
        project=orthonormal_features,
        generator=generator,
    )
    return list(torch.split(found, list(lengths)))


def _adaptor(network: OFAPlus) -> MotionAdaptor:
    adaptor = network.decoder.adaptor.adaptors.get(MOTION_ADAPTOR)
    if not isinstance(adaptor, MotionAdaptor):
        raise OfakernValueError(f"motion: adaptors must include {MOTION_ADAPTOR!r}, got none")
    return adaptor
