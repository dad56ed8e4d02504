"""Log-mel spectrograms of packed waveforms by the conventions of Kaldi, Whisper and OFASys' speech targets."""

from ofakern.ops.log_mel.api import log_mel
from ofakern.ops.log_mel.convention import MelConvention, kaldi, speech_target, whisper

__all__ = ["MelConvention", "kaldi", "log_mel", "speech_target", "whisper"]
