"""patch_embed in CUDA C++: the rule of the CPU's kernel, on an emulated GPU and on a real one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_patch_embed import Case, check, make_case, op_inputs
from torch import Tensor

import ofakern
from ofakern.errors import BackendError, OfakernRuntimeError, OfakernValueError
from ofakern.ops import native
from ofakern.ops.patch_embed import patch_embed

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# An emulated tile costs as much with one token as with 128.
CASES: dict[str, dict[str, Any]] = {
    "chw": {"width": 16},
    "bytes in vectors": {"patch": (4, 16), "sizes": ((2, 8, 48),), "width": 8},
    "interleaved vectors": {"patch": (4, 16), "sizes": ((1, 8, 32), (1, 4, 16)), "layout": "hwc", "width": 8},
    "everything": {"index": True, "layout": "hwc", "width": 136, "sizes": ((1, 8, 12), (1, 0, 4), (1, 4, 20))},
    "no norm": {"norm": False, "width": 8},
    "bare": {"norm": False, "extras": False, "width": 24},
    "tubelets": {"layout": "tchw", "patch": (2, 4, 4), "sizes": ((2, 4, 8, 8),), "index": True, "width": 8},
    "odd patch": {"patch": (5, 3), "sizes": ((1, 10, 9),), "width": 8, "channels": 1},
    "float pixels": {"pixels": torch.float32, "layout": "hwc", "width": 8},
    "half pixels": {"pixels": torch.float16, "width": 8},
    "several steps": {"patch": (8, 16), "sizes": ((1, 16, 64),), "width": 16},
    "empty batch": {"sizes": ((0, 8, 8),), "width": 8},
}


def moved(case: Case, device: torch.device) -> Case:
    def to(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device)
        if isinstance(value, dict):
            return {name: to(item) for name, item in value.items()}
        return [to(item) for item in value] if isinstance(value, list) else value

    return Case(to(case.images), to(case.leaves), to(case.options))


def run_on(device: torch.device) -> Any:
    return lambda case: {name: result.cpu() for name, result in moved(case, device).run("cuda").items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_kernels_keep_the_rule(cuda_device: torch.device, name: str, dtype: torch.dtype) -> None:
    check(make_case(dtype, **CASES[name]), run_on(cuda_device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_tiles(cuda_device: torch.device, dtype: torch.dtype) -> None:
    """Tiles that end inside an image, and several of them in a part of the weight's gradient."""
    check(make_case(dtype, sizes=((3, 20, 40),), patch=(2, 2), channels=1, width=8), run_on(cuda_device))


def test_more_images_than_a_launch_takes(cuda_device: torch.device) -> None:
    case = make_case(torch.float32, sizes=((1, 4, 4),) * 35, channels=1, width=8)
    check(case, run_on(cuda_device))


@pytest.mark.parametrize("width", [768, 2048])
def test_model_widths(cuda_device: torch.device, width: int) -> None:
    if cuda_device.type == "cpu":
        pytest.skip("seconds when emulated")
    for dtype in DTYPES:
        for layout in ("chw", "hwc"):
            check(make_case(dtype, layout, ((3, 480, 480),), (16, 16), width), run_on(cuda_device))
    sizes = ((1, 224, 224), (1, 448, 32), (1, 64, 160))
    check(make_case(torch.bfloat16, "chw", sizes, (16, 16), width, index=True), run_on(cuda_device))


def test_the_same_bits_every_time(cuda_device: torch.device) -> None:
    case = make_case(torch.bfloat16, **CASES["everything"])
    first = run_on(cuda_device)(case)
    for seed in (2, 3):
        if cuda_device.type == "cpu":
            native.cuda_kernels.set_seed(seed)
        again = run_on(cuda_device)(case)
        assert all(torch.equal(first[name], again[name]) for name in first)


def test_results_are_all_written(cuda_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results and scratch start as NaN: the bindings ask torch.empty for both."""
    empty = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        x = empty(*args, **kwargs)
        return x.fill_(torch.nan if x.is_floating_point() else 255)

    monkeypatch.setattr(torch, "empty", poisoned)
    found = run_on(cuda_device)(make_case(torch.float16, **CASES["everything"]))
    assert all(bool(result.isfinite().all()) for result in found.values())


def test_views_without_copies(cuda_device: torch.device) -> None:
    case = moved(make_case(torch.float32, sizes=((1, 8, 8),), width=8), cuda_device)
    big = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8, device=cuda_device)
    for view in (
        big[:, :, 4:12, 4:12],
        big[:, :, ::2, ::2],
        big.flip(2)[:, :, :8, :8],
        big.transpose(2, 3)[:, :, :8, :8],
    ):
        want = patch_embed(view.contiguous(), **case.leaves, **case.options, backend="cuda")
        assert torch.equal(patch_embed(view, **case.leaves, **case.options, backend="cuda"), want)


def test_an_index_out_of_range_is_a_row_of_nan(cuda_device: torch.device) -> None:
    case = make_case(torch.float32, index=True, width=8)
    case.options["position_index"][[1, 4]] = torch.tensor([-1, 99], dtype=torch.int32)
    case = moved(case, cuda_device)
    out = patch_embed(case.images, **case.leaves, **case.options, backend="cuda")
    assert out.isnan().all(1).nonzero().flatten().tolist() == [1, 4]
    assert int(out.isnan().any(1).sum()) == 2


def test_the_registered_ops(cuda_device: torch.device) -> None:
    inputs = op_inputs(make_case(torch.float32, width=8))
    inputs = [moved(Case(x, {}, {}), cuda_device).images for x in inputs]
    ops, checks = torch.ops.ofakern, ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.patch_embed_fwd.default, inputs, test_utils=checks)
    dout = ops.patch_embed_fwd(*inputs)
    torch.library.opcheck(ops.patch_embed_bwd.default, [dout, *inputs], test_utils=checks)


def test_what_the_kernels_cannot_do_is_told(cuda_device: torch.device) -> None:
    case = moved(make_case(torch.float32, width=20), cuda_device)
    with pytest.raises(BackendError, match="a D that is a multiple of 8 up to 2048, got 20"):
        patch_embed(case.images, **case.leaves, **case.options, backend="cuda")
    weight = torch.ones(8, 17, 1, 2, 2, device=cuda_device)
    image, normalise = torch.ones(1, 1, 17, 2, 2, device=cuda_device), torch.ones(2, 17, dtype=torch.float64)
    with pytest.raises(OfakernValueError, match="weight must have at most 16 channels, got 17"):
        native.cuda_kernels.patch_embed([image], weight, normalise, *[None] * 6, 1e-5)


def test_a_failed_launch_returns_nothing(cuda_device: torch.device) -> None:
    if cuda_device.type != "cpu":
        pytest.skip("failures are made by the emulator")
    case = make_case(torch.float32, width=8)
    native.cuda_kernels.fail_next_launch(700)
    with pytest.raises(OfakernRuntimeError, match="CUDA kernel patch_fold<float>: not launched: an earlier"):
        patch_embed(case.images, **case.leaves, **case.options, backend="cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is said without a GPU")
def test_without_a_gpu_the_reason_is_told() -> None:
    case = make_case(torch.float32, width=8)
    with pytest.raises(BackendError, match="backend 'cuda' cannot run this call: "):
        patch_embed(case.images, case.leaves["weight"], backend="cuda")
    assert "cuda" in ofakern.explain("patch_embed", case.images, case.leaves["weight"])
