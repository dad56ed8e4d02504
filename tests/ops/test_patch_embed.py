"""patch_embed: every result and gradient against the float64 reference, on every instruction set, and its refusals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rule import assert_kept
from short import examples
from torch import Tensor

import ofakern
from ofakern.errors import BackendError, OfakernRuntimeError, OfakernTypeError, OfakernValueError
from ofakern.ops import native
from ofakern.ops.patch_embed import patch_embed

pytestmark = pytest.mark.usefixtures("cpu")

MEAN, STD = (0.48, 0.46, 0.41, 0.5), (0.23, 0.26, 0.28, 0.2)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Case:
    """Arguments of one call; `leaves` are its parameters by name."""

    images: Any
    leaves: dict[str, Tensor]
    options: dict[str, Any]

    def run(self, backend: str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Output and gradients, all parameters in `dtype` (their own when None)."""
        leaves = {name: leaf.detach().to(dtype or leaf.dtype).requires_grad_() for name, leaf in self.leaves.items()}
        out = patch_embed(self.images, **leaves, **self.options, backend=backend)
        generator = torch.Generator().manual_seed(7)
        dout = torch.randn(out.shape, generator=generator).to(self.leaves["weight"].dtype).to(out)
        grads = torch.autograd.grad(out, list(leaves.values()), dout)
        return {"out": out.detach()} | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def make_case(
    dtype: torch.dtype,
    layout: str = "chw",
    sizes: tuple[tuple[int, ...], ...] = ((2, 12, 8),),
    patch: tuple[int, ...] = (4, 4),
    width: int = 20,
    channels: int = 3,
    norm: bool = True,
    index: bool = False,
    extras: bool = True,
    pixels: torch.dtype = torch.uint8,
) -> Case:
    """sizes: (n, h, w) or (n, t, h, w) of one batch, or one image each when there are several."""
    generator = torch.Generator().manual_seed(width + 31 * len(sizes))

    def normal(*shape: int, like: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator).to(like)

    def image(size: tuple[int, ...]) -> Tensor:
        count, *sides = size
        lengths = dict(zip("thw"[-len(sides) :], sides, strict=True)) | {"c": channels}
        shape = (count, *(lengths[letter] for letter in layout))
        if pixels == torch.uint8:
            return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        return normal(*shape, like=pixels)

    images = [image(size) for size in sizes]
    cells = [[side // p for side, p in zip(size[1:], patch, strict=True)] for size in sizes]
    per_image = [int(torch.tensor(c).prod()) for c in cells]
    tokens = sum(n * size[0] for n, size in zip(per_image, sizes, strict=True))
    volume = channels * int(torch.tensor(patch).prod())
    leaves = {"weight": normal(width, channels, *patch, like=dtype) * volume**-0.5}
    if extras:
        leaves |= {"bias": normal(width), "type_embedding": normal(width)}
        leaves["position"] = normal(max([*per_image, 1]) + 2, width, like=dtype)
    if norm:
        leaves |= {"ln_weight": normal(width), "ln_bias": normal(width)}
    options: dict[str, Any] = {"layout": layout, "mean": MEAN[:channels], "std": STD[:channels]}
    if index:
        options["position_index"] = torch.randint(
            0, leaves["position"].shape[0], (tokens,), generator=generator, dtype=torch.int32
        )
    several = len(sizes) > 1
    return Case([x[0] for x in images] if several else images[0], leaves, options)


def run_cpu(case: Case) -> dict[str, Tensor]:
    return case.run("cpu")


def check(case: Case, call: Callable[[Case], dict[str, Tensor]] = run_cpu) -> None:
    """The rule of tests/ops/rule.py; `size`, what a result adds up, is estimated from the largest results.

    A gradient sums over tokens, N terms of either sign: their absolute values add up to about N**0.5 times the sum. In
    half precision the roundings of the terms matter, not those of the sum.
    """
    dtype = case.leaves["weight"].dtype
    got, exact, peer = call(case), case.run("reference", torch.float64), case.run("reference", dtype)
    for name, want in exact.items():
        terms = exact["out"].shape[0] ** 0.5 if dtype == torch.float32 and name != "out" else 1.0
        size = torch.full_like(want, terms * float(want.abs().max()) if want.numel() else 0.0)
        own = got[name].dtype if name == "out" else case.leaves[name[1:]].dtype
        assert got[name].dtype == own
        assert_kept(name, got[name], want, peer[name].to(dtype), size, dtype)


CASES: dict[str, dict[str, Any]] = {
    "chw": {},
    "hwc": {"layout": "hwc"},
    "no norm": {"norm": False},
    "bare": {"norm": False, "extras": False},
    "index": {"index": True},
    "sizes": {"sizes": ((1, 8, 12), (1, 4, 4), (1, 16, 8)), "layout": "hwc"},
    "tubelets": {"layout": "tchw", "patch": (2, 4, 4), "sizes": ((2, 4, 8, 8),)},
    "frames first": {"layout": "thwc", "patch": (2, 4, 2), "sizes": ((1, 2, 8, 8), (1, 4, 4, 4))},
    "channels first": {"layout": "cthw", "patch": (1, 2, 4), "sizes": ((1, 3, 4, 8),)},
    "grey": {"channels": 1, "layout": "hwc", "width": 7},
    "wide": {"width": 130, "patch": (16, 16), "sizes": ((2, 160, 176),)},
    "odd patch": {"patch": (5, 3), "sizes": ((1, 10, 9),), "width": 33},
    "float pixels": {"pixels": torch.float32, "layout": "hwc"},
    "empty batch": {"sizes": ((0, 8, 8),)},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_results_and_gradients(isa: str, name: str, dtype: torch.dtype) -> None:
    check(make_case(dtype, **CASES[name]))


@settings(max_examples=examples(25), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.tuples(st.just(1), st.integers(0, 3), st.integers(0, 3)), min_size=2, max_size=4),
    layout=st.sampled_from(["chw", "hwc"]),
    dtype=st.sampled_from(DTYPES),
    patch=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    width=st.integers(2, 70),
    channels=st.integers(1, 4),
    flags=st.tuples(st.booleans(), st.booleans()),
)
def test_any_shape(
    sizes: list[tuple[int, int, int]],
    layout: str,
    dtype: torch.dtype,
    patch: tuple[int, int],
    width: int,
    channels: int,
    flags: tuple[bool, bool],
) -> None:
    norm, index = flags
    grids = tuple((1, h * patch[0], w * patch[1]) for _, h, w in sizes)
    check(make_case(dtype, layout, grids, patch, width, channels, norm, index))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_tokens_and_groups(dtype: torch.dtype) -> None:
    """More tokens than one block and one group of the weight's gradient, and a width beyond one task of it."""
    case = make_case(dtype, sizes=((3, 100, 120),), patch=(2, 2), width=400)
    check(case)


@pytest.mark.parametrize("name", ["chw", "wide", "tubelets"])
def test_bits_do_not_depend_on_threads(name: str) -> None:
    case = make_case(torch.bfloat16, **CASES[name])
    torch.set_num_threads(1)
    first = case.run("cpu")
    torch.set_num_threads(3)
    for result, other in case.run("cpu").items():
        assert torch.equal(first[result], other), result


def test_equal_deviations_round_no_weight() -> None:
    """Only a ratio of deviations touches the weight: with equal ones bf16 tokens are exact sums, rounded once."""
    case = make_case(torch.bfloat16, norm=False, extras=False)
    case.options |= {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    out = patch_embed(case.images, case.leaves["weight"], **case.options, backend="cpu")
    exact = patch_embed(case.images, case.leaves["weight"].double(), **case.options, backend="reference")
    half = torch.finfo(torch.bfloat16).eps / 2
    assert torch.all((out.double() - exact).abs() <= half * exact.abs() * 1.001 + 1e-6)


@pytest.mark.parametrize("large", [slice(0, 16), slice(16, None), slice(None)], ids=["head", "tail", "all"])
def test_statistics_of_rows_far_from_zero(isa: str, large: slice) -> None:
    """Mean and variance of one sweep: nothing cancels when the first lanes, the rest or all are 1000 deviations off."""
    case = make_case(torch.float32, width=72)
    case.leaves["bias"][large] += 1000
    got, exact = case.run("cpu"), case.run("reference", torch.float64)
    torch.testing.assert_close(got["out"].double(), exact["out"], rtol=0, atol=1e-3)


def test_poisoned_outputs_are_all_written(cpu: Any) -> None:
    case = make_case(torch.float32, index=True)
    leaves = case.leaves
    images = case.images.unsqueeze(1)
    normalise = torch.tensor([[1 / 255.0] * 3, [0.0] * 3], dtype=torch.float64)
    inputs = [
        *([images], leaves["weight"].unsqueeze(2), normalise, leaves["bias"], None, leaves["position"]),
        *(case.options["position_index"], leaves["ln_weight"], leaves["ln_bias"], 1e-5, 1),
    ]
    out = torch.full((12, 20), torch.nan)
    scratch = torch.full((cpu.patch_embed_forward_workspace(*inputs),), 255, dtype=torch.uint8)
    cpu.patch_embed_forward(out, scratch, *inputs)
    shapes = (leaves["weight"].unsqueeze(2).shape, (20,), leaves["position"].shape, (20,), (20,))
    grads = [torch.full(tuple(shape), torch.nan) for shape in shapes]
    scratch = torch.full((cpu.patch_embed_backward_workspace(*inputs),), 255, dtype=torch.uint8)
    cpu.patch_embed_backward(*grads, scratch, torch.ones(12, 20), *inputs)
    assert all(bool(torch.isfinite(x).all()) for x in (out, *grads))
    with pytest.raises(OfakernValueError, match="workspace"):
        cpu.patch_embed_forward(out, scratch[:64], *inputs)
    with pytest.raises(OfakernValueError, match=r"position_index must be in \[0, 8\), got 9 for token 0"):
        inputs[6] = torch.full((12,), 9, dtype=torch.int32)
        cpu.patch_embed_forward(out, scratch, *inputs)


def test_views_without_copies() -> None:
    """Slices, flips and transposed frames read what a contiguous copy reads."""
    case = make_case(torch.float32, sizes=((2, 12, 8),))
    big = torch.randint(0, 256, (2, 3, 24, 16), dtype=torch.uint8)
    for view in (big[:, :, 4:16, 4:12], big[:, :, ::2, ::2], big.flip(2)[:, :, :12, :8], big.transpose(2, 3)[..., :8]):
        want = patch_embed(view.contiguous(), **case.leaves, **case.options, backend="cpu")
        assert torch.equal(patch_embed(view, **case.leaves, **case.options, backend="cpu"), want)


def op_inputs(case: Case) -> list[Any]:
    leaves = case.leaves
    return [
        *("chw", [case.images], leaves["weight"], [0.01] * 3, [0.1] * 3, leaves.get("bias")),
        *(leaves.get("type_embedding"), leaves.get("position"), None, leaves.get("ln_weight"), leaves.get("ln_bias")),
        1e-5,
    ]


@pytest.mark.parametrize("extras", [False, True], ids=["bare", "full"])
def test_opcheck(extras: bool) -> None:
    inputs = op_inputs(make_case(torch.float32, extras=extras, norm=extras))
    torch.library.opcheck(torch.ops.ofakern.patch_embed_fwd.default, inputs)
    dout = torch.ops.ofakern.patch_embed_fwd(*inputs)
    torch.library.opcheck(torch.ops.ofakern.patch_embed_bwd.default, [dout, *inputs])


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile_full_graph(dynamic: bool) -> None:
    case = make_case(torch.float32)
    names = list(case.leaves)

    def loss(images: Tensor, *leaves: Tensor) -> Tensor:
        return patch_embed(images, **dict(zip(names, leaves, strict=True)), **case.options).square().sum()

    leaves = [leaf.requires_grad_() for leaf in case.leaves.values()]
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    got = torch.autograd.grad(compiled(case.images, *leaves), leaves)
    for a, b in zip(got, torch.autograd.grad(loss(case.images, *leaves), leaves), strict=True):
        torch.testing.assert_close(a, b)


def test_autocast_casts_the_weight() -> None:
    case = make_case(torch.float32)
    leaves = {name: leaf.requires_grad_() for name, leaf in case.leaves.items()}
    with torch.autocast("cpu", torch.bfloat16):
        out = patch_embed(case.images, **leaves, **case.options)
    assert out.dtype == torch.bfloat16
    grads = torch.autograd.grad(out.float().sum(), list(leaves.values()))
    assert all(grad.dtype == torch.float32 for grad in grads)


def test_second_derivatives_and_vmap_are_refused() -> None:
    case = make_case(torch.float32)
    weight = case.leaves["weight"].requires_grad_()
    out = patch_embed(case.images, weight, backend="cpu")
    (grad,) = torch.autograd.grad(out.square().sum(), weight, create_graph=True)
    with pytest.raises(OfakernRuntimeError, match="patch_embed: a compiled backend's gradient"):
        grad.sum().backward()
    with pytest.raises(OfakernRuntimeError, match="under vmap"):
        torch.vmap(lambda w: patch_embed(case.images, w, backend="cpu"))(torch.stack([weight.detach()] * 2))


def test_gradient_to_float_pixels_is_the_references() -> None:
    case = make_case(torch.float32, pixels=torch.float32)
    images = case.images.requires_grad_()
    with pytest.raises(BackendError, match="gives no gradient to pixels"):
        patch_embed(images, **case.leaves)
    out = patch_embed(images, **case.leaves, backend="reference")
    assert torch.autograd.grad(out.sum(), images)[0].shape == images.shape


def test_reference_gradients() -> None:
    case = make_case(torch.float64, sizes=((1, 4, 4),), patch=(2, 2), width=3)
    leaves = [leaf.double().requires_grad_() for leaf in case.leaves.values()]

    def function(*given: Tensor) -> Tensor:
        named = dict(zip(case.leaves, given, strict=True))
        return patch_embed(case.images, **named, **case.options, backend="reference")

    assert torch.autograd.gradcheck(function, leaves)


def test_explain_names_the_backend(capsys: pytest.CaptureFixture[str]) -> None:
    case = make_case(torch.float32)
    assert "patch_embed: runs on 'cpu'" in ofakern.explain("patch_embed", case.images, case.leaves["weight"])
    assert "gives no gradient" not in capsys.readouterr().out
    assert native.cpu is not None


W = torch.zeros(8, 3, 4, 4)
IMAGES = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
REFUSED: list[tuple[str, type[Exception], dict[str, Any]]] = [
    ("weight must be \\[D,C,ph,pw\\]", OfakernValueError, {"weight": W[0]}),
    ("weight must be float32", OfakernTypeError, {"weight": W.int()}),
    ("images must be a tensor or a sequence", OfakernTypeError, {"images": 3}),
    ("images must be uint8", OfakernTypeError, {"images": IMAGES.int()}),
    ("images must have shape \\[n,C,H,W\\]", OfakernValueError, {"images": IMAGES[0]}),
    ("must have weight's 3 channels", OfakernValueError, {"images": IMAGES.permute(0, 2, 3, 1)}),
    ("images must have H a multiple of 4, got 7", OfakernValueError, {"images": IMAGES[:, :, 1:]}),
    ("images\\[1\\] must have images\\[0\\]'s", OfakernTypeError, {"images": [IMAGES[0], IMAGES[0].float()]}),
    ("layout must be one of 'chw', 'hwc'", OfakernValueError, {"layout": "thwc"}),
    ("mean must have 3 numbers", OfakernValueError, {"mean": (0.5,)}),
    ("std must be positive", OfakernValueError, {"std": (0.5, 0.0, 0.5)}),
    ("bias must have shape \\[D=8\\]", OfakernValueError, {"bias": torch.zeros(7)}),
    ("ln_weight and ln_bias must be given together", OfakernValueError, {"ln_weight": torch.ones(8)}),
    ("position must have a row for every patch", OfakernValueError, {"position": torch.zeros(3, 8)}),
    ("position must have shape", OfakernValueError, {"position": torch.zeros(4, 7)}),
    ("position_index must come with position", OfakernValueError, {"position_index": torch.zeros(4).int()}),
    (
        "position_index must have shape \\[N=4\\]",
        OfakernValueError,
        {"position": torch.zeros(4, 8), "position_index": torch.zeros(3).int()},
    ),
    (
        "position_index must be an int32 tensor",
        OfakernTypeError,
        {"position": torch.zeros(4, 8), "position_index": torch.zeros(4)},
    ),
    ("eps must be at least 0", OfakernValueError, {"eps": -1.0}),
    ("backend must be one of", OfakernValueError, {"backend": "gpu"}),
    ("backend 'cuda' cannot run this call", BackendError, {"backend": "cuda"}),
]


@pytest.mark.parametrize(("message", "error", "changes"), REFUSED, ids=[entry[0] for entry in REFUSED])
def test_refusals(message: str, error: type[Exception], changes: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        patch_embed(**({"images": IMAGES, "weight": W} | changes))


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_blocks_on_many_threads(isa: str, dtype: torch.dtype) -> None:
    """Enough tokens for several blocks, so that every thread sets up its own tiles."""
    images = torch.randn(36, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    weight = torch.randn(128, 3, 8, 8, generator=torch.Generator().manual_seed(2)).to(dtype)
    alone = patch_embed(images, weight)
    torch.set_num_threads(3)
    assert torch.equal(patch_embed(images, weight), alone)
