"""`ofakern bench --device cuda` from cases to records, with the emulator in the GPU's place and a stopped clock."""

from __future__ import annotations

import emulate
import pytest
import torch

from benchmarks import dispatch, gpu
from benchmarks.run import Options

CASE = "one_motion"


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    if (reason := emulate.unavailable()) is not None:
        pytest.skip(reason)
    monkeypatch.setattr(gpu, "_DEVICE", "cpu")
    monkeypatch.setattr("benchmarks.ops.bench_rotation_6d.runner", lambda backend, run: run)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "an emulated H200")
    monkeypatch.setattr(gpu, "_FLUSH", 8)
    monkeypatch.setattr(gpu, "_peak_mib", lambda call, leaves: 0.0)
    monkeypatch.setattr(gpu, "_gemm", lambda dtype: {"best": 1.0})
    monkeypatch.setattr(gpu, "_bandwidth", lambda size: {"mib": 1.0, "copy_gbps": 1.0, "read_gbps": 1.0})


def test_each_backend_is_checked_timed_and_compared(no_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter(range(1, 10**6))
    monkeypatch.setattr(gpu, "_sample", lambda call, flush: (call(), float(next(times)))[1])
    with emulate.emulated():
        found = gpu.run(Options(ops=["rotation_6d"], cases=[CASE], dtypes=["f32"], quick=True))
    backends = [record["backend"] for record in found["records"] if record["phase"] == "fwd"]
    assert backends == ["cuda", "reference", "torch"] and not found["wrong"]
    ours = found["records"][0]
    assert ours["size"] == [6, 120 * 22] and set(ours["versus"]) == {"reference", "torch"}
    assert [entry["backend"] for entry in found["skipped"]] == ["triton"]
    assert set(dispatch.table({"h200-x.json": found})) == {"rotation_6d"}


def test_a_wrong_kernel_is_not_timed(no_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    real = emulate.module().rotation_6d
    with emulate.emulated():
        monkeypatch.setattr(emulate.module(), "rotation_6d", lambda x: real(x) + 1)
        found = gpu.run(Options(ops=["rotation_6d"], cases=[CASE], dtypes=["f32"], quick=True))
    assert not found["records"] and found["wrong"][0].startswith(f"rotation_6d {CASE} f32 cuda: out: error")
