"""A motion for people: a strip of poses (PNG, SVG) or an animation (GIF), drawn by matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ofakern.errors import DataError, OfakernRuntimeError, OfakernValueError
from ofakern.modality.motion.skeleton import Motion

__all__ = ["save_animation", "save_strip"]

_INCHES = 2.4  # height of a pose
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
    extent = _extent(points)
    widths = [_INCHES * _shape(extent)] * len(moments) + [_INCHES]
    size = (sum(widths) + 0.3, _INCHES + 0.4)
    figure, axes = plt.subplots(1, len(widths), figsize=size, width_ratios=widths, squeeze=False)
    for axis, moment in zip(axes[0], moments, strict=False):
        _draw(axis, motion, points[moment], extent)
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
    extent = _extent(points)
    figure, axis = plt.subplots(figsize=(_INCHES * _shape(extent), _INCHES))

    def draw(number: int) -> list[Any]:
        axis.clear()
        _draw(axis, motion, shown[number], extent)
        return []

    rate = 1.0 / (motion.frame_time * step)
    FuncAnimation(figure, draw, frames=len(shown)).save(str(path), writer=PillowWriter(fps=max(1, round(rate))))
    plt.close(figure)


def _points(motion: Motion) -> np.ndarray:
    if len(motion) == 0:
        raise DataError("motion: picture must have frames to show, got none")
    points: np.ndarray = motion.points().numpy()
    return points


def _seen(points: np.ndarray) -> np.ndarray:
    """`[..., points, 2]` of poses `[..., points, 3]`: from an oblique front, the root in the middle."""
    from_root = points - points[..., :1, :]
    return np.stack([from_root[..., 0] + 0.35 * from_root[..., 2], points[..., 1]], axis=-1)


def _extent(points: np.ndarray) -> tuple[float, float, float]:
    """(lowest, highest) of the height, and how far a pose reaches to either side of its root."""
    seen = _seen(points)
    low, high = float(seen[..., 1].min()), float(seen[..., 1].max())
    return low, max(high, low + 1e-6), max(float(np.abs(seen[..., 0]).max()), 1e-6)


def _shape(extent: tuple[float, float, float]) -> float:
    """Width over height of a pose's picture."""
    low, high, reach = extent
    return float(np.clip(2 * reach / (high - low), 0.4, 2.0))


def _draw(axis: Any, motion: Motion, pose: np.ndarray, extent: tuple[float, float, float]) -> None:
    names = [joint.name.lower() for joint in motion.skeleton.joints]
    seen, (low, high, reach) = _seen(pose), extent
    for first, second in motion.bones():
        name = names[second] if second < len(names) else names[first]
        colour = _LEFT if name.startswith("l") else _RIGHT if name.startswith("r") else _MIDDLE
        axis.plot(*seen[[first, second]].T, color=colour, linewidth=1.8, solid_capstyle="round")
    margin = 0.05 * (high - low)
    axis.set_xlim(-1.05 * reach, 1.05 * reach)
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
