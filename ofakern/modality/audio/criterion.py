"""The loss of written speech: frames before and after the post-net, and the stop signal (OFASys's `ofa_tacotron2`)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ofakern.errors import OfakernValueError
from ofakern.modality.audio.speech import SpeechOutput
from ofakern.nn.loss import IGNORE_LABEL, LossSums

__all__ = ["speech_loss"]


def speech_loss(output: SpeechOutput, frames: Tensor, labels: Tensor, stop_weight: float = 1.0) -> LossSums:
    """Sum over labelled steps of L1 + MSE of both frames (means over a step's F values) and the stop's cross entropy.

    output: of N steps. frames f32 `[N, F]`: the truth. labels int64 `[N]`: 1 at a last step, 0 before, -100: no loss.
    stop_weight: of last steps in the cross entropy. Computed in float32. Its `parts` are the sums of l1, mse and stop.
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
    return LossSums(loss, loss.detach(), torch.tensor(kept.shape[0], device=labels.device), parts)
