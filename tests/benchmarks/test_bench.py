"""`ofakern bench`: its records, its refusal of wrong kernels, the work it counts, and what it makes of results."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import ofakern
from benchmarks import catalogue, gpu, memory, plots, report, roofline, run, tables, timing
from benchmarks.core import Contender, OpBench, Unavailable, Work
from benchmarks.moved import moved
from benchmarks.ops import bench_add_layer_norm, bench_attention
from benchmarks.ops.bench_attention import CASES, CONTENDERS, make, reduced, work
from ofakern.cli import bench
from ofakern.cli import main as cli
from ofakern.errors import OfakernRuntimeError, OfakernValueError
from ofakern.ops.attention import attention

RECORD = {"op", "case", "phase", "dtype", "device", "backend", "ms", "peak_mib", "tflops", "gbps", "bound"}
RECORD |= {"roofline_pct"}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One run of the command on the smallest case."""
    path = tmp_path_factory.mktemp("bench") / "r.json"
    arguments = ["--quick", "--case", "small_16", "--dtype", "f32", "--threads", "1", "--json", str(path)]
    threads = torch.get_num_threads()
    try:
        assert cli.main(["bench", "attention", *arguments]) == 0
    finally:
        torch.set_num_threads(threads)
    return tables.load(path)


def test_records_have_the_stated_form(results: dict[str, Any]) -> None:
    assert {(r["backend"], r["phase"]) for r in results["records"]} == {
        (name, phase) for name in CONTENDERS if name not in ("flex", "flash") for phase in ("fwd", "fwd+bwd")
    }
    for record in results["records"]:
        ours = record["backend"] == "cpu"
        assert record.keys() == RECORD | {"rates"} | ({"versus"} if ours else set())
        assert record["rates"] == {}  # far too small for the machine's rates to be measured beside it
        assert 0 < record["ms"]["p20"] <= record["ms"]["p50"] <= record["ms"]["p80"]
        if ours:
            assert record["versus"].keys() == {"sdpa_plain", "sdpa_mask", "sdpa_concat", "ofasys"}
    assert {s["backend"] for s in results["skipped"]} == {"flex", "flash"}
    assert results["machine"]["threads"] == 1 and results["machine"]["clock"] == "cpu"
    assert results["roofline"]["gemm_tflops"]["f32"]["best"] > 0


def test_roofline_share_is_least_time_over_time(results: dict[str, Any]) -> None:
    record = results["records"][0]
    job = work(CASES["small_16"], "f32", "fwd")
    band = results["roofline"]["bandwidth"][run.band_of(job)]
    bounds = roofline.bounds(job, "f32", results["roofline"], band)
    assert record["bound"] == max(bounds, key=lambda kind: bounds[kind])
    assert record["roofline_pct"] == pytest.approx(100 * max(bounds.values()) / (record["ms"]["p50"] / 1e3))


