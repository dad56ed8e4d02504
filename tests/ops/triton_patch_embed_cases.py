"""patch_embed's Triton kernels against the float64 oracle; test_triton_ops.py runs this file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import poisoned_empty
from test_patch_embed import Case, check, make_case, op_inputs
from torch import Tensor
from triton_setup import DEVICE, DTYPES, INTERPRETED, to_device

from ofakern.ops.patch_embed import kernel_triton, patch_embed

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of lanes that are masked

CASES: dict[str, dict[str, Any]] = {
    "chw": {},
    "hwc": {"layout": "hwc"},
    "no norm": {"norm": False},
    "bare": {"norm": False, "extras": False},
    "everything": {"index": True, "layout": "hwc", "width": 34, "sizes": ((1, 8, 12), (1, 0, 4), (1, 4, 40))},
    "sizes": {"sizes": ((1, 24, 36), (1, 4, 4), (1, 16, 8))},
    "tubelets": {"layout": "tchw", "patch": (2, 4, 4), "sizes": ((2, 4, 8, 8),), "index": True},
    "frames first": {"layout": "thwc", "patch": (2, 4, 2), "sizes": ((1, 2, 8, 8), (1, 4, 4, 4))},
    "channels first": {"layout": "cthw", "patch": (1, 2, 4), "sizes": ((1, 3, 4, 8),)},
    "grey": {"channels": 1, "layout": "hwc", "width": 7},
    "wide": {"width": 40, "patch": (16, 16), "channels": 2, "sizes": ((1, 32, 48),)},
    "odd patch": {"patch": (5, 3), "sizes": ((1, 10, 9),), "width": 33},
    "float pixels": {"pixels": torch.float32, "layout": "hwc"},
    "half pixels": {"pixels": torch.float16},
    "empty batch": {"sizes": ((0, 8, 8),)},
}
_BOTH = ("everything", "no norm", "wide", "half pixels")


def run_triton(case: Case) -> dict[str, Tensor]:
    moved = Case(*(to_device(part) for part in (case.images, case.leaves, case.options)))
    with poisoned_empty():
        return {name: result.cpu() for name, result in moved.run("triton").items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_kernels_keep_the_rule(name: str, dtype: torch.dtype) -> None:
    if INTERPRETED and dtype == torch.float16 and name not in _BOTH:
        pytest.skip("float32 is enough when interpreted: the kernels' only difference is the size of tiles")
    check(make_case(dtype, **CASES[name]), run_triton)


@pytest.mark.parametrize("several", [False, True], ids=["one tensor", "several"])
def test_many_tiles_and_splits(several: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles that end inside an image, several columns of tiles, and several parts of the weight's gradient."""
    small = kernel_triton.Blocks(16, 16, 16, 4, 2)
    monkeypatch.setattr(kernel_triton, "_BLOCKS", {2: small, 4: small})
    monkeypatch.setattr(kernel_triton, "_SUMS", {2: small, 4: small})
    monkeypatch.setattr(kernel_triton, "_PROGRAMS", 24)
    sizes = ((1, 12, 16), (1, 28, 4), (1, 8, 4)) if several else ((2, 20, 8),)
    check(make_case(torch.float16, sizes=sizes, width=24), run_triton)


@pytest.mark.skipif(INTERPRETED, reason="minutes when interpreted")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["chw", "hwc"])
def test_model_sizes(layout: str, dtype: torch.dtype) -> None:
    check(make_case(dtype, layout, ((3, 480, 480),), (16, 16), 768), run_triton)
    check(make_case(dtype, layout, ((1, 224, 224), (1, 448, 32), (1, 64, 160)), (16, 16), 1024, index=True), run_triton)


def test_same_bits_every_time() -> None:
    case = make_case(torch.float16, sizes=((1, 16, 12), (1, 4, 4)), width=8, index=True)
    first, again = run_triton(case), run_triton(case)
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_views_without_copies() -> None:
    """Slices, flips and transposed frames read what a contiguous copy reads."""
    case = make_case(torch.float32, sizes=((2, 12, 8),), width=8)
    leaves, options = to_device(case.leaves), to_device(case.options)
    big = torch.randint(0, 256, (2, 3, 24, 16), dtype=torch.uint8, device=DEVICE)
    for view in (big[:, :, 4:16, 4:12], big[:, :, ::2, ::2], big.flip(2)[:, :, :12, :8], big.transpose(2, 3)[..., :8]):
        want = patch_embed(view.contiguous(), **leaves, **options, backend="triton")
        assert torch.equal(patch_embed(view, **leaves, **options, backend="triton"), want)


def test_an_index_out_of_range_is_a_row_of_nan() -> None:
    case = make_case(torch.float32, index=True)
    index = case.options["position_index"]
    index[1], index[4] = -1, case.leaves["position"].shape[0]
    leaves, options = to_device(case.leaves), to_device(case.options)
    leaves["position"].requires_grad_()
    out = patch_embed(case.images.to(DEVICE), **leaves, **options, backend="triton")
    assert out.isnan().all(1).nonzero().flatten().tolist() == [1, 4]
    kept = [n for n in range(len(out)) if n not in (1, 4)]
    assert bool(out[kept].isfinite().all())
    (grad,) = torch.autograd.grad(out[kept].square().sum(), leaves["position"])
    assert bool(grad.isfinite().all())


@pytest.mark.parametrize("extras", [False, True], ids=["bare", "full"])
def test_the_registered_ops(extras: bool) -> None:
    inputs = to_device(op_inputs(make_case(torch.float32, width=8, extras=extras, norm=extras)))
    ops, checks = torch.ops.ofakern, ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.patch_embed_fwd_triton.default, inputs, test_utils=checks)
    dout = ops.patch_embed_fwd_triton(*inputs)
    torch.library.opcheck(ops.patch_embed_bwd_triton.default, [dout, *inputs], test_utils=checks)


def _first_scale_only(scale: Any, shift: Any, *rest: Any) -> Tensor:
    return _channels((scale[0],) * len(scale), shift, *rest)


def _shifted_start(given: Any, tiles: Any, tokens: int) -> list[list[int]]:
    return [[start + 1, *rest] for start, *rest in _strides(given, tiles, tokens)]


def _position_of_image_0(given: Any, dposition: Tensor, dy: Tensor) -> Any:
    launch = _position_launch(given, dposition, dy)
    launch.arguments["images"] = 1
    return launch


_channels, _strides = kernel_triton._channels, kernel_triton._strides
_position_launch = kernel_triton.position_launch
WRONG: dict[str, tuple[dict[str, Any], Callable[[pytest.MonkeyPatch], None]]] = {
    "one deviation for all": ({}, lambda patch: patch.setattr(kernel_triton, "_channels", _first_scale_only)),
    "a pixel off": (
        {"sizes": ((1, 8, 12), (1, 4, 4))},
        lambda patch: patch.setattr(kernel_triton, "_strides", _shifted_start),
    ),
    "positions of one image": ({}, lambda patch: patch.setattr(kernel_triton, "position_launch", _position_of_image_0)),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_launches_break_the_rule(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options, wrong = WRONG[name]
    case = make_case(torch.float32, width=8, **options)
    wrong(monkeypatch)
    with pytest.raises(AssertionError):
        check(case, run_triton)
