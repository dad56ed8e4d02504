"""Motions by diffusion: the network as a denoiser, its training loss, and sampling with guidance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ofakern.checkpoint.known_task import TaskLike
from ofakern.data.batch import IGNORE_LABEL, Example, PackedBatch, PackedSide
from ofakern.data.example import ROW_NUMBER, Encoder, unprompted
from ofakern.data.readers import open_files
from ofakern.errors import DataError, OfakernValueError
from ofakern.generate import GenerationConfig
from ofakern.modality.motion.adaptor import MotionAdaptor, MotionConfig
from ofakern.modality.motion.diffusion import NoiseSchedule, diffusion_distance, sample_motion
from ofakern.modality.motion.features import orthonormal_features
from ofakern.modality.motion.preprocess import MotionClip, MotionSettings, load_motion
from ofakern.modality.motion.skeleton import Motion
from ofakern.model import Memory, OFAConfig, OFAPlus
from ofakern.nn.loss import LossSums
from ofakern.plan import PlanSlot

__all__ = ["denoised", "is_motion", "learnt_settings", "made_motions", "motion_loss", "within_positions"]

MOTION_ADAPTOR = "motion_6d"
TRAIN_STEPS = 1000
DEFAULT_FRAMES = 120
_EVALUATION_SEED = 0
_STRIDE = 1_000_003  # between the seeds of rows and of answers


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


def made_motions(
    network: OFAPlus, encoder: Encoder, slot: PlanSlot, examples: Sequence[Example], config: GenerationConfig
) -> list[list[Motion]]:
    """`config.num_return_sequences` motions for each example of inference."""
    settings, clip = encoder.config.motion, MotionClip.of(dict(slot.attributes))
    coder = settings.coder()
    frames = config.frames or clip.max_length or DEFAULT_FRAMES
    if frames > settings.max_frames:
        raise OfakernValueError(f"inference: frames must be at most {settings.max_frames}, got {frames}")
    asked = [_with_frames(example, frames, coder.width) for example in examples]
    if config.guidance:
        empty = [encoder(unprompted(encoder.plans[0], e.columns), e.columns[ROW_NUMBER]) for e in examples]
        asked += [_with_frames(example, frames, coder.width) for example in empty]
    batch = PackedBatch.collate(asked).to(network.device)
    made: list[list[Motion]] = [[] for _ in examples]
    for number in range(config.num_return_sequences):
        rows = [int(example.columns[ROW_NUMBER]) for example in examples]
        seeds = [(config.seed * _STRIDE + row) * _STRIDE + number for row in rows]
        features = sampled_motions(network, batch, config, seeds, guided=bool(config.guidance))
        for found, values in zip(made, features, strict=True):
            found.append(coder.decode(values, settings.frame_time * clip.sample_rate))
    return made


def learnt_settings(settings: MotionSettings, tasks: Sequence[TaskLike]) -> MotionSettings:
    """With the skeleton and frame rate of the first motion that can be read in the tasks' training rows, if any."""
    for task in tasks:
        files = open_files(task.files)
        for value in task.motions():
            try:
                found = MotionSettings.of(load_motion(value, files=files))
            except DataError:
                continue  # reported when the row is drawn
            return replace(found, max_frames=settings.max_frames, drop_prompt=settings.drop_prompt)
    return settings


def within_positions(settings: MotionSettings, config: OFAConfig) -> MotionSettings:
    """With no more frames than the adaptor has positions."""
    limits = [adaptor.max_position for adaptor in config.adaptors if isinstance(adaptor, MotionConfig)]
    return replace(settings, max_frames=min([settings.max_frames, *limits]))


def _with_frames(example: Example, frames: int, width: int) -> Example:
    target = replace(example.target[0], value=torch.zeros(frames, width))
    return replace(example, target=[target], labels=torch.full((frames,), IGNORE_LABEL))


def _adaptor(network: OFAPlus) -> MotionAdaptor:
    adaptor = network.decoder.adaptor.adaptors.get(MOTION_ADAPTOR)
    if not isinstance(adaptor, MotionAdaptor):
        raise OfakernValueError(f"motion: adaptors must include {MOTION_ADAPTOR!r}, got none")
    return adaptor
