"""`log_mel`: packed waveforms to packed log-mel frames."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ofakern.errors import OfakernError, OfakernTypeError, OfakernValueError
from ofakern.ops.library import STRAIGHT, straight
from ofakern.ops.log_mel import op
from ofakern.ops.log_mel.convention import MelConvention
from ofakern.ops.log_mel.reference import log_mel_reference
from ofakern.ops.selection import Backends

BACKENDS = Backends("log_mel", "log_mel_forward", dtypes=(torch.float32,), cuda="log_mel")


def log_mel(
    wave: Tensor, lengths: Sequence[int] | None = None, *, convention: MelConvention, backend: str = "auto"
) -> Tensor:
    """Log-mel frames of waveforms that stand end to end.

    wave: float32 `[N]` (float64 goes to the reference); lengths: samples per waveform, summing to N (None: one
    waveform). Gives `[F, n_mels]`, waveform after waveform, `convention.frames(length)` rows each. A waveform's frames
    never see another waveform. Kernels give no gradient.

    Raises OfakernValueError for a wrong shape or lengths, OfakernTypeError for a wrong type, BackendError when the
    named backend cannot run the call.
    """
    plain = type(convention) is MelConvention and straight(backend, wave)
    if plain and wave is not None and wave.dim() == 1 and not wave.requires_grad:
        try:
            return op.run(STRAIGHT, wave, _lengths(wave, lengths, convention), convention)
        except OfakernError:
            pass  # refused: the checks below say why, or take the reference
    lengths = _check(wave, lengths, convention)
    chosen = BACKENDS.select(backend, wave, _limit(wave, convention))
    if chosen == "reference":
        return _reference(wave, lengths, convention)
    return op.run(chosen, wave, lengths, convention)


def refusals(
    wave: Tensor, lengths: Sequence[int] | None = None, *, convention: MelConvention, backend: str = "auto"
) -> tuple[str, dict[str, str | None]]:
    """The backend that a call asks for, and each backend's reason against it; raises as the call would."""
    _check(wave, lengths, convention)
    return BACKENDS.reasons(backend, wave, _limit(wave, convention))


def _check(wave: Tensor, lengths: Sequence[int] | None, convention: MelConvention) -> list[int]:
    if not isinstance(wave, Tensor) or not wave.is_floating_point():
        got = wave.dtype if isinstance(wave, Tensor) else type(wave).__name__
        raise OfakernTypeError(f"log_mel: wave must be a floating-point tensor, got {got}")
    if not isinstance(convention, MelConvention):
        raise OfakernTypeError(f"log_mel: convention must be a MelConvention, got {type(convention).__name__}")
    if wave.dim() != 1:
        raise OfakernValueError(
            f"log_mel: wave must be [N], all waveforms end to end, got {list(wave.shape)}\n"
            "Try: torch.cat of one-dimensional waveforms, and their lengths."
        )
    return _lengths(wave, lengths, convention)


def _lengths(wave: Tensor, lengths: Sequence[int] | None, convention: MelConvention) -> list[int]:
    """Of a waveform per entry; wave has one dimension."""
    if lengths is None:
        lengths = [wave.shape[0]]
    else:
        lengths = [int(n) for n in lengths]
        if min(lengths, default=0) < 0 or sum(lengths) != wave.shape[0]:
            raise OfakernValueError(f"log_mel: lengths must be >= 0 and sum to {wave.shape[0]}, got {lengths}")
    if convention.edges == "reflect":
        least = convention.frame // 2 + 1
        if any(0 < n < least for n in lengths):
            raise OfakernValueError(
                f"log_mel: lengths must be 0 or at least {least} (half a frame is reflected), got {lengths}"
            )
    return lengths


def _limit(wave: Tensor, convention: MelConvention) -> str | None:
    if wave.requires_grad and torch.is_grad_enabled():
        return "gives no gradient, got a wave that requires one"
    return op.limit(convention)


def _reference(wave: Tensor, lengths: list[int], c: MelConvention) -> Tensor:
    return log_mel_reference(
        wave,
        lengths,
        [c.frames(n) for n in lengths],
        c.tables.window,
        c.tables.filters,
        hop=c.hop,
        n_fft=c.n_fft,
        first_sample=c.first_sample,
        mirror_repeats_edge=c.edges == "mirror",
        remove_dc=c.remove_dc,
        preemphasis=c.preemphasis,
        power=c.power,
        log=c.log,
        floor=c.floor,
    )
