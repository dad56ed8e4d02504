"""Diffusion over motions: the noise schedule, the training loss, and two samplers that predict the clean motion.

Formulas and defaults are OFASys's: cosine schedule ("squaredcos_cap_v2"), the network predicts x0, the loss is an L1
distance weighted by sqrt(SNR(t) + 1), DDIM steps are evenly spaced. Sources: Nichol and Dhariwal 2021 (schedule), Song
et al. 2021 (DDIM), Ho et al. 2020 (DDPM).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ofakern.errors import OfakernValueError

__all__ = ["SAMPLERS", "NoiseSchedule", "Sampler", "diffusion_distance", "per_motion_mean", "sample_motion"]

Sampler = Literal["ddim", "ddpm"]
SAMPLERS: tuple[Sampler, ...] = ("ddim", "ddpm")
_MAX_BETA = 0.999


@dataclass(frozen=True)
class NoiseSchedule:
    """alphas_cumprod: float32 `[steps]`, the share of signal (variance) left after step t = 0 .. steps - 1."""

    alphas_cumprod: Tensor

    @classmethod
    def cosine(cls, steps: int) -> NoiseSchedule:
        """alpha_bar(t) = cos^2((t + 0.008) / 1.008 * pi / 2), single steps capped at beta = 0.999."""
        if steps < 1:
            raise OfakernValueError(f"NoiseSchedule: steps must be at least 1, got {steps}")

        def kept(share: float) -> float:
            return math.cos((share + 0.008) / 1.008 * math.pi / 2) ** 2

        betas = [min(1 - kept((t + 1) / steps) / kept(t / steps), _MAX_BETA) for t in range(steps)]
        return cls(torch.cumprod(1.0 - torch.tensor(betas, dtype=torch.float32), 0))

    @property
    def steps(self) -> int:
        return self.alphas_cumprod.shape[0]

    def noised(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """sqrt(alpha_bar) clean + sqrt(1 - alpha_bar) noise. clean, noise `[N, D]`, t int64 `[N]`: a step per row."""
        kept = self.alphas_cumprod.to(clean.device)[t][:, None]
        return kept.sqrt() * clean + (1 - kept).sqrt() * noise

    def weights(self, t: Tensor) -> Tensor:
        """sqrt(SNR(t) + 1) = (1 - alpha_bar)^-0.5, `[N]`."""
        return (1 - self.alphas_cumprod.to(t.device)[t]).rsqrt()

    def timesteps(self, count: int) -> list[int]:
        """`count` evenly spaced steps, last first: multiples of steps // count."""
        if not 1 <= count <= self.steps:
            raise OfakernValueError(f"diffusion: diffusion_steps must be in [1, {self.steps}], got {count}")
        stride = self.steps // count
        return [stride * number for number in reversed(range(count))]


def diffusion_distance(predicted: Tensor, clean: Tensor, weights: Tensor) -> Tensor:
    """The loss of each frame `[N]`: mean over its numbers of weights * |predicted - clean|; both `[N, D]`, weights
    `[N]`."""
    return (predicted - clean).abs().mean(1) * weights


def per_motion_mean(distance: Tensor, lengths: Sequence[int]) -> Tensor:
    """`[motions]`: the mean over each motion's frames; OFASys's loss is the mean of these."""
    return torch.stack([part.mean() for part in torch.split(distance, list(lengths))])


def sample_motion(
    predict: Callable[[Tensor, Tensor], Tensor],
    start: Tensor,
    schedule: NoiseSchedule,
    steps: int,
    *,
    sampler: Sampler = "ddim",
    project: Callable[[Tensor], Tensor] | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """From noise `start` `[N, D]` to a clean motion `[N, D]`, in `steps` denoising steps.

    predict(x_t, t): the clean motion; t int64 `[N]`. project: applied to every prediction (rotations are made
    orthonormal). sampler: "ddim" (deterministic) or "ddpm" (adds noise at every step, drawn from `generator`).
    Raises OfakernValueError for another sampler or more steps than the schedule has.
    """
    if sampler not in SAMPLERS:
        raise OfakernValueError(f"diffusion: sampler must be one of {', '.join(SAMPLERS)}, got {sampler!r}")
    alphas = schedule.alphas_cumprod.double()
    x, places = start, schedule.timesteps(steps)
    for place, t in enumerate(places):
        clean = predict(x, torch.full((x.shape[0],), t, device=x.device))
        clean = clean if project is None else project(clean)
        last = place + 1 == len(places)
        now, then = float(alphas[t]), 1.0 if last else float(alphas[places[place + 1]])
        x = _ddim(x, clean, now, then) if sampler == "ddim" else _ddpm(x, clean, now, then, generator)
    return x


def _ddim(x: Tensor, clean: Tensor, now: float, then: float) -> Tensor:
    noise = (x - math.sqrt(now) * clean) / math.sqrt(1 - now)
    return math.sqrt(then) * clean + math.sqrt(1 - then) * noise


def _ddpm(x: Tensor, clean: Tensor, now: float, then: float, generator: torch.Generator | None) -> Tensor:
    """A draw from q(x_then | x_now, x0)."""
    step = now / then
    mean = (math.sqrt(then) * (1 - step) * clean + math.sqrt(step) * (1 - then) * x) / (1 - now)
    variance = (1 - then) / (1 - now) * (1 - step)
    if variance == 0:
        return mean
    noise = torch.randn(x.shape, generator=generator, dtype=x.dtype)
    return mean + math.sqrt(variance) * noise.to(x.device)
