"""BVH files, rotations, the features of a motion and the diffusion's samplers."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ofakern.errors import DataError, OfakernValueError
from ofakern.modality.motion.diffusion import NoiseSchedule, Sampler, sample_motion
from ofakern.modality.motion.features import MotionCoder, heading, orthonormal_features
from ofakern.modality.motion.rotations import euler_to_matrix, matrix_to_euler
from ofakern.modality.motion.skeleton import Motion, Skeleton

GOLDEN = Path(__file__).parents[1] / "golden"
MAIN = GOLDEN / "ofasys" / "main"
REAL = GOLDEN / "real" / "motion" / "martial_05.bvh"
SMALL = (MAIN / "resources" / "small_bvh_header.bvh").read_text()


@pytest.fixture(scope="module")
def real() -> Motion:
    return Motion.read(REAL)


def _distances(motion: Motion) -> torch.Tensor:
    points = motion.points()
    return (points[:, :, None] - points[:, None]).norm(dim=-1)


# -------------------------------------------------------------------------------------------------------- rotations


@pytest.mark.parametrize("order", ["".join(p) for p in itertools.permutations("XYZ")])
def test_euler_angles_come_back(order: str) -> None:
    angles = (torch.rand(200, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 0.5) * 6.2
    angles[:, 1] *= 0.5
    torch.testing.assert_close(matrix_to_euler(euler_to_matrix(angles, order), order), angles)


@pytest.mark.parametrize("order", ["ZYX", "XZY", "ZXY"])
@pytest.mark.parametrize("middle", [90.0, -90.0])
def test_a_gimbal_lock_keeps_the_rotation(order: str, middle: float) -> None:
    matrix = euler_to_matrix(torch.tensor([0.4, middle, -1.1], dtype=torch.float64).deg2rad(), order)
    angles = matrix_to_euler(matrix, order)
    assert angles[2] == 0
    torch.testing.assert_close(euler_to_matrix(angles, order), matrix, atol=1e-7, rtol=0)


def test_any_numbers_become_a_motion() -> None:
    skeleton = Skeleton.parse(SMALL)
    coder = MotionCoder(skeleton, scale=0.01)
    features = torch.randn(9, coder.width, generator=torch.Generator().manual_seed(1))
    motion = coder.decode(features, 0.1)
    again = coder.encode(motion)
    torch.testing.assert_close(again[:, 6:], orthonormal_features(features)[:, 6:], atol=1e-5, rtol=0)
    torch.testing.assert_close(again[1:, 3:6:2], features[1:, 3:6:2], atol=1e-4, rtol=0)  # along the ground
    torch.testing.assert_close(again[:, 1], features[:, 1])  # the height


# --------------------------------------------------------------------------------------------------------- features


@pytest.mark.parametrize("sample", [0, 1])
def test_the_features_are_those_of_ofasys(sample: int) -> None:
    raw = np.load(MAIN / "raw" / "motion_bvh.npz")[f"m{sample + 1}"]
    recorded = np.load(MAIN / "motion_diffusion.npz")["input.slot1.MOTION.value_0"][sample, : len(raw)]
    skeleton = Skeleton.parse(SMALL)
    features = MotionCoder(skeleton).encode(Motion(skeleton, torch.from_numpy(raw), 1 / 30))
    torch.testing.assert_close(features, torch.from_numpy(recorded), atol=2e-6, rtol=0)


def test_a_real_file_survives_writing_and_features(real: Motion, tmp_path: Path) -> None:
    real.write(tmp_path / "copy.bvh")
    again = Motion.read(tmp_path / "copy.bvh")
    assert again.skeleton == real.skeleton and again.frame_time == pytest.approx(real.frame_time)
    torch.testing.assert_close(again.frames, real.frames, atol=1e-6, rtol=0)
    coder = MotionCoder(real.skeleton, 1.7 / real.skeleton.height)
    features = coder.encode(real)
    assert features.shape == (40, 6 + 6 * 43) == (len(real), coder.width)
    decoded = coder.decode(features, real.frame_time)
    worst = float((decoded.points() - real.points()).abs().max())
    assert worst < 1e-5 * real.skeleton.height
    torch.testing.assert_close(orthonormal_features(features), features, atol=1e-5, rtol=0)


def test_an_anchor_moves_and_turns_the_motion_as_a_whole(real: Motion) -> None:
    coder = MotionCoder(real.skeleton)
    free = coder.decode(coder.encode(real), real.frame_time)
    anchored = coder.decode(coder.encode(real, anchor=3), real.frame_time)
    assert abs(float(heading(anchored.rotations()[3:4, 0]))) < 1e-6
    assert float(anchored.root()[3, [0, 2]].abs().max()) < 1e-3 and float(free.root()[3, [0, 2]].abs().max()) > 1
    torch.testing.assert_close(_distances(anchored), _distances(free), atol=1e-3, rtol=0)
    torch.testing.assert_close(anchored.root()[:, 1], free.root()[:, 1])


def test_another_skeleton_is_refused(real: Motion) -> None:
    with pytest.raises(DataError, match="skeleton of 3 joints .*got 43"):
        MotionCoder(Skeleton.parse(SMALL)).encode(real)


def test_rates(real: Motion) -> None:
    assert real.at_rate(real.frame_time) is real
    slower = real.at_rate(2 * real.frame_time)
    assert torch.equal(slower.frames, real.every(2).frames) and slower.frame_time == 2 * real.frame_time
    assert len(real.at_rate(real.frame_time / 2)) == 2 * len(real) - 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t[: len(t) // 2], "a whole BVH file, got its end"),
        (lambda t: t.replace("JOINT Spine", "JOIN Spine"), "line 6 must be JOINT, got 'JOIN Spine'"),
        (lambda t: t.replace("CHANNELS 6", "CHANNELS 5"), "a count of different channels"),
        (lambda t: t.replace("OFFSET 0.0 10.0 0.0", "OFFSET 0.0 ten 0.0"), "must be a number"),
        (lambda t: t.replace("Frames: 2", "Frames: 3"), r"3 frames \(got 2 lines\)"),
        (lambda t: t.replace("0.033333", "nan"), "must be a number"),
        (lambda t: t.rstrip("\n") + " 7\n", "must hold 12 finite numbers, got 13 words"),
        (lambda t: "", "got its end after 0 lines"),
    ],
)
def test_damaged_files_are_named(change, message: str) -> None:  # type: ignore[no-untyped-def]
    row = " ".join(["1.5"] * 12) + "\n"
    whole = SMALL.replace("Frames: 0", "Frames: 2").rstrip() + "\n" + row * 2
    assert len(Motion.parse(whole)) == 2
    with pytest.raises(DataError, match=message):
        Motion.parse(change(whole), "walk.bvh")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="absent.bvh"):
        Motion.read(tmp_path / "absent.bvh")


# -------------------------------------------------------------------------------------------------------- diffusion


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_a_perfect_denoiser_gives_the_motion(sampler: Sampler) -> None:
    clean = torch.randn(7, 5, generator=torch.Generator().manual_seed(2))
    seen: list[int] = []

    def predict(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen.append(int(t[0]))
        return clean

    start = torch.randn(7, 5, generator=torch.Generator().manual_seed(3))
    found = sample_motion(predict, start, NoiseSchedule.cosine(100), 8, sampler=sampler)
    torch.testing.assert_close(found, clean)
    assert seen == [84, 72, 60, 48, 36, 24, 12, 0]


def test_a_ddpm_step_keeps_the_law_of_the_noise() -> None:
    """From x_t ~ q(x_t | x0) a step must give x_s ~ q(x_s | x0): mean sqrt(a_s) x0, variance 1 - a_s."""
    schedule, clean, count = NoiseSchedule.cosine(50), torch.full((1, 1), 2.0), 200_000
    generator = torch.Generator().manual_seed(4)
    t, s = schedule.timesteps(2)
    a_t, a_s = float(schedule.alphas_cumprod[t]), float(schedule.alphas_cumprod[s])
    start = a_t**0.5 * clean + (1 - a_t) ** 0.5 * torch.randn(count, 1, generator=generator)
    inputs: list[torch.Tensor] = []

    def predict(x: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        inputs.append(x)
        return clean.expand(count, 1)

    sample_motion(predict, start, schedule, 2, sampler="ddpm", generator=generator)
    assert float(inputs[1].mean()) == pytest.approx(a_s**0.5 * 2.0, abs=5e-4)
    assert float(inputs[1].var()) == pytest.approx(1 - a_s, rel=2e-2)


def test_bad_settings_of_a_sampler() -> None:
    schedule, start = NoiseSchedule.cosine(10), torch.zeros(1, 1)
    with pytest.raises(OfakernValueError, match=r"diffusion_steps must be in \[1, 10\], got 11"):
        sample_motion(lambda x, t: x, start, schedule, 11)
    with pytest.raises(OfakernValueError, match="sampler must be one of ddim, ddpm, got 'euler'"):
        sample_motion(lambda x, t: x, start, schedule, 5, sampler="euler")  # type: ignore[arg-type]


def test_empty_motions(real: Motion) -> None:
    empty = replace(real, frames=real.frames[:0])
    coder = MotionCoder(real.skeleton)
    assert coder.encode(empty, anchor=0).shape == (0, coder.width)
    assert len(Motion.parse(coder.decode(coder.encode(empty), 0.1).to_text())) == 0
