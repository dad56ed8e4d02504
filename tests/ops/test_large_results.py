"""Memory of large results: used again when a tensor is gone, never while anything still reads it."""

from __future__ import annotations

import platform
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from short import SANITIZED
from test_attention_process import run_python
from torch import Tensor

from ofakern import _cpu
from ofakern.ops.layer_norm import add_layer_norm, embed_layer_norm, gelu_layer_norm

WIDTH = 256
ROWS = 20 * 1024
LARGE = ROWS * WIDTH * 4  # 20 MiB
X = torch.ones(2 * ROWS, WIDTH)


@pytest.fixture(autouse=True)
def _kept_until_the_end(cpu: Any) -> Iterator[None]:
    """However slow the machine, memory waits as long as a test takes, and none waits for the next test."""
    _cpu.keep_memory_for(0.0)
    _cpu.keep_memory_for(3600.0)
    yield
    _cpu.keep_memory_for(0.0)
    _cpu.keep_memory_for(1.0)


def large(fill: float = 1.0, rows: int = ROWS) -> Tensor:
    """`[rows, WIDTH]` of `fill`, made by a kernel."""
    return gelu_layer_norm(X[:rows], torch.zeros(WIDTH), torch.full((WIDTH,), fill), backend="cpu")


def assert_full(tensor: Tensor, fill: float) -> None:
    assert bool((tensor == fill).all())


def test_the_next_result_of_a_size_stands_where_one_has_gone() -> None:
    first = large(1.0)
    where = first.data_ptr()
    assert _cpu.kept_memory() == 0
    first.fill_(float("nan"))
    del first
    assert _cpu.kept_memory() == LARGE
    second = large(2.0)
    assert second.data_ptr() == where
    assert _cpu.kept_memory() == 0
    assert_full(second, 2.0)


def test_a_result_is_a_plain_tensor() -> None:
    result = large().requires_grad_()
    assert type(result) is Tensor
    assert result.is_contiguous() and result.dtype == torch.float32 and result.device.type == "cpu"
    result.sum().backward()
    assert result.grad is not None
    with torch.no_grad():
        result.mul_(2.0)
    assert_full(result.detach(), 2.0)
    assert_full(result.detach().clone().to(torch.bfloat16), 2.0)


def test_views_and_numpy_hold_the_memory() -> None:
    first = large(1.0)
    tail, array = first[-1], first.detach().numpy()
    del first
    assert _cpu.kept_memory() == 0
    second = large(2.0)
    assert_full(tail, 1.0)
    del tail
    assert _cpu.kept_memory() == 0
    assert (array == 1.0).all()
    del array
    assert _cpu.kept_memory() == LARGE
    assert_full(second, 2.0)


def test_several_results_of_a_call_stand_apart() -> None:
    x, ones, zeros = torch.randn(ROWS, WIDTH), torch.ones(WIDTH), torch.zeros(WIDTH)
    for _ in range(3):
        out, total = add_layer_norm(x, x, ones, zeros, backend="cpu")
        assert torch.equal(total, 2 * x)
        torch.testing.assert_close(out, torch.nn.functional.layer_norm(2 * x, (WIDTH,)))
        del out, total


def test_gradients_survive_what_saved_them() -> None:
    x = torch.randn(ROWS, WIDTH).requires_grad_()
    zeros, ones = torch.zeros(WIDTH), torch.ones(WIDTH)
    kept: list[Tensor] = []
    for _ in range(3):
        out, _ = add_layer_norm(x, x, ones, zeros, backend="cpu")
        kept.append(torch.autograd.grad(out.square().sum(), x)[0])
        del out
    assert torch.equal(kept[0], kept[1]) and torch.equal(kept[0], kept[2])
    assert len({grad.data_ptr() for grad in kept}) == 3


def test_only_a_similar_size_takes_the_place() -> None:
    first = large(1.0, 2 * ROWS)
    where = first.data_ptr()
    del first
    small = large(2.0)
    assert small.data_ptr() != where
    assert _cpu.kept_memory() == 2 * LARGE
    similar = large(3.0, 2 * ROWS - 1024)
    assert similar.data_ptr() == where
    del similar  # gives back what it holds, not only what it needed
    assert _cpu.kept_memory() == 2 * LARGE


