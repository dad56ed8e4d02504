"""A motion as the network sees it: D = 6 + 6 J numbers per frame, OFASys's `motion_6d`.

[0:3] the root's position; [3:6] how the root moved since the frame before, seen in its own heading, times 100; [6:]
each joint's rotation as its matrix's first two columns. On the way back x and z follow from the summed movement, the
height is taken as it stands.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ofakern.errors import DataError
from ofakern.modality.motion.rotations import axis_rotation, matrix_to_euler
from ofakern.modality.motion.skeleton import Motion, Skeleton
from ofakern.ops.rotation_6d import rotation_6d, rotation_6d_of

__all__ = ["MotionCoder", "heading", "orthonormal_features"]

_PLACE, _SPEED, _TURNS = slice(0, 3), slice(3, 6), 6
_SPEED_FACTOR = 100.0


@dataclass(frozen=True)
class MotionCoder:
    """skeleton: that all motions have; scale: its unit in metres (positions are multiplied by it)."""

    skeleton: Skeleton
    scale: float = 1.0

    @property
    def width(self) -> int:
        """D, the numbers per frame."""
        return _TURNS + 6 * len(self.skeleton.joints)

    def encode(self, motion: Motion, anchor: int | None = None, where: str = "motion") -> Tensor:
        """float32 `[T, D]`. anchor: the frame whose heading and place (x, z) become the origin.

        Raises DataError for a motion of another skeleton.
        """
        names, own = ([joint.name for joint in s.joints] for s in (motion.skeleton, self.skeleton))
        if names != own:
            raise DataError(
                f"{where}: motion must have the model's skeleton of {len(own)} joints ({', '.join(own[:3])}, ...), "
                f"got {len(names)} ({', '.join(names[:3])}, ...)"
            )
        place, turns = motion.root() * self.scale, motion.rotations()
        if anchor is not None and len(motion):
            place, turns = _anchored(place, turns, min(anchor, len(motion) - 1))
        speed = torch.zeros_like(place)
        speed[1:] = place[1:] - place[:-1]
        back = axis_rotation("Y", -heading(turns[:, 0]))
        local = (back @ speed[:, :, None])[:, :, 0] * _SPEED_FACTOR
        return torch.cat([place, local, rotation_6d_of(turns).flatten(1)], dim=1).float()

    def decode(self, features: Tensor, frame_time: float) -> Motion:
        """The motion of predicted features `[T, D]`, whatever numbers they are."""
        wide = features.detach().cpu().double()
        turns = rotation_6d(_sixd(wide))
        forward = axis_rotation("Y", heading(turns[:, 0]))
        moved = (forward @ wide[:, _SPEED, None])[:, :, 0] / _SPEED_FACTOR
        place = wide[:, _PLACE].clone()
        if len(place):
            moved[0] = place[0]
            place[:, [0, 2]] = moved[:, [0, 2]].cumsum(0)
        return Motion(self.skeleton, self._frames(place / self.scale, turns), frame_time)

    def _frames(self, place: Tensor, turns: Tensor) -> Tensor:
        columns = []
        for number, joint in enumerate(self.skeleton.joints):
            order = joint.order
            angles = matrix_to_euler(turns[:, number], order).rad2deg() if order else None
            offset = torch.tensor(joint.offset, dtype=torch.float64)
            for channel in joint.channels:
                axis = "XYZ".index(channel[0])
                if angles is not None and channel.endswith("rotation"):
                    columns.append(angles[:, order.index(channel[0])])
                else:  # only the root moves: other joints stay at their offset
                    columns.append(place[:, axis] if number == 0 else offset[axis].expand(len(place)))
        return torch.stack(columns, dim=1)


def heading(root: Tensor) -> Tensor:
    """The angle about the vertical axis `[T]` (radians) of rotations `[T, 3, 3]`: where their x axis points."""
    return torch.atan2(-root[:, 2, 0], root[:, 0, 0])


def orthonormal_features(features: Tensor) -> Tensor:
    """Predicted features `[N, D]` with every rotation made one."""
    turns = rotation_6d(_sixd(features))
    return torch.cat([features[:, :_TURNS], rotation_6d_of(turns).flatten(1)], dim=1)


def _sixd(features: Tensor) -> Tensor:
    """`[N, J, 6]`."""
    return features[:, _TURNS:].reshape(len(features), features.shape[1] // 6 - 1, 6)


def _anchored(place: Tensor, turns: Tensor, anchor: int) -> tuple[Tensor, Tensor]:
    """Turned about the vertical axis and moved along the ground so that the anchor's heading and place are zero."""
    back = axis_rotation("Y", -heading(turns[anchor : anchor + 1, 0]))[0]
    origin = place[anchor] * torch.tensor([1.0, 0.0, 1.0], dtype=place.dtype)
    turned = turns.clone()
    turned[:, 0] = back @ turns[:, 0]
    return (place - origin) @ back.T, turned
