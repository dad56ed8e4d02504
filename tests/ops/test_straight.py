"""The way past the dispatcher: taken only where nothing of torch's stands between, and never seen in the results."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ofakern.errors import OfakernTypeError, OfakernValueError
from ofakern.ops.attention import AttentionLayout, RelativeTerm, attention, intervals
from ofakern.ops.attention import op as attention_op
from ofakern.ops.cross_entropy import cross_entropy
from ofakern.ops.cross_entropy import op as cross_entropy_op
from ofakern.ops.decode_linear import decode_linear, prepack_weight
from ofakern.ops.layer_norm import add_layer_norm, embed_layer_norm, gelu_layer_norm, head_scale_layer_norm
from ofakern.ops.layer_norm import op as layer_norm_op
from ofakern.ops.log_mel import kaldi, log_mel
from ofakern.ops.log_mel import op as log_mel_op
from ofakern.ops.patch_embed import op as patch_op
from ofakern.ops.patch_embed import patch_embed
from ofakern.ops.rms_norm import op as rms_norm_op
from ofakern.ops.rms_norm import rms_norm
from ofakern.ops.rotation_6d import op as rotation_op
from ofakern.ops.rotation_6d import rotation_6d
from ofakern.ops.routed_ffn import op as routed_op
from ofakern.ops.routed_ffn import routed_linear

pytestmark = pytest.mark.usefixtures("cpu")
GENERATOR = torch.Generator().manual_seed(5)
POSITION = torch.arange(6, dtype=torch.int32)
LAYOUT = AttentionLayout.build(
    intervals.causal([4, 2]), [4, 2], [4, 2], [RelativeTerm(POSITION + 5, POSITION, intervals.full([4, 2]), 11)]
)
SEED = torch.tensor([3, 4])
TOKENS = torch.tensor([3, 0, 3, 1])
PIXELS = torch.arange(2 * 3 * 8 * 4).view(2, 3, 8, 4).to(torch.uint8)
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.2)


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=GENERATOR)


Op = tuple[Callable[..., Tensor], Sequence[Tensor]]
OPS: dict[str, Op] = {
    "attention": (
        lambda q, k, v, q_pos, k_pos, table, scale: attention(q, k, v, LAYOUT, q_pos, k_pos, [table], scale),
        (*(randn(6, 2, 8) for _ in range(5)), randn(2, 11), randn(2)),
    ),
    "add_layer_norm": (
        lambda *inputs: torch.add(*add_layer_norm(*inputs)),
        (randn(3, 8), randn(3, 8), randn(8), randn(8)),
    ),
    "gelu_layer_norm": (gelu_layer_norm, (randn(3, 8), randn(8), randn(8))),
    "head_scale_layer_norm": (head_scale_layer_norm, (randn(3, 2, 4), randn(2), randn(8), randn(8))),
    "embed_layer_norm": (lambda *inputs: embed_layer_norm(TOKENS, *inputs), (randn(5, 8), randn(8), randn(8))),
    "rms_norm": (rms_norm, (randn(3, 8), randn(8))),
    "rotation_6d": (rotation_6d, (randn(3, 6),)),
    "cross_entropy": (
        lambda hidden, weight, bias: cross_entropy(hidden, weight, TOKENS, bias, epsilon=0.1, backend="cpu").loss,
        (randn(4, 8), randn(5, 8), randn(5)),
    ),
    "routed_linear": (
        lambda x, a, b, c, d: routed_linear(x, [a, b], [c, d], [1, 2], torch.tensor([2, 0, 1]), backend="cpu"),
        (randn(3, 8), randn(6, 8), randn(6, 8), randn(6), randn(6)),
    ),
    "patch_embed": (
        lambda weight, bias, kind, position, ln_weight, ln_bias: patch_embed(
            *(PIXELS, weight, bias),
            mean=MEAN,
            std=STD,
            type_embedding=kind,
            position=position,
            ln_weight=ln_weight,
            ln_bias=ln_bias,
        ),
        (randn(6, 3, 4, 4), randn(6), randn(6), randn(2, 6), randn(6), randn(6)),
    ),
}
FORWARD: dict[str, dict[str, object]] = layer_norm_op._FORWARD | {
    "attention": attention_op._FORWARD,
    "rms_norm": rms_norm_op._FORWARD,
    "rotation_6d": rotation_op._FORWARD,
    "cross_entropy": cross_entropy_op._SUM,
    "routed_linear": routed_op._FORWARD,
    "patch_embed": patch_op._FORWARD,
}
REGISTERED = {name: f"{name}_fwd" for name in OPS} | {"cross_entropy": "cross_entropy_sum"}
NAMES = pytest.mark.parametrize("name", OPS)


def gradients(name: str, view: Callable[[Tensor], Tensor] = lambda x: x) -> list[Tensor]:
    function, inputs = OPS[name]
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = function(*map(view, leaves))
    return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]


class Seen(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs every op and keeps its name."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@NAMES
def test_the_same_bits_with_and_without_the_dispatcher(name: str) -> None:
    straight = gradients(name)
    with Seen() as seen:
        dispatched = gradients(name)
    assert f"ofakern.{REGISTERED[name]}.default" in seen.names
    assert all(torch.equal(a, b) for a, b in zip(straight, dispatched, strict=True))


@NAMES
def test_a_profiler_sees_the_op(name: str) -> None:
    function, inputs = OPS[name]
    with torch.profiler.profile() as profile, torch.no_grad():
        function(*inputs)
    assert f"ofakern::{REGISTERED[name]}" in {event.key for event in profile.key_averages()}


@NAMES
def test_nothing_is_dispatched_where_nothing_asks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function, inputs = OPS[name]
    monkeypatch.delitem(FORWARD[name], "cpu")
    with torch.no_grad():
        function(*inputs)
    with pytest.raises(KeyError, match="cpu"), Seen():
        function(*inputs)


@NAMES
def test_views_are_copied_where_a_kernel_cannot_read_them(name: str) -> None:
    strided = gradients(name, lambda x: torch.stack([x, x], -1)[..., 1])
    negated = gradients(name, lambda x: torch._neg_view(-x))
    for got in (strided, negated):
        assert all(torch.equal(a, b) for a, b in zip(got, gradients(name), strict=True))


def test_parameters_of_another_dtype_are_cast_as_ever() -> None:
    _, (x, weight, bias) = OPS["gelu_layer_norm"]
    low = gelu_layer_norm(x, weight.bfloat16(), bias.bfloat16())
    assert torch.equal(low, gelu_layer_norm(x, weight.bfloat16().float(), bias.bfloat16().float()))


def test_fake_tensors_get_shapes() -> None:
    with FakeTensorMode():
        x, weight, bias = torch.empty(3, 8), torch.empty(8), torch.empty(8)
    out = gelu_layer_norm(x, weight, bias)  # outside of their mode
    assert isinstance(out, FakeTensor) and out.shape == (3, 8)


class Marked(Tensor):
    """A subclass without any behaviour of its own."""


def test_subclasses_go_through_torch() -> None:
    _, (x, weight, bias) = OPS["gelu_layer_norm"]
    marked = x.as_subclass(Marked)
    with Seen() as seen:
        out = gelu_layer_norm(marked, weight, bias)
    assert "ofakern.gelu_layer_norm_fwd.default" in seen.names
    assert torch.equal(out.as_subclass(Tensor), gelu_layer_norm(x, weight, bias))
    assert torch.equal(gelu_layer_norm(marked, weight, bias).as_subclass(Tensor), gelu_layer_norm(x, weight, bias))


def test_what_only_python_checked_before_is_still_refused() -> None:
    x, weight, bias = randn(2, 8), randn(8), randn(8)
    with pytest.raises(OfakernValueError, match=r"residual must have x's shape \[2, 8\], got \[1, 2, 8\]"):
        add_layer_norm(x, x[None], weight, bias)
    table = randn(5, 8)
    with pytest.raises(OfakernValueError, match=r"types must have tokens' shape \[4\], got \[2, 2\]"):
        embed_layer_norm(TOKENS, table, weight, bias, table, TOKENS.view(2, 2))
    with pytest.raises(OfakernValueError, match="scale must be finite, got inf"):
        embed_layer_norm(TOKENS, table, weight, bias, scale=float("inf"))
    q = randn(6, 0, 8)
    with pytest.raises(OfakernValueError, match="H must be a multiple of k's heads"):
        attention(q, q, q, AttentionLayout.build(intervals.full([6]), [6], [6]))
    with pytest.raises(OfakernTypeError, match="x must be a tensor, got list"):
        gelu_layer_norm([1.0], weight, bias)  # type: ignore[arg-type]
    none: Any = None
    with pytest.raises(OfakernTypeError, match="x must be a tensor, got NoneType"):
        gelu_layer_norm(none, weight, bias)
    with pytest.raises(OfakernTypeError, match="bias must be a tensor, got NoneType"):
        head_scale_layer_norm(x.view(2, 2, 4), randn(2), weight, none)
    with pytest.raises(OfakernTypeError, match="residual must be a tensor, got NoneType"):
        add_layer_norm(x, none, weight, bias)
    with pytest.raises(OfakernTypeError, match="weight must be a tensor, got NoneType"):
        rms_norm(x, none)
    with pytest.raises(OfakernValueError, match="eps must be at least 0, got -1.0"):
        rms_norm(x, weight, -1.0)
    with pytest.raises(OfakernTypeError, match="hidden must be a tensor, got NoneType"):
        cross_entropy(None, table, TOKENS)  # type: ignore[arg-type]
    with pytest.raises(OfakernValueError, match="always_allowed must be an int of at least 0, got -1"):
        cross_entropy(randn(4, 8), table, TOKENS, always_allowed=-1)
    with pytest.raises(OfakernTypeError, match="images must be uint8, .* got torch.bool"):
        patch_embed(PIXELS.bool(), randn(6, 3, 4, 4))
    with pytest.raises(OfakernValueError, match=r"images\[0\] must have shape \[C,H,W\], got \[2, 3, 8, 4\]"):
        patch_embed([PIXELS], randn(6, 3, 4, 4))
    with pytest.raises(OfakernValueError, match="std must be positive"):
        patch_embed(PIXELS, randn(6, 3, 4, 4), std=(1.0, -1.0, 1.0))
    with pytest.raises(OfakernValueError, match=r"wave must be \[N\], all waveforms end to end, got \[\]"):
        log_mel(torch.tensor(1.0), convention=kaldi())


def test_decode_linear_gives_no_gradient_and_the_same_bits() -> None:
    weight, x = prepack_weight([randn(24, 16), randn(8, 16)]), randn(3, 16)
    straight = decode_linear(x, weight)
    with Seen() as seen:
        dispatched = decode_linear(x, weight)
    assert "ofakern.decode_linear_fwd.default" in seen.names
    assert all(torch.equal(a, b) for a, b in zip(straight, dispatched, strict=True))


def test_log_mel_gives_no_gradient_and_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    wave, convention = randn(3000), kaldi()
    straight = log_mel(wave, [2000, 1000], convention=convention)
    with Seen() as seen:
        dispatched = log_mel(wave, [2000, 1000], convention=convention)
    assert "ofakern.log_mel_fwd.default" in seen.names
    assert torch.equal(straight, dispatched)
    monkeypatch.delitem(log_mel_op._FORWARD, "cpu")
    log_mel(wave, convention=convention)


def test_images_as_users_have_them() -> None:
    """Every layout, batched, listed and strided, past the dispatcher and through it."""
    weight = {4: randn(6, 3, 4, 4), 5: randn(6, 3, 2, 4, 4)}
    for layout, shape in (("chw", "nchw"), ("hwc", "nhwc"), ("cthw", "ncthw"), ("tchw", "ntchw"), ("thwc", "nthwc")):
        sizes = dict(n=2, c=3, t=4, h=8, w=4)
        images = torch.randint(0, 256, [sizes[x] for x in shape], generator=GENERATOR).to(torch.uint8)
        kernel = weight[images.ndim]
        want = patch_embed(images, kernel, layout=layout, mean=MEAN, std=STD, backend="reference")
        wide = torch.stack([images, images], -1)[..., 1]
        for given in (images, list(images), wide, [images[0], wide[1]]):
            straight = patch_embed(given, kernel, layout=layout, mean=MEAN, std=STD)
            with Seen():
                dispatched = patch_embed(given, kernel, layout=layout, mean=MEAN, std=STD)
            assert torch.equal(straight, dispatched)
            torch.testing.assert_close(straight, want, rtol=1e-4, atol=1e-4)


def test_autocast_goes_the_other_way() -> None:
    hidden, weight = randn(4, 8), randn(5, 8)
    want = cross_entropy(hidden.bfloat16(), weight.bfloat16(), TOKENS, backend="cpu").loss
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(cross_entropy(hidden, weight, TOKENS, backend="cpu").loss, want)
        assert routed_linear(hidden, [weight], [], [4], backend="cpu").dtype == torch.bfloat16
        assert patch_embed(PIXELS, randn(6, 3, 4, 4)).dtype == torch.bfloat16


def test_a_layout_is_checked_once_and_found_where_it_moves() -> None:
    function, inputs = OPS["attention"]
    want = function(*inputs)
    offsets, visible = LAYOUT.q_offsets.data_ptr(), LAYOUT.visible.data_ptr()
    for moved in (LAYOUT.visible, LAYOUT.q_offsets, LAYOUT.terms[0].k_coord):
        moved.share_memory_()  # torch gives its memory back
        assert torch.equal(function(*inputs), want)
    assert (offsets, visible) != (LAYOUT.q_offsets.data_ptr(), LAYOUT.visible.data_ptr())


@pytest.mark.parametrize("of", [copy.copy, copy.deepcopy, lambda layout: pickle.loads(pickle.dumps(layout))])
def test_a_layout_in_use_is_copied_without_what_the_kernel_keeps(
    of: Callable[[AttentionLayout], AttentionLayout],
) -> None:
    q, k, v, q_pos, k_pos, table, scale = OPS["attention"][1]
    want = attention(q, k, v, LAYOUT, q_pos, k_pos, [table], scale)
    assert "checked" in vars(LAYOUT)
    layout = of(LAYOUT)
    assert "checked" not in vars(layout)
    assert torch.equal(attention(q, k, v, layout, q_pos, k_pos, [table], scale), want)


def test_a_layout_of_loose_tensors_is_looked_at_whole() -> None:
    q, k, v, q_pos, k_pos, table, scale = OPS["attention"][1]
    loose = LAYOUT._map(torch.clone)
    want = attention(q, k, v, loose, q_pos, k_pos, [table], scale)
    loose.terms[0].k_coord.share_memory_()
    assert torch.equal(attention(q, k, v, loose, q_pos, k_pos, [table], scale), want)
    loose.k_offsets.resize_(7)  # no longer a layout of this batch
    with pytest.raises(OfakernValueError, match="k_offsets must have shape"):
        attention(q, k, v, loose, q_pos, k_pos, [table], scale)


def test_results_are_the_same_with_and_without_the_log_sum_exp() -> None:
    q, k, v, q_pos, k_pos, table, scale = OPS["attention"][1]
    inputs = (q, k, v, LAYOUT, q_pos, k_pos, [table], scale)
    out, lse = attention(*inputs, return_lse=True)
    assert torch.equal(attention(*inputs), out)
    with Seen():
        dispatched = attention(*inputs, return_lse=True)
    assert torch.equal(out, dispatched[0]) and torch.equal(lse, dispatched[1])


def test_what_only_the_layout_knows_is_checked() -> None:
    q, k, v, q_pos, k_pos, table, scale = OPS["attention"][1]
    for wrong, words in (
        ([table[:, :10].contiguous()], r"tables\[0\] must have shape \[H=2,rows=11\]"),
        ([], "tables must be one per term"),
        ([table, table], "tables must be one per term"),
    ):
        with pytest.raises(OfakernValueError, match=words):
            attention(q, k, v, LAYOUT, q_pos, k_pos, wrong, scale)
    with pytest.raises(OfakernTypeError, match="q must be a tensor, got list"):
        attention([1.0], k, v, LAYOUT, q_pos, k_pos, [table], scale)  # type: ignore[call-overload]
    with pytest.raises(OfakernTypeError, match="layout must be an AttentionLayout"):
        attention(q, k, v, None, q_pos, k_pos, [table], scale)  # type: ignore[call-overload]


def test_a_backward_pass_of_shared_positions_past_the_dispatcher() -> None:
    layout = AttentionLayout.build(intervals.full([3, 2]), [3, 2], [3, 2], (), [0, 0], [0, 0])

    def run() -> list[Tensor]:
        generator = torch.Generator().manual_seed(2)
        leaves = [torch.randn(n, 2, 8, generator=generator).requires_grad_() for n in (5, 5, 5, 3, 3)]
        q, k, v, q_pos, k_pos = leaves
        out, lse = attention(q, k, v, layout, q_pos, k_pos, dropout_p=0.2, dropout_seed=SEED, return_lse=True)
        return [out, *torch.autograd.grad(out.square().sum() + lse.sum(), leaves)]

    straight = run()
    with Seen() as seen:
        dispatched = run()
    assert "ofakern.attention_bwd.default" in seen.names
    assert all(torch.equal(a, b) for a, b in zip(straight, dispatched, strict=True))


def test_threads_do_not_share_their_workspace() -> None:
    """Calls of several threads at once, of sizes that make the kept workspace grow."""
    inputs = [randn(tokens, 4, 32) for tokens in (3, 70, 300)]
    layouts = [AttentionLayout.build(intervals.full([len(x)]), [len(x)], [len(x)]) for x in inputs]
    want = [attention(x, x, x, layout) for x, layout in zip(inputs, layouts, strict=True)]
    wrong: list[int] = []

    def work() -> None:
        torch.set_num_threads(1)
        for _ in range(20):
            for n, (x, layout) in enumerate(zip(inputs, layouts, strict=True)):
                if not torch.equal(attention(x, x, x, layout), want[n]):
                    wrong.append(n)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
