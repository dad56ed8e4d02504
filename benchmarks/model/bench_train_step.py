"""A training step of OFA-base: our model, and the same model with attention, linear layers and loss done by torch code.

A step is forward, loss and the gradient of every parameter; the optimizer, the same for all, is left out. Phases:
`step` the whole, `transformer` all but the ResNet (its features are given and get a gradient), `resnet` the rest.
`python -m benchmarks.model.bench_train_step CASE DTYPE THREADS` prints where the time of a step goes, by op.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any
from unittest import mock

import psutil
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.core import DTYPES, Contender, Phase, Unavailable, Work
from benchmarks.model.train_step_peers import ATTENTION, EPSILON, plain_loss
from ofakern.data.batch import Example, PackedBatch, Segment
from ofakern.instruction import Modality
from ofakern.modality.image.adaptor import ImageResnetAdaptor, ImageResnetConfig
from ofakern.modality.text.adaptor import TextAdaptorConfig
from ofakern.model import OFAConfig, OFAPlus
from ofakern.nn import Linear, recompute
from ofakern.nn import attention as nn_attention
from ofakern.nn.loss import label_smoothed_cross_entropy

OP = "train_step"
OURS = "ofakern"
PHASES: tuple[Phase, ...] = ("resnet", "transformer", "step")
ABOUT = {
    "sdpa_mask": "the same model on SDPA: the bias of each layer as a dense mask, its position term shared by the "
    "layers; torch's linear layers; all logits at once; nothing computed again",
    "ofasys": "the same model by OFASys' formula: the bias cloned per layer, bmm, float32 softmax, einsum; torch's "
    "linear layers; all logits at once; nothing computed again",
}
_BACKBONE = "image_resnet.embed_images"
_STRIDE = 16
_DENSE_COPIES = 9  # [B, H, T, T] buffers that a dense peer keeps per encoder layer, float32 ones as two in bf16


@dataclass(frozen=True)
class Spec:
    """A case: images of `image` pixels and `source` text tokens in, `target` tokens out, in every sample."""

    name: str
    description: str
    batch: int
    image: int = 480
    source: int = 124
    target: int = 32
    small: bool = False
    quick: bool = False
    default: bool = True

    @property
    def tokens(self) -> int:
        return (self.image // _STRIDE) ** 2 + self.source

    def config(self) -> OFAConfig:
        if not self.small:
            return replace(OFAConfig.from_size("base"), dropout=0.0)
        return OFAConfig(
            adaptors=(TextAdaptorConfig(), ImageResnetConfig(resnet_blocks=(1, 1, 1), resnet_width=8)),
            dim=64,
            ffn_dim=128,
            heads=4,
            encoder_layers=2,
            decoder_layers=2,
            vocab_size=997,
            dropout=0.0,
        )


CASES: dict[str, Spec] = {
    spec.name: spec
    for spec in (
        Spec("ofa_base_480_b2", "OFA-base, image 480 and 124 text tokens, 32 target tokens, batch 2", 2),
        Spec("ofa_base_480_b4", "the same, batch 4", 4),
        Spec("small_96_b2", "2 + 2 layers of width 64, image 96, batch 2", 2, 96, 20, 9, small=True, quick=True),
    )
}


@dataclass
class Problem:
    spec: Spec
    model: OFAPlus
    batch: PackedBatch
    features: Tensor

    @property
    def backbone(self) -> torch.nn.Module:
        return self.model.encoder.adaptor.get_submodule(_BACKBONE)

    def parameters(self, phase: Phase) -> list[Tensor]:
        """What a phase differentiates by."""
        inside = {id(p) for p in self.backbone.parameters()}
        if phase == "resnet":
            return list(self.backbone.parameters())
        every: list[Tensor] = [p for p in self.model.parameters() if p.requires_grad]
        return every if phase == "step" else [*(p for p in every if id(p) not in inside), self.features]


def make(spec: Spec, dtype: str) -> Problem:
    """One model for all contenders, its weights and the batch from fixed seeds."""
    model = OFAPlus(spec.config(), seed=1).to(DTYPES[dtype]).train()
    generator = torch.Generator().manual_seed(2)
    batch = model.prepare(PackedBatch.collate([_example(spec, generator) for _ in range(spec.batch)]))
    for segment in batch.source.segments:
        if segment.adaptor == "image_resnet":
            object.__setattr__(segment, "value", segment.value.to(DTYPES[dtype]))
    problem = Problem(spec, model, batch, torch.empty(0))
    side = spec.image // _STRIDE
    adaptor = model.encoder.adaptor.get_submodule("image_resnet")
    assert isinstance(adaptor, ImageResnetAdaptor)
    shape = (spec.batch, adaptor.image_proj.in_features, side, side)
    problem.features = torch.randn(shape, generator=generator).to(DTYPES[dtype]).requires_grad_()
    return problem


def _example(spec: Spec, generator: torch.Generator) -> Example:
    def tokens(count: int) -> Tensor:
        return torch.randint(4, spec.config().vocab_size, (count,), generator=generator)

    image = torch.randn(3, spec.image, spec.image, generator=generator)
    source = [
        Segment(0, "image_resnet", Modality.IMAGE, image, (spec.image // _STRIDE) ** 2),
        Segment(1, "text", Modality.TEXT, tokens(spec.source)),
    ]
    return Example(source, [Segment(2, "text", Modality.TEXT, tokens(spec.target))], tokens(spec.target))


def _steps(problem: Problem, attention: Any, loss: Callable[[Tensor], Tensor]) -> dict[Phase, Callable[[], Tensor]]:
    """The phases' calls with `attention` in the place of ours (None: ours)."""

    def step(phase: Phase) -> Tensor:
        with _attention(attention), _features(problem, given=phase == "transformer"), _kept(attention is not None):
            value = loss(problem.model(problem.batch))
            torch.autograd.grad(value, problem.parameters(phase), allow_unused=True)
        return value.detach()

    def resnet() -> Tensor:
        with _kept(attention is not None):
            out: Tensor = problem.backbone(_image(problem))
            torch.autograd.grad(out, problem.parameters("resnet"), problem.features.detach())
        return out.detach()

    return {"step": lambda: step("step"), "transformer": lambda: step("transformer"), "resnet": resnet}


