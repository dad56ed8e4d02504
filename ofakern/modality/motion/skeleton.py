"""A skeleton and its motion as BVH files hold them, with a reader, a writer and forward kinematics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ofakern.errors import DataError
from ofakern.modality.motion.rotations import euler_to_matrix

__all__ = ["Joint", "Motion", "Skeleton"]

_CHANNELS = {f"{axis}{kind}" for axis in "XYZ" for kind in ("position", "rotation")}
_MAX_JOINTS = 1000


@dataclass(frozen=True)
class Joint:
    """parent: its number (-1: the root); offset: from the parent, in the file's unit; channels: as the file names them
    (`Xposition`, `Zrotation`, ...); end: offset of the end site, where the joint has one."""

    name: str
    parent: int
    offset: tuple[float, float, float]
    channels: tuple[str, ...]
    end: tuple[float, float, float] | None = None

    @property
    def order(self) -> str:
        """The axes of its rotation, in the order they are multiplied ("ZYX"); "" when it does not turn."""
        return "".join(channel[0] for channel in self.channels if channel.endswith("rotation"))


@dataclass(frozen=True)
class Skeleton:
    """Joints in file order: a parent stands before its children, the root first."""

    joints: tuple[Joint, ...]

    @property
    def channels(self) -> int:
        """Numbers per frame in a file."""
        return sum(len(joint.channels) for joint in self.joints)

    @property
    def height(self) -> float:
        """Extent of the rest pose along its longest axis, in the file's unit."""
        rest = Motion(self, torch.zeros(1, self.channels, dtype=torch.float64), 1.0)
        points = rest.points()[0]
        return float((points.amax(0) - points.amin(0)).max())

    @classmethod
    def parse(cls, text: str, where: str = "skeleton") -> Skeleton:
        """From the HIERARCHY part of a BVH file (what follows is not looked at). Raises DataError."""
        return _Reader(text, where).skeleton()

    def header(self) -> str:
        """The HIERARCHY part of a BVH file; `parse` reads it back."""
        lines = ["HIERARCHY"]
        children: dict[int, list[int]] = {}
        for number, joint in enumerate(self.joints):
            children.setdefault(joint.parent, []).append(number)

        def write(number: int, depth: int) -> None:
            joint, pad = self.joints[number], "  " * depth
            lines.append(f"{pad}{'ROOT' if depth == 0 else 'JOINT'} {joint.name}")
            lines.append(pad + "{")
            lines.append(f"{pad}  OFFSET {_numbers(joint.offset)}")
            lines.append(f"{pad}  CHANNELS {' '.join((str(len(joint.channels)), *joint.channels))}")
            for child in children.get(number, []):
                write(child, depth + 1)
            if joint.end is not None:
                lines.extend([f"{pad}  End Site", pad + "  {", f"{pad}    OFFSET {_numbers(joint.end)}", pad + "  }"])
            lines.append(pad + "}")

        write(0, 0)
        return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Motion:
    """frames: float64 `[T, channels]`, positions in the skeleton's unit and angles in degrees, in file order;
    frame_time: seconds per frame."""

    skeleton: Skeleton
    frames: Tensor
    frame_time: float

    def __len__(self) -> int:
        return self.frames.shape[0]

    @classmethod
    def parse(cls, text: str, where: str = "motion") -> Motion:
        """From the text of a BVH file. Raises DataError, which names the line."""
        reader = _Reader(text, where)
        skeleton = reader.skeleton()
        return reader.motion(skeleton)

    @classmethod
    def read(cls, path: str | Path) -> Motion:
        """A BVH file. Raises DataError for one that is missing or damaged."""
        try:
            text = Path(path).read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            raise DataError(
                f"Motion.read: path must be a readable file, got {str(path)!r}: {error.strerror}"
            ) from error
        return cls.parse(text, str(path))

    def to_text(self) -> str:
        """The motion as a BVH file."""
        rows = "\n".join(" ".join(f"{value:.6f}" for value in row) for row in self.frames.tolist())
        head = f"{self.skeleton.header()}MOTION\nFrames: {len(self)}\nFrame Time: {self.frame_time:.8f}\n"
        return head + rows + ("\n" if rows else "")

    def write(self, path: str | Path) -> None:
        """Writes a BVH file."""
        Path(path).write_text(self.to_text(), encoding="utf-8")

    def every(self, step: int, first: int = 0) -> Motion:
        """Every step-th frame from `first` on."""
        return replace(self, frames=self.frames[first::step], frame_time=self.frame_time * step)

    def at_rate(self, frame_time: float) -> Motion:
        """The frames nearest to multiples of `frame_time` seconds; itself where that is its own within a hundredth."""
        if len(self) == 0 or abs(self.frame_time - frame_time) <= 0.01 * frame_time:
            return self
        count = math.floor((len(self) - 1) * self.frame_time / frame_time + 1e-6) + 1
        places = (torch.arange(count, dtype=torch.float64) * frame_time / self.frame_time).round().long()
        return replace(self, frames=self.frames[places.clamp(max=len(self) - 1)], frame_time=frame_time)

    def root(self) -> Tensor:
        """The root's position `[T, 3]`; its offset where the file has no position channels."""
        position = torch.tensor(self.skeleton.joints[0].offset, dtype=torch.float64).repeat(len(self), 1)
        for place, channel in enumerate(self.skeleton.joints[0].channels):
            if channel.endswith("position"):
                position[:, "XYZ".index(channel[0])] = self.frames[:, place]
        return position

    def rotations(self) -> Tensor:
        """Every joint's own rotation `[T, J, 3, 3]`; the identity for one that does not turn."""
        turned, place = [], 0
        for joint in self.skeleton.joints:
            at = [place + i for i, channel in enumerate(joint.channels) if channel.endswith("rotation")]
            place += len(joint.channels)
            angles = self.frames[:, at].deg2rad()
            turned.append(euler_to_matrix(angles, joint.order) if at else _identity(len(self)))
        return torch.stack(turned, dim=1)

    def points(self) -> Tensor:
        """Where all joints are, then all end sites, in order: float64 `[T, J + ends, 3]` in the skeleton's unit."""
        local, joints = self.rotations(), self.skeleton.joints
        turned, places = [local[:, 0]], [self.root()]
        for number, joint in enumerate(joints[1:], 1):
            offset = torch.tensor(joint.offset, dtype=torch.float64)
            places.append(places[joint.parent] + turned[joint.parent] @ offset)
            turned.append(turned[joint.parent] @ local[:, number])
        for number, joint in enumerate(joints):
            if joint.end is not None:
                places.append(places[number] + turned[number] @ torch.tensor(joint.end, dtype=torch.float64))
        return torch.stack(places, dim=1)

    def bones(self) -> list[tuple[int, int]]:
        """Pairs of `points` that a bone joins."""
        joints = self.skeleton.joints
        pairs = [(joint.parent, number) for number, joint in enumerate(joints) if number]
        ends = [number for number, joint in enumerate(joints) if joint.end is not None]
        return pairs + [(number, len(joints) + place) for place, number in enumerate(ends)]