def test_no_more_waits_than_the_limit() -> None:
    limit = 512 << 20
    results = [large(float(n)) for n in range(limit // LARGE + 3)]
    for n, result in enumerate(results):
        assert_full(result[:: ROWS - 1], float(n))
    del results, result
    assert LARGE <= _cpu.kept_memory() <= limit


def test_what_waits_too_long_goes_back() -> None:
    first = large()
    del first
    assert _cpu.kept_memory() == LARGE
    _cpu.keep_memory_for(1e-9)
    assert_full(large(2.0), 2.0)
    assert _cpu.keep_memory_for(0.0) == 1e-9
    assert _cpu.kept_memory() == 0
    assert_full(large(3.0), 3.0)
    assert _cpu.kept_memory() == 0


def test_threads_take_and_give_at_once() -> None:
    wrong: list[float] = []

    def work(fill: float) -> None:
        for _ in range(8):
            result = large(fill)
            if not bool((result == fill).all()):
                wrong.append(fill)

    threads = [threading.Thread(target=work, args=(float(n),)) for n in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def resident() -> int:
    """Bytes of this process that are memory."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon")


def table_gradient(tokens: Tensor, entries: int = ROWS, dtype: torch.dtype = torch.float32) -> Tensor:
    table = torch.ones(1, 1, dtype=dtype).expand(entries, WIDTH).contiguous()
    table[: tokens.shape[0]] = torch.randn(tokens.shape[0], WIDTH).to(dtype)
    out = embed_layer_norm(tokens, table.requires_grad_(), torch.ones(WIDTH), torch.zeros(WIDTH), backend="cpu")
    dout = torch.arange(WIDTH, dtype=torch.float32).sin().expand(out.shape).to(dtype)
    return torch.autograd.grad(out, table, dout)[0]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells what memory a process has")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_vocabularys_gradient_is_the_memory_of_its_tokens_rows(dtype: torch.dtype) -> None:
    tokens, entries = torch.tensor([2, 0, 1, 2]), 4 * ROWS
    table_gradient(tokens, entries, dtype)
    before = resident()
    first = table_gradient(tokens, entries, dtype)
    bytes_of = first.numel() * first.element_size()
    assert SANITIZED or resident() - before < bytes_of // 8
    assert first.is_contiguous() and not bool(first[3:].any())
    assert SANITIZED or resident() - before < bytes_of // 8  # reading it makes no memory of it
    torch.manual_seed(0)
    few = table_gradient(tokens, 64, dtype)  # so small that all of it is written
    torch.manual_seed(0)
    assert torch.equal(table_gradient(tokens, entries, dtype)[:64], few)
    first.add_(1.0)
    assert bool((first[3:] == 1.0).all()) and bool((table_gradient(tokens, entries, dtype)[3:] == 0.0).all())
    waited = _cpu.kept_memory()
    del first
    assert _cpu.kept_memory() == waited  # nobody could take it for zeros


def test_the_gradient_of_many_tokens_stands_in_kept_memory() -> None:
    tokens = torch.arange(ROWS // 2)
    grad = table_gradient(tokens)
    assert bool(grad[: ROWS // 2].any(1).all()) and not bool(grad[ROWS // 2 :].any())
    waited = _cpu.kept_memory()
    del grad
    assert _cpu.kept_memory() == waited + LARGE


@pytest.mark.skipif(SANITIZED, reason="the sanitizer's allocator stands in for the C library's")
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_what_waits_and_what_the_c_library_holds_is_given_back() -> None:
    held = [torch.ones(1 << 16) for _ in range(400)]  # 256 KiB each, so that half of them leave holes
    waits = large()
    before = resident()
    del held[::2], waits
    assert before - resident() < 10 << 20 and _cpu.kept_memory() == LARGE
    _cpu.give_back_memory()
    assert before - resident() > (30 << 20) + LARGE // 2 and _cpu.kept_memory() == 0
    assert all(bool((x == 1.0).all()) for x in held)


FORK = """
import os, torch
from ofakern import _cpu
from ofakern.ops.layer_norm import gelu_layer_norm
torch.set_num_threads(1)
_cpu.keep_memory_for(3600.0)
x = torch.ones(20 * 1024, 256)
def large(fill):
    return gelu_layer_norm(x, torch.zeros(256), torch.full((256,), fill), backend="cpu")
held, gone = large(1.0), large(2.0)
del gone
child = os.fork()
if child == 0:
    mine = [large(3.0), large(4.0)]
    del held
    mine.append(large(5.0))
    os._exit(0 if [bool((m == f).all()) for m, f in zip(mine, (3.0, 4.0, 5.0))] == [True] * 3 else 1)
ours = large(6.0)
assert os.waitpid(child, 0)[1] == 0
assert bool((held == 1.0).all()) and bool((ours == 6.0).all())
print("whole")
"""


def test_a_forked_child_has_its_own() -> None:
    assert run_python(FORK, timeout=60).strip() == "whole"