def _image(problem: Problem) -> Tensor:
    return next(segment.value for segment in problem.batch.source.segments if segment.adaptor == "image_resnet")


@contextmanager
def _attention(replacement: Any) -> Iterator[None]:
    """`replacement` for attention, and torch's linear layers, unless it is None."""
    if replacement is None:
        yield
        return
    replacement.begin()
    with mock.patch.object(nn_attention, "attention", replacement), mock.patch.object(Linear, "backend", "reference"):
        yield


@contextmanager
def _features(problem: Problem, given: bool) -> Iterator[None]:
    if not given:
        yield
        return
    with mock.patch.object(problem.backbone, "forward", lambda image: problem.features):
        yield


@contextmanager
def _kept(all_of_it: bool) -> Iterator[None]:
    """Peers keep all that their backward pass reads."""
    if not all_of_it:
        yield
        return
    with mock.patch.object(recompute, "_FEW", float("inf")):
        yield


def ours(problem: Problem) -> Contender:
    def loss(hidden: Tensor) -> Tensor:
        return label_smoothed_cross_entropy(hidden, problem.model.output_weight, problem.batch.labels, EPSILON).loss

    return _contender(OURS, problem, _steps(problem, None, loss))


def _peer(name: str) -> Callable[[Problem], Contender]:
    def build(problem: Problem) -> Contender:
        spec, config = problem.spec, problem.spec.config()
        matrix = spec.batch * config.heads * spec.tokens**2 * problem.features.element_size()
        wanted, free = matrix * _DENSE_COPIES * config.encoder_layers, psutil.virtual_memory().available
        if wanted > free:
            raise Unavailable(
                f"its dense [B, H, T, T] matrices take about {wanted / 2**30:.0f} GiB, "
                f"this machine has {free / 2**30:.0f} GiB free"
            )

        def loss(hidden: Tensor) -> Tensor:
            return plain_loss(hidden, problem.model.output_weight, problem.batch.labels)

        return _contender(name, problem, _steps(problem, ATTENTION[name](), loss))

    return build


def _contender(name: str, problem: Problem, steps: dict[Phase, Callable[[], Tensor]]) -> Contender:
    return Contender(name, steps["transformer"], tuple(problem.parameters("step")), steps=steps)


