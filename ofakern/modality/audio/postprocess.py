"""Written speech: the frames a model gave, as sound, as files, and as a picture for people."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from ofakern.errors import OfakernRuntimeError
from ofakern.modality.audio.features import HOP, griffin_lim

__all__ = ["Speech"]


@dataclass(frozen=True)
class Speech:
    """One utterance.

    features: f32 `[frames, 80]`, natural logarithms of mel magnitudes. stop: f32 `[steps]`, the probability that a step
    is the last. rate: samples a second of its sound.
    """

    features: Tensor
    stop: Tensor
    rate: int

    @property
    def seconds(self) -> float:
        """How long it lasts."""
        return self.features.shape[0] * HOP / self.rate

    def summary(self) -> dict[str, float | int]:
        """What a line can say about it: seconds, frames, rate."""
        return {"seconds": round(self.seconds, 3), "frames": self.features.shape[0], "rate": self.rate}

    def waveform(self, iterations: int = 32) -> Tensor:
        """f32 `[N]` by Griffin and Lim's method. It sounds metallic: a vocoder on `features` does better."""
        return griffin_lim(self.features, self.rate, iterations)

    def save_audio(self, path: str | Path, iterations: int = 32) -> None:
        """Writes the waveform; the format follows the suffix. Raises OfakernRuntimeError without soundfile."""
        try:
            import soundfile
        except (ImportError, OSError) as error:
            raise OfakernRuntimeError(
                f"Speech.save_audio: soundfile must be installed, got: {error}\nTry: pip install ofakern[audio]"
            ) from error
        wave = self.waveform(iterations).clamp(-1.0, 1.0).numpy()
        soundfile.write(str(path), wave, self.rate)

    def save_features(self, path: str | Path) -> None:
        """Writes the features as a `.npy` file, what a vocoder takes."""
        np.save(path, self.features.numpy())

    def save_picture(self, path: str | Path) -> None:
        """Writes the spectrogram as a picture, and under it the stop signal. OfakernRuntimeError without matplotlib."""
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise OfakernRuntimeError(
                f"Speech.save_picture: matplotlib must be installed, got: {error}\nTry: pip install matplotlib"
            ) from error
        figure = Figure(figsize=(8.0, 4.0), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
        end = self.seconds
        image = above.imshow(
            self.features.T.numpy(), origin="lower", aspect="auto", extent=(0.0, end, 0, self.features.shape[1])
        )
        figure.colorbar(image, ax=above, label="log magnitude")
        above.set_ylabel("mel bin")
        times = np.linspace(0.0, end, self.stop.shape[0])
        below.plot(times, self.stop.numpy(), color="tab:red")
        below.set(xlabel="seconds", ylabel="stop", ylim=(-0.05, 1.05))
        figure.savefig(path)
