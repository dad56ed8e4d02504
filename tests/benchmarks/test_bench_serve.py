"""`bench serve`: its contenders answer the same, and a request's percentiles come into the record."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from benchmarks.model import bench_serve
from benchmarks.model.bench_serve import CASES, CONTENDERS, make


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The tensors here are tiny: a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_the_contenders_agree_and_percentiles_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = replace(CASES["demo_c16"], requests=10, clients=4)
    problem = make(spec, "f32")
    assert {instruction for instruction, _, _ in problem.requests} == {kind[1] for kind in bench_serve._KINDS}
    ours, serial = (build(problem) for build in CONTENDERS.values())
    torch.testing.assert_close(ours.call("serve")(), serial.call("serve")(), rtol=1e-4, atol=1e-4)
    assert ours.details is not None and serial.details is None
    told = ours.details()
    assert 0 < told["request_p50_ms"] <= told["request_p99_ms"]
    bench_serve.verify(spec, "f32", None)
    monkeypatch.setattr(bench_serve, "_alone", lambda problem, number: 0.5)
    with pytest.raises(AssertionError, match="scores differ"):
        bench_serve.verify(spec, "f32", None)
