"""Rotations: Euler angles in any axis order and 3 x 3 matrices. (Their 6-D form is the op rotation_6d.)"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["axis_rotation", "euler_to_matrix", "matrix_to_euler"]

_AXES = "XYZ"
_NEARLY_UP = 1.0 - 1e-7  # sine of a middle angle beyond which the outer two turn about the same axis


def axis_rotation(axis: str, angle: Tensor) -> Tensor:
    """Rotations about one axis ("X", "Y", "Z") by angles in radians: `[...]` to `[..., 3, 3]`."""
    k = _AXES.index(axis)
    i, j = (k + 1) % 3, (k + 2) % 3
    matrix = torch.zeros(*angle.shape, 3, 3, dtype=angle.dtype, device=angle.device)
    matrix[..., k, k] = 1
    matrix[..., i, i] = matrix[..., j, j] = angle.cos()
    matrix[..., i, j], matrix[..., j, i] = -angle.sin(), angle.sin()
    return matrix


def euler_to_matrix(angles: Tensor, order: str) -> Tensor:
    """Angles `[..., 3]` in radians, as BVH files list them: the product of the axes' rotations in this order."""
    first, second, third = (axis_rotation(axis, angles[..., place]) for place, axis in enumerate(order))
    return first @ second @ third


def matrix_to_euler(matrix: Tensor, order: str) -> Tensor:
    """The angles `[..., 3]` in radians whose product in this order (of three different axes) is `matrix` `[..., 3, 3]`;
    the middle one within a quarter turn. Where the outer axes coincide, the last angle is 0."""
    i, j, k = (_AXES.index(axis) for axis in order)
    sign = 1.0 if (j - i) % 3 == 1 else -1.0
    sine = (sign * matrix[..., i, k]).clamp(-1, 1)
    locked = sine.abs() > _NEARLY_UP
    first = torch.atan2(-sign * matrix[..., j, k], matrix[..., k, k])
    third = torch.atan2(-sign * matrix[..., i, j], matrix[..., i, i])
    first = torch.where(locked, torch.atan2(sign * matrix[..., k, j], matrix[..., j, j]), first)
    return torch.stack([first, sine.asin(), third.where(~locked, 0.0)], dim=-1)