def test_generation_is_told_with_its_floor(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Every contender decodes the same; the whole has its decoding's time beside it, and the floor of that."""
    path, threads = tmp_path / "r.json", torch.get_num_threads()
    try:
        assert cli.main(["bench", "generate", "--quick", "--threads", "1", "--json", str(path)]) == 0
    finally:
        torch.set_num_threads(threads)
    found = {(r["backend"], r["phase"]): r for r in tables.load(path)["records"]}
    assert found.keys() == {
        (name, phase) for name in ("ofakern", "ofasys", "expanded") for phase in ("decode", "whole")
    }
    for (name, phase), record in found.items():
        assert record["decode_ms"] == found[name, "decode"]["ms"]["p50"]
        assert 0 < record["floor_ms"] < record["decode_ms"] and (phase == "decode" or record["ms"]["p50"] > 0)


def test_the_floor_is_the_largest_part_of_the_work() -> None:
    roof = {"gemm_tflops": {"bf16": {"best": 2.0}}, "other_gops": {"erf": 4.0}}
    band = {"copy_gbps": 10.0, "read_gbps": 8.0}
    job = Work(flops=2e12, bytes=30e9, other={"erf": 2e9})
    assert roofline.bounds(job, "bf16", roof, band) == {"gemm": 1.0, "bytes": 3.0, "erf": 0.5}


def test_rates_of_a_large_case_are_measured_in_turn() -> None:
    roof = {"gemm_tflops": {"f32": {"1024": 2.0, "2048": 1.0, "best": 2.0}}}
    assert roofline.in_turn(Work(flops=9e8, bytes=2**24), "f32", roof) == {}
    assert roofline.in_turn(Work(flops=0, bytes=2**26, cold=True), "f32", roof) == {}
    sticks = roofline.in_turn(Work(flops=2e9, bytes=2**26), "f32", roof)
    assert {name: stick.amount for name, stick in sticks.items()} == {
        "gemm_tflops": 2 * 1024**3,
        "copy_gbps": 2**26,
        "read_gbps": 2**26,
    }
    samples, _ = timing.in_turn({name: stick.call for name, stick in sticks.items()}, timing.Budget(0.0, 3, 3))
    assert all(len(times) == 3 for times in samples.values())
    band = {"copy_gbps": 10.0, "read_gbps": 8.0, "gemm_tflops": 4.0}
    assert roofline.bounds(Work(flops=2e12, bytes=30e9), "f32", roof, band) == {"gemm": 0.5, "bytes": 3.0}


def test_rates_of_other_work() -> None:
    assert roofline.other("erf", 0.01) > 0
    with pytest.raises(OfakernValueError, match="must be one of vector, erf, exp, got 'sin'"):
        roofline.other("sin")


def test_a_contender_has_the_phases_it_can() -> None:
    x = torch.ones(3, requires_grad=True)
    entry = Contender("mine", lambda: (2 * x, x + 1), (x,), (torch.ones(3), torch.ones(3)), steps={"step": lambda: x})
    first, second = entry.call("fwd+bwd")()
    assert not first.requires_grad and torch.equal(second, torch.full((3,), 2.0))
    assert torch.equal(entry.comparable((first, second)), first)
    assert entry.call("step")() is x
    with pytest.raises(Unavailable, match="no phase other"):
        entry.call("other")


@pytest.mark.parametrize("name", catalogue.names())
def test_every_benchmark_fits_the_seam(name: str) -> None:
    op = catalogue.load(name)
    assert op.name == name
    assert all(key == spec.name and spec.description for key, spec in op.cases.items())
    assert [spec for spec in op.cases.values() if spec.quick] and set(op.dtypes) <= {"f32", "bf16", "f16"}
    assert set(op.about) <= set(op.contenders) and op.slow <= set(op.contenders)
    assert op.memory_peer is None or op.memory_peer in op.contenders
    for spec in op.cases.values():
        assert op.phases_of(spec) and set(op.phases_of(spec)) <= set(op.phases)
        for phase in op.phases_of(spec):
            job = op.work(spec, op.dtypes[0], phase)
            assert job.flops >= 0 and job.bytes > 0 and set(job.other) <= set(roofline.KINDS)


def test_a_module_that_lacks_a_part_is_told() -> None:
    with pytest.raises(OfakernRuntimeError, match="must offer OP, CASES.*got no OP"):
        OpBench.of(timing)


def test_flops_of_the_base_case_are_384_and_1024_per_pair() -> None:
    pairs = 2 * 12 * 1024 * 1024
    spec = CASES["ofa_base_enc_1024"]
    assert work(spec, "bf16", "fwd").flops == 384 * pairs
    assert work(spec, "bf16", "fwd+bwd").flops == (384 + 1024) * pairs
    assert work(CASES["plain_1024"], "f32", "fwd").flops == 256 * pairs
    assert work(CASES["causal_1024"], "f32", "fwd").flops == 256 * 24 * (1024 * 1025 // 2)


@pytest.mark.parametrize("name", CASES)
def test_peers_compute_the_case(name: str) -> None:
    problem = make(reduced(CASES[name]), "f32")
    expected = bench_attention.ours(problem).forward().detach()
    for peer in ("sdpa_plain", "sdpa_mask", "sdpa_concat", "ofasys"):
        try:
            entry = CONTENDERS[peer](problem)
        except Unavailable:
            continue
        for phase in ("fwd", "fwd+bwd"):
            got = entry.packed(entry.call(phase)())
            if entry.exact:
                torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_a_wrong_kernel_is_not_timed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    right = attention

    def wrong(*args: Any, **kwargs: Any) -> Any:
        out, *lse = right(*args, **kwargs) if kwargs.get("return_lse") else (right(*args, **kwargs),)
        return (out * 1.01, *lse) if lse else out * 1.01

    monkeypatch.setattr(bench_attention, "attention", wrong)
    assert cli.main(["bench", "attention", "--case", "small_16", "--dtype", "f32"]) == 2
    assert "must be right before it is timed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dance"], "all, got 'dance'"),
        (["attention", "--device", "tpu"], "--device must be cpu or cuda, got 'tpu'"),
        (["attention", "--dtype", "f8"], "--dtype must be one of f32, bf16, f16, got 'f8'"),
        (["attention", "--case", "x"], "--case must be one of ofa_base_enc_1024, "),
        (["attention", "--threads", "0"], "--threads must be at least 1, got 0"),
        (["attention", "--compare", "pyproject.toml"], "pyproject.toml must be JSON"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_outside_a_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ofakern, "__file__", str(tmp_path / "site/ofakern/__init__.py"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OfakernRuntimeError, match="must run in a checkout"):
        bench._checkout()


def test_page_and_plots(results: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "small.json"
    run.write_json(results, path)
    page = report.page([path])
    assert "## attention" in page and "(`small.json`)" in page and "| small_16 |" in page and "flex" in page
    assert page.index("GEMM f32:") < page.index("## attention")
    assert {p.suffix for p in plots.plot(results, tmp_path)} == {".svg", ".png"}
    turned = json.loads(json.dumps(results))
    for record in turned["records"]:
        record |= {"bound": "gemm", "rates": {"gemm_tflops": 0.5}}
    drawn = [path for path in plots.plot(turned, tmp_path / "in turn") if path.suffix == ".svg"]
    assert drawn and all("GEMM, in turn" in path.read_text(encoding="utf-8") for path in drawn)
    turned["records"] += [record | {"case": "smaller", "rates": {}} for record in turned["records"]]
    mixed = [path for path in plots.plot(turned, tmp_path / "mixed") if path.suffix == ".svg"]
    assert any("of small cases the run's" in path.read_text(encoding="utf-8") for path in mixed)
    for record in results["records"]:
        record["bound"] = "bytes"
    assert plots.plot(results, tmp_path / "other")


def test_comparison_tells_noise_from_change(results: dict[str, Any]) -> None:
    now = json.loads(json.dumps(results))
    for record in now["records"]:
        record["ms"] = {"p20": 0.9, "p50": 1.0, "p80": 1.1}
    old = json.loads(json.dumps(now))
    for n, record in enumerate(old["records"]):
        record["ms"] = {p: ms * (2.0 if n % 2 else 1.1) for p, ms in record["ms"].items()}
    lines = tables.compare(now, old).splitlines()[2:]
    assert [line.split()[6] for line in lines[:2]] == ["1.10", "2.00"]
    assert not lines[0].endswith("faster") and lines[1].endswith("faster")
    assert tables.compare(old, now).splitlines()[3].endswith("slower")
    old["records"] = []
    assert "no record of this run is in the old file" in tables.compare(now, old)


def test_quantiles() -> None:
    assert timing.quantiles([5.0, 1.0, 2.0, 3.0, 4.0, 6.0]) == {"p20": 2.0, "p50": 3.0, "p80": 5.0}


@pytest.mark.skipif(not memory.MemoryMeter.available, reason="needs /proc/self/clear_refs")
def test_memory_of_a_dense_peer_is_its_matrices() -> None:
    """OFASys' formula on ragged holds [8,12,1024,1024] float32 scores, 384 MiB; ours little beyond its output."""
    with memory.MemoryMeter("attention") as meter:
        dense = meter.peak_mib("ragged", "f32", "ofasys", "fwd", 1)
        ours = meter.peak_mib("ragged", "f32", "cpu", "fwd", 1)
    assert dense is not None and ours is not None
    assert 384 <= dense <= 1600
    assert 0 <= ours < dense / 10


def test_gpu_benchmarks_are_those_with_a_gpu_kernel() -> None:
    assert {"attention", "add_layer_norm", "gelu_layer_norm", "layer_norm"} <= set(gpu.names())
    with pytest.raises(OfakernValueError, match="OP must have a GPU kernel with --device cuda .*got 'call_overhead'"):
        gpu.run(run.Options(["call_overhead"]))


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is said without a GPU")
def test_a_gpu_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "attention", "--device", "cuda"]) == 2
    assert "--device cuda must find a GPU, got none" in capsys.readouterr().err