class _Reader:
    """The words of a BVH file, line by line."""

    def __init__(self, text: str, where: str) -> None:
        self.where = where
        self.lines = [(number, line.split()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
        self.place = 0

    def skeleton(self) -> Skeleton:
        self._expect("HIERARCHY")
        joints: list[Joint] = []
        self._joint(joints, -1, "ROOT")
        return Skeleton(tuple(joints))

    def _joint(self, joints: list[Joint], parent: int, kind: str) -> None:
        name = " ".join(self._expect(kind)) or kind
        if len(joints) >= _MAX_JOINTS:
            raise self._error(f"at most {_MAX_JOINTS} joints")
        self._expect("{")
        offset = self._vector("OFFSET")
        declared = self._expect("CHANNELS")
        channels = tuple(declared[1:])
        turns = [channel for channel in channels if channel.endswith("rotation")]
        count = declared[0] if declared else ""
        if count != str(len(channels)) or not set(channels) <= _CHANNELS or len(set(channels)) < len(channels):
            raise self._error("a count of different channels such as Xposition or Zrotation", back=1)
        if len(turns) not in (0, 3):
            raise self._error("three rotations or none", back=1)
        number = len(joints)
        joints.append(Joint(name, parent, offset, channels))
        while self._next()[0] != "}":
            if self._next()[0] == "End":
                self.place += 1
                self._expect("{")
                joints[number] = replace(joints[number], end=self._vector("OFFSET"))
                self._expect("}")
            else:
                self._joint(joints, number, "JOINT")
        self.place += 1

    def motion(self, skeleton: Skeleton) -> Motion:
        self._expect("MOTION")
        count = self._number(self._expect("Frames:"))
        time = self._number(self._expect("Frame", "Time:"))
        rows = self.lines[self.place :]
        if time <= 0 or count != len(rows):
            raise self._error(f"a positive frame time and {count:g} frames (got {len(rows)} lines)", back=1)
        frames = np.empty((len(rows), skeleton.channels))
        for row, (number, words) in enumerate(rows):
            try:
                frames[row] = [float(word) for word in words]
            except ValueError:
                frames[row] = np.nan
            if not np.isfinite(frames[row]).all():
                raise DataError(
                    f"{self.where}: line {number} must hold {skeleton.channels} finite numbers, got {len(words)} words"
                )
        return Motion(skeleton, torch.from_numpy(frames), time)

    def _vector(self, word: str) -> tuple[float, float, float]:
        words = self._expect(word)
        if len(words) != 3:
            raise self._error(f"three numbers after {word}", back=1)
        x, y, z = (self._number([one]) for one in words)
        return x, y, z

    def _number(self, words: Sequence[str]) -> float:
        try:
            value = float(words[0])
        except (ValueError, IndexError):
            value = math.nan
        if not math.isfinite(value):
            raise self._error("a number", back=1)
        return value

    def _next(self) -> list[str]:
        if self.place >= len(self.lines):
            raise DataError(f"{self.where}: file must be a whole BVH file, got its end after {self.place} lines")
        return self.lines[self.place][1]

    def _expect(self, *words: str) -> list[str]:
        line = self._next()
        if [word.lower() for word in line[: len(words)]] != [word.lower() for word in words]:
            raise self._error(" ".join(words))
        self.place += 1
        return line[len(words) :]

    def _error(self, rule: str, back: int = 0) -> DataError:
        number, words = self.lines[max(self.place - back, 0)]
        return DataError(f"{self.where}: line {number} must be {rule}, got {' '.join(words)[:60]!r}")


def _identity(count: int) -> Tensor:
    return torch.eye(3, dtype=torch.float64).repeat(count, 1, 1)


def _numbers(values: Sequence[float]) -> str:
    return " ".join(repr(value) for value in values)
