"""The emulator: warp and tensor-core operations against plain loops, and the faults that it must find."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import emulate
import pytest
import torch

from ofakern.errors import BackendError, OfakernRuntimeError

SEEDS = range(1, 9)


@pytest.fixture
def emulator() -> Iterator[ModuleType]:
    if (reason := emulate.unavailable()) is not None:
        pytest.skip(reason)
    module = emulate.module()
    yield module
    module.set_seed(1)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a, b)


def test_a_missing_block_barrier_shows(emulator: ModuleType) -> None:
    values, out = torch.randn(256), torch.empty(256)
    want = values.view(2, 128).flip(1).flatten()
    right = {True: 0, False: 0}
    for seed in SEEDS:
        emulator.set_seed(seed)
        for barrier in right:
            emulator.test_reverse(values, out, barrier)
            right[barrier] += same(out, want)
    assert right == {True: len(SEEDS), False: 0}


def test_a_missing_warp_barrier_shows(emulator: ModuleType) -> None:
    values, out = torch.randint(0, 9, (128,)).float(), torch.empty(128)
    want = values.view(4, 32).cumsum(1).flatten()
    right = {True: 0, False: 0}
    for seed in SEEDS:
        emulator.set_seed(seed)
        for barrier in right:
            emulator.test_warp_scan(values, out, barrier)
            right[barrier] += same(out, want)
    assert right == {True: len(SEEDS), False: 0}


def test_what_lanes_exchange(emulator: ModuleType) -> None:
    values, out = torch.randn(64), torch.empty(64, 8)
    emulator.test_lanes(values, out)
    lane = torch.arange(32)
    for warp, have in zip(values.view(2, 32), out.view(2, 32, 8).unbind(), strict=True):
        total = warp
        for mask in (16, 8, 4, 2, 1):
            total = total + total[lane ^ mask]
        want = [
            *(warp[5].expand(32), warp[lane ^ 3]),
            *(warp[torch.where(lane < 2, lane, lane - 2)], warp[torch.where(lane > 29, lane, lane + 2)]),
            *(total, warp.max().expand(32), (warp > 0).sum().float().expand(32)),
            torch.full((32,), 2.0 + float((warp > 0.5).any())),
        ]
        assert same(have, torch.stack(want, 1))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", ["bf16", "f16"])
def test_matrix_loads_and_products(emulator: ModuleType, name: str, transposed: bool) -> None:
    dtype = torch.bfloat16 if name == "bf16" else torch.float16
    # Small integers: every sum is exact, so that only the right places give it.
    a, b = torch.randint(-8, 9, (16, 16)).to(dtype), torch.randint(-8, 9, (8, 16)).to(dtype)
    out = torch.empty(16, 8)
    getattr(emulator, f"test_product_{name}")(a, b, out, transposed)
    assert same(out, a.float() @ b.float().T)


@pytest.mark.parametrize("valid", [256, 100, 0])
def test_asynchronous_copies_come_with_the_wait(emulator: ModuleType, valid: int) -> None:
    values, out = torch.randn(256), torch.empty(256)
    there = torch.where(torch.arange(256) < valid, values, torch.zeros(()))
    want = there.view(2, 32, 4).roll(-1, 1).flatten()
    emulator.test_staged(values, out, valid, True)
    assert same(out, want)
    emulator.test_staged(values, out, valid, False)
    assert out[:128].isnan().any() and same(out[128:], want[128:])


def test_a_thread_that_misses_a_barrier_is_told(emulator: ModuleType) -> None:
    with pytest.raises(OfakernRuntimeError, match=r"CUDA kernel one_leaves: some threads wait for ever in .*block"):
        emulator.test_one_leaves(torch.empty(64))
    with pytest.raises(OfakernRuntimeError, match=r"1 threads have ended, 63 wait at sync_block \(emulator_kernels"):
        emulator.test_one_leaves(torch.empty(64))


def test_lanes_at_different_operations_are_told(emulator: ModuleType) -> None:
    with pytest.raises(OfakernRuntimeError, match=r"two_places: thread \d+ of .* where others of its warp wait at"):
        emulator.test_two_places(torch.empty(32))


def test_a_write_beyond_shared_memory_is_told(emulator: ModuleType) -> None:
    with pytest.raises(OfakernRuntimeError, match="past_the_end: wrote beyond its dynamic shared memory"):
        emulator.test_past_the_end(torch.empty(32))


@pytest.mark.parametrize(("threads", "shared", "rule"), [(33, 0, "multiple of 32"), (64, 300000, "at most 227 KiB")])
def test_launches_that_no_gpu_takes_are_told(emulator: ModuleType, threads: int, shared: int, rule: str) -> None:
    with pytest.raises(OfakernRuntimeError, match=rule):
        emulator.test_threads(torch.empty(64), threads, shared)


def test_it_takes_the_place_of_the_cpu_kernels_for_a_while(emulator: ModuleType) -> None:
    x = torch.randn(3, 6)
    with emulate.emulated():
        emulator.fail_next_launch(999)
        with pytest.raises(OfakernRuntimeError, match="rotation_forward"):
            torch.ops.ofakern.rotation_6d_fwd(x)
        torch.ops.ofakern.rotation_6d_fwd(x)
    emulator.fail_next_launch(999)
    torch.ops.ofakern.rotation_6d_fwd(x)
    emulator.fail_next_launch(0)


def test_integer_atomics(emulator: ModuleType) -> None:
    values = torch.randn(640)
    counts = torch.tensor([0, -1, 99], dtype=torch.int32)
    emulator.test_count_positive(values, counts)
    assert counts.tolist() == [int((values > 0).sum()), 9, 0]


@pytest.mark.parametrize(
    ("status", "error", "words"),
    [
        (2, OfakernRuntimeError, "the GPU must have memory left"),
        (9, OfakernRuntimeError, "its launch was refused"),
        (35, BackendError, "the driver must be as new as CUDA 13"),
        (100, BackendError, "there must be a GPU, got none"),
        (209, BackendError, r"the GPU must be one that ofakern was built for \(80, 90a"),
        (700, OfakernRuntimeError, "not launched: an earlier kernel or copy of this process failed"),
        (999, OfakernRuntimeError, "its launch failed"),
    ],
)
def test_each_failing_launch_names_its_reason(
    emulator: ModuleType, status: int, error: type[Exception], words: str
) -> None:
    emulator.fail_next_launch(status)
    with pytest.raises(error, match=f"CUDA kernel reverse: {words}"):
        emulator.test_reverse(torch.ones(128), torch.empty(128), True)
    emulator.test_reverse(torch.ones(128), torch.empty(128), True)