@pytest.mark.parametrize("name", gpu.names())
def test_problems_move_whole(name: str) -> None:
    """Moved to the CPU itself: equal tensors that are others, leaves that ask for a gradient, a contender that runs."""
    op = catalogue.load(name)
    spec = next(op.reduced(spec) for spec in op.cases.values() if spec.quick)
    problem = op.make(spec, "f32")
    other = moved(problem, "cpu")
    assert type(other) is type(problem)
    for field in vars(problem).values():
        if isinstance(field, torch.Tensor):
            same = [x for x in vars(other).values() if isinstance(x, torch.Tensor) and torch.equal(x, field)]
            assert any(x is not field and x.requires_grad == field.requires_grad and x.is_leaf for x in same)
    first, second = (op.contenders[op.ours](x, "cpu") for x in (problem, other))
    assert torch.equal(first.comparable(first.call("fwd")()), second.comparable(second.call(op.phases[-1])()))


@pytest.fixture
def gpu_stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU runner over the CPU kernels and the wall clock: all of it but events, memory and the spin."""

    def sample(call: Any, flush: Any) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    replaced = {
        "BACKENDS": ("cpu",),
        "_size": lambda call: [64, 16],
        "_DEVICE": "cpu",
        "_FLUSH": 8,
        "_GEMM": 64,
        "_sample": sample,
    }
    for name, value in (replaced | {"_peak_mib": lambda call, leaves: 0.0}).items():
        monkeypatch.setattr(gpu, name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a stand-in")


@pytest.mark.usefixtures("gpu_stand_in")
def test_gpu_records_have_the_stated_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "r.json"
    assert (
        cli.main(["bench", "attention", "--device", "cuda", "--quick", "--case", "small_16", "--json", str(path)]) == 0
    )
    found = tables.load(path)
    assert found["machine"]["gpu"] == "a stand-in" and found["wrong"] == []
    assert {(r["phase"], r["dtype"]) for r in found["records"]} == {("fwd", "bf16"), ("fwd+bwd", "bf16")}
    for record in found["records"]:
        assert record.keys() == RECORD | ({"versus", "size"} if record["backend"] == "cpu" else set())
        assert record["device"] == "cuda"
    peers = {"reference", "sdpa_plain", "sdpa_mask", "sdpa_concat", "ofasys"}
    assert {r["backend"] for r in found["records"]} == {"cpu", *peers}
    assert "left out by --quick" in capsys.readouterr().out


@pytest.mark.usefixtures("gpu_stand_in")
def test_a_wrong_gpu_kernel_is_named_and_the_rest_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(*args: Any, **options: Any) -> Any:
        out, lse = attention(*args, **options)
        return out * 1.01, lse

    monkeypatch.setattr(bench_attention, "attention", wrong)
    cases = ["--case", "small_16", "64mb", "--quick", "--dtype", "f32"]
    monkeypatch.setitem(bench_add_layer_norm.CASES, "64mb", replace(bench_add_layer_norm.CASES["64mb"], bytes=4096))
    assert cli.main(["bench", "attention", "add_layer_norm", "--device", "cuda", *cases]) == 1
    printed = capsys.readouterr().out
    assert "WRONG attention small_16 f32" in printed and "add_layer_norm 64mb f32 fwd+bwd torch" in printed
