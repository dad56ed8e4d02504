"""What needs a process of its own: peak memory and forked workers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

MEMORY = """
import re, sys, psutil, torch
from ofakern.ops.attention import AttentionLayout, RelativeTerm, attention, intervals
torch.set_num_threads(2)
T, H = int(sys.argv[1]), 12
def call(T):
    position = torch.arange(T, dtype=torch.int32)
    same = intervals.full([T // 2, T - T // 2])
    term = RelativeTerm(position + T - 1, position, same, 2 * T - 1)
    layout = AttentionLayout.build(intervals.full([T]), [T], [T], [term])
    leaves = [torch.randn(T, H, 64, requires_grad=True) for _ in range(5)]
    leaves += [torch.randn(H, 2 * T - 1, requires_grad=True), torch.ones(H, requires_grad=True)]
    weight = torch.randn(T, H, 64)
    before = psutil.Process().memory_info().rss
    q, k, v, q_pos, k_pos, table, head_scale = leaves
    out = attention(q, k, v, layout, q_pos, k_pos, [table], head_scale, backend="cpu")
    out.backward(weight)
    assert all(leaf.grad is not None for leaf in leaves)
    return before
call(64)
before = call(T)
# This process's own peak: ru_maxrss begins at the size of the process that started this one.
print(int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1]) * 1024 - before)
"""

WORKERS = """
import torch
from torch.utils.data import DataLoader, Dataset
from ofakern.ops.attention import AttentionLayout, attention, intervals

layout = AttentionLayout.build(intervals.causal([200]), [200], [200])
x = torch.randn(200, 4, 32)

class Calls(Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, n):
        leaf = x.clone().requires_grad_()
        out = attention(leaf, leaf, leaf, layout, backend="cpu")
        out.sum().backward()
        return out.detach()

torch.set_num_threads(1)
want = Calls()[0]  # with one thread no parallel region may open, because a fork after one hangs the worker's own
workers = DataLoader(Calls(), batch_size=None, num_workers=2, worker_init_fn=lambda n: torch.set_num_threads(2),
                     multiprocessing_context="fork")
for got in workers:
    assert torch.equal(got, want)
print("alive")
"""


def run_python(code: str, *arguments: str, timeout: float) -> str:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.usefixtures("cpu")
@pytest.mark.parametrize(
    ("tokens", "limit_mib"), [(4096, 256), pytest.param(16384, 1024, marks=pytest.mark.slow)], ids=["4096", "16384"]
)
def test_memory_grows_with_tokens_only(tokens: int, limit_mib: int) -> None:
    """Forward and backward with every gradient, B1 H12 K64. T x T floats of all heads would be 768 MiB at 4096 tokens,
    12 GiB at 16384. Results and gradients are part of the extra memory."""
    extra = int(run_python(MEMORY, str(tokens), timeout=900)) / 2**20
    assert extra < limit_mib, f"{extra:.0f} MiB beyond the inputs"


@pytest.mark.usefixtures("cpu")
def test_forked_workers_run_after_the_parent_ran_with_one_thread() -> None:
    assert run_python(WORKERS, timeout=120).strip() == "alive"
