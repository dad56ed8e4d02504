"""The loss of written speech: frames before and after the post-net, and the stop signal (OFASys's `ofa_tacotron2`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ofakern.errors import OfakernValueError
from ofakern.modality.audio.speech import SpeechOutput
from ofakern.nn.loss import IGNORE_LABEL, LossSums

__all__ = ["guided_attention", "speech_loss"]


def speech_loss(
    output: SpeechOutput,
    frames: Tensor,
    labels: Tensor,
    stop_weight: float = 1.0,
    guide: Tensor | None = None,
) -> LossSums:
    """Sum over labelled steps of L1 + MSE of both frames (means over a step's F values) and the stop's cross entropy.

    output: of N steps. frames f32 `[N, F]`: the truth. labels int64 `[N]`: 1 at a last step, 0 before, -100: no loss.
    stop_weight: of last steps in the cross entropy. guide: `guided_attention` (times a weight), added once per step.
    Computed in float32. Its `parts` are the sums of l1, mse and stop, and of attention where there is a guide.
    Divided by the number of steps it is OFASys's loss, which is a mean. Raises OfakernValueError for shapes that do not
    agree.
    """
    if not (output.feature.shape == output.post.shape == frames.shape and labels.shape == frames.shape[:1]):
        raise OfakernValueError(
            f"speech_loss: frames and labels must fit the output, {list(output.feature.shape)} and "
            f"[{output.feature.shape[0]}], got {list(frames.shape)} and {list(labels.shape)}"
        )
    kept = (labels != IGNORE_LABEL).nonzero()[:, 0]
    truth, last = frames[kept].float(), labels[kept].float()
    l1 = mse = torch.zeros((), device=frames.device)
    for found in (output.feature, output.post):
        difference = found[kept].float() - truth
        l1 = l1 + difference.abs().mean(1).sum()
        mse = mse + difference.square().mean(1).sum()
    weight = torch.tensor(stop_weight, device=frames.device)
    stop = F.binary_cross_entropy_with_logits(output.stop[kept].float(), last, pos_weight=weight, reduction="sum")
    loss = l1 + mse + stop
    parts = {"l1": l1.detach(), "mse": mse.detach(), "stop": stop.detach()}
    if guide is not None:
        attention = guide * kept.shape[0]
        loss, parts = loss + attention, {**parts, "attention": attention.detach()}
    return LossSums(loss, loss.detach(), torch.tensor(kept.shape[0], device=labels.device), parts)


def guided_attention(attention: Sequence[Tensor], sigma: float = 0.4) -> Tensor:
    """The mean over all samples' pairs of attention times how far a pair lies from the diagonal: speech and text go
    together from the first to the last.

    attention: per sample `[T, S]`, what step t gives to token s; its weight is 1 - exp(-(s/S - t/T)^2 / (2 sigma^2)).
    Source: Tachibana et al. 2018, arXiv:1710.08969, section 4.1; OFASys's `use_guided_attention_loss`.
    """
    if sigma <= 0:
        raise OfakernValueError(f"guided_attention: sigma must be above 0, got {sigma}")
    total = torch.zeros(())
    for one in attention:
        steps, tokens = one.shape
        t = torch.arange(steps, device=one.device)[:, None] / steps
        s = torch.arange(tokens, device=one.device) / tokens
        total = total.to(one.device) + (one * (1.0 - torch.exp(-((s - t) ** 2) / (2 * sigma**2)))).sum()
    return total / max(1, sum(one.numel() for one in attention))
