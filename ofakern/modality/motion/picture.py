"""A motion for people: a strip of poses (PNG, SVG) or an animation (GIF), drawn by matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ofakern.errors import DataError, OfakernRuntimeError, OfakernValueError
from ofakern.modality.motion.skeleton import Motion

__all__ = ["save_animation", "save_strip"]

_LEFT, _RIGHT, _MIDDLE = "#1f77b4", "#d62728", "#333333"


def save_strip(motion: Motion, path: str | Path, poses: int = 8) -> None:
    """`poses` moments of the motion side by side, and the root's way over the ground. The format follows the suffix.

    Raises DataError for a motion without frames, OfakernRuntimeError without matplotlib.
    """
    if poses < 1:
        raise OfakernValueError(f"save_strip: poses must be at least 1, got {poses}")
    plt = _pyplot()
    points = _points(motion)
    moments = np.linspace(0, len(points) - 1, min(poses, len(points))).round().astype(int)
    figure, axes = plt.subplots(1, len(moments) + 1, figsize=(1.6 * (len(moments) + 1), 3.0), squeeze=False)
    low, high, reach = _extent(points)
    for axis, moment in zip(axes[0], moments, strict=False):
        _draw(axis, motion, points[moment], low, high, reach)
        axis.set_title(f"{moment * motion.frame_time:.2f} s", fontsize=9)
    _draw_way(axes[0][-1], points[:, 0], moments)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def save_animation(motion: Motion, path: str | Path, frames: int = 60) -> None:
    """A GIF of at most `frames` frames, as fast as the motion. Raises as `save_strip`."""
    plt = _pyplot()
    from matplotlib.animation import FuncAnimation, PillowWriter

    points = _points(motion)
    step = max(1, -(-len(points) // max(frames, 1)))
    shown = points[::step]
    figure, axis = plt.subplots(figsize=(2.6, 3.2))
    extent = _extent(points)

    def draw(number: int) -> list[Any]:
        axis.clear()
        _draw(axis, motion, shown[number], *extent)
        return []

    rate = 1.0 / (motion.frame_time * step)
    FuncAnimation(figure, draw, frames=len(shown)).save(str(path), writer=PillowWriter(fps=max(1, round(rate))))
    plt.close(figure)


def _points(motion: Motion) -> np.ndarray:
    if len(motion) == 0:
        raise DataError("motion: picture must have frames to show, got none")
    points: np.ndarray = motion.points().numpy()
    return points


def _extent(points: np.ndarray) -> tuple[float, float, float]:
    """(lowest, highest) of the height, and how far a pose reaches to either side of its root."""
    reach = np.abs(points[:, :, [0, 2]] - points[:, :1, [0, 2]]).max()
    return float(points[..., 1].min()), float(points[..., 1].max()), float(reach)


def _draw(axis: Any, motion: Motion, pose: np.ndarray, low: float, high: float, reach: float) -> None:
    """A pose from an oblique front, its root in the middle."""
    names = [joint.name.lower() for joint in motion.skeleton.joints]
    side = (pose[:, 0] - pose[0, 0]) + 0.35 * (pose[:, 2] - pose[0, 2])
    for first, second in motion.bones():
        name = names[second] if second < len(names) else names[first]
        colour = _LEFT if name.startswith("l") else _RIGHT if name.startswith("r") else _MIDDLE
        axis.plot(side[[first, second]], pose[[first, second], 1], color=colour, linewidth=1.8, solid_capstyle="round")
    margin = 0.05 * max(high - low, 1e-9)
    axis.set_xlim(-1.35 * reach, 1.35 * reach)
    axis.set_ylim(low - margin, high + margin)
    axis.set_aspect("equal")
    axis.axis("off")


def _draw_way(axis: Any, root: np.ndarray, moments: np.ndarray) -> None:
    axis.plot(root[:, 0], root[:, 2], color="#888888", linewidth=1.2)
    axis.scatter(root[moments, 0], root[moments, 2], c=np.arange(len(moments)), cmap="coolwarm", s=18, zorder=3)
    axis.set_aspect("equal", adjustable="datalim")
    axis.set_title("way (from above)", fontsize=9)
    axis.tick_params(labelsize=6)


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise OfakernRuntimeError(
            "motion: matplotlib must be installed to draw a motion, got none\nTry: pip install 'ofakern[bench]'"
        ) from error
    matplotlib.use("Agg", force=False)
    import matplotlib.pyplot as plt

    return plt