CONTENDERS: dict[str, Callable[[Any], Contender]] = {OURS: ours} | {name: _peer(name) for name in ATTENTION}


def reduced(spec: Spec) -> Spec:
    return CASES["small_96_b2"] if not spec.small else spec


def work(spec: Spec, dtype: str, phase: Phase) -> Work:
    """The work of a phase: matrix products and convolutions forward, and twice as much backward.

    Per encoder token 8 D^2 + 4 D F, and attention as `bench_attention` counts it (pairs * H * (384 forward + 1024
    backward) at K = P = 64); the decoder's cross attention and the logits 2 D V. Bytes: the parameters read in both
    passes and their gradients written.
    """
    c = spec.config()
    resnet, inside, every = _sizes(spec.small, spec.image)
    resnet *= spec.batch
    parameters = {"step": every, "transformer": every - inside, "resnet": inside}[phase]
    sources, targets, dim, width = spec.batch * spec.tokens, spec.batch * spec.target, c.dim, c.dim // c.heads
    layer = 8 * dim**2 + 4 * dim * c.ffn_dim
    products = c.encoder_layers * sources * layer
    products += c.decoder_layers * (targets * (layer + 4 * dim**2) + sources * 4 * dim**2)
    products += 2 * targets * dim * c.vocab_size + 8 * dim**2 * (sources + targets)
    pairs = c.encoder_layers * sources * spec.tokens
    pairs += c.decoder_layers * (targets * (spec.target + 1) // 2 + targets * spec.tokens)
    transformer = 3.0 * products + pairs * c.heads * width * (6 + 16)
    flops = {"step": transformer + 3 * resnet, "transformer": transformer, "resnet": 3 * resnet}[phase]
    return Work(float(flops), 3.0 * DTYPES[dtype].itemsize * parameters)


@cache
def _sizes(small: bool, image: int) -> tuple[float, int, int]:
    """Of the ResNet its flops for one image and its parameters, and the parameters of the whole model."""
    with torch.device("meta"):
        model = OFAPlus(CASES["small_96_b2" if small else "ofa_base_480_b2"].config())
    resnet = model.encoder.adaptor.get_submodule(_BACKBONE)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        resnet.train()(torch.empty(1, 3, image, image, device="meta"))
    inside, every = (sum(p.numel() for p in part.parameters()) for part in (resnet, model))
    return float(counter.get_total_flops()), inside, every


def verify(spec: Spec, dtype: str, harness: Any) -> None:
    """Raises AssertionError unless all contenders give one loss and one set of gradients on the small case, in f32."""
    problem = make(reduced(spec), "f32")
    wanted, names = _outcome(problem, OURS), [name for name, p in problem.model.named_parameters() if p.requires_grad]
    for name in ATTENTION:
        for what, have, want in zip(["loss", *names], _outcome(problem, name), wanted, strict=True):
            error, size = (have - want).norm(), want.norm()
            assert error <= 1e-3 * size + 1e-5, f"{what} of {name}: {error:.2e} off, of {size:.2e}"


def _outcome(problem: Problem, name: str) -> list[Tensor]:
    """Loss and gradients of every parameter by a contender."""
    found: list[Tensor] = []
    grad = torch.autograd.grad

    def keep(outputs: Tensor, inputs: list[Tensor], *args: Any, **kwargs: Any) -> Any:
        gradients = grad(outputs, inputs, *args, **kwargs)
        found.extend(torch.zeros_like(x) if g is None else g for x, g in zip(inputs, gradients, strict=True))
        return gradients

    with mock.patch("torch.autograd.grad", keep):
        loss = CONTENDERS[name](problem).call("step")()
    assert isinstance(loss, Tensor)
    return [loss, *found]


def profile(case: str, dtype: str, threads: int) -> str:
    """Of each contender's step, the ops that take most of its time."""
    torch.set_num_threads(threads)
    problem = make(CASES[case], dtype)
    parts = []
    for name, build in CONTENDERS.items():
        call = build(problem).call("step")
        call()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
            call()
        table = recorded.key_averages().table(sort_by="self_cpu_time_total", row_limit=14, max_name_column_width=40)
        parts.append(f"{name}, {case}, {dtype}\n{table}")
    return "\n".join(parts)


if __name__ == "__main__":
    print(profile(sys.argv[1], sys.argv[2], int(sys.argv[3])))
