"""What `auto` takes on a GPU, and the words in which a GPU, a driver or a build is refused. No GPU is needed."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses import FakeTensorMode

from ofakern.errors import BackendError, OfakernWarning
from ofakern.ops import dispatch, gpu, selection
from ofakern.ops.selection import Backends

HOPPER = (9, 0)


@pytest.fixture
def backends(monkeypatch: pytest.MonkeyPatch) -> Backends:
    """An op with a Triton kernel, on a machine whose GPU is a Hopper."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: HOPPER)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "H200")
    monkeypatch.setattr(selection, "_warned", set())
    made = Backends("an_op", "rotation_6d", triton=True)
    made.unavailable["triton"] = None
    return made


def on_gpu(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    with FakeTensorMode(allow_non_fake_inputs=True):
        return torch.empty(*shape, dtype=dtype, device="cuda")


def test_without_a_rule_auto_takes_the_reference_and_says_so_once(backends: Backends) -> None:
    x = on_gpu(4, 64)
    with pytest.warns(OfakernWarning, match=r"an_op: 'auto' takes the reference .*\nTry: backend='triton'; ofakern"):
        assert backends.select("auto", x) == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.select("auto", x) == "reference"
        assert backends.select("reference", x) == "reference"
        assert Backends("another", "rotation_6d").select("auto", x) == "reference"  # no kernel to name
        assert backends.select("auto", on_gpu(4, 64, dtype=torch.float64)) == "reference"
        assert backends.select("auto", torch.empty(4, 64, device="meta")) == "reference"


def test_a_rule_covers_its_gpu_dtype_widths_and_lengths(backends: Backends, monkeypatch: pytest.MonkeyPatch) -> None:
    rule = dispatch.Rule("triton", HOPPER, torch.bfloat16, (64, 128), (1024, 4096), "h200-attention.json")
    monkeypatch.setitem(dispatch.TABLE, "an_op", (rule,))
    assert backends.select("auto", on_gpu(128, 8, 64)) == "triton"
    for x in (on_gpu(127, 8, 64), on_gpu(4097, 64), on_gpu(1024, 63), on_gpu(1024, 64, dtype=torch.float16)):
        assert backends.automatic(x) == "reference"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    assert backends.automatic(on_gpu(128, 8, 64)) == "reference"


def test_a_named_backend_is_never_left(backends: Backends) -> None:
    backends.unavailable["triton"] = "broken"
    with pytest.raises(BackendError, match="backend 'triton' cannot run this call: broken"):
        backends.select("triton", on_gpu(4, 64))


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        ("80, 90a, 100", (9, 0), True),
        ("80, 90a, 100", (8, 6), True),  # compiles 80's PTX for itself
        ("80, 90a, 100", (7, 5), False),
        ("90a", (9, 0), True),
        ("90a", (10, 0), False),
        ("100", (9, 0), False),
        ("90-real", (9, 0), True),
    ],
)
def test_which_gpus_a_build_runs_on(architectures: str, capability: tuple[int, int], runs: bool) -> None:
    reason = gpu.architecture_refusal(architectures, capability, "H200")
    assert (reason is None) == runs
    if reason is not None:
        assert "must be one that ofakern was built for" in reason and "OFAKERN_CUDA_ARCHITECTURES=native" in reason


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is said without a GPU")
@pytest.mark.parametrize(
    ("driver", "words"),
    [
        (0, "no NVIDIA driver is installed"),
        (12040, r"the driver must be as new as CUDA 13.0, got one of CUDA 12.4. Try: a newer"),
        (13000, "torch sees no GPU here"),
    ],
)
def test_what_is_said_of_drivers(driver: int, words: str) -> None:
    module = SimpleNamespace(driver_version=lambda: driver, runtime_version=lambda: 13000)
    assert words in str(gpu.driver_refusal(module))
