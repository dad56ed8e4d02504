"""`ofakern bench patch`: models of base size with random weights, patched against their own attention.

The contenders of a case share one set of parameters. A step is: forward, loss, backward and an SGD update with learning
rate 0, so that every step does the same. Where a case has dropout the forward pass runs in training mode too, from a
fixed seed; masks differ between contenders then, so their outputs are not compared there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import ofakern
from benchmarks.core import DTYPES, Contender, Unavailable, Work

OP = "patch"
PHASES = ("fwd", "step")
# Twelve layers of random weights carry one rounding on: these bounds catch another function, `verify` the rest.
AGREEMENT = {"f32": 1e-3, "bf16": 2e-1, "f16": 5e-2}
MEMORY_PEER = "sdpa"
ABOUT = {
    "eager": "the unpatched model, attn_implementation='eager'",
    "sdpa": "the unpatched model, attn_implementation='sdpa', where transformers has it",
}


@dataclass(frozen=True)
class Spec:
    """model: class name in transformers, or of a replica; config: what differs from its config's defaults.

    tokens: per sample (text); target: tokens of the decoder's side; image: pixels of a side, instead of tokens in
    transformers' models; shallow: config for `verify`.
    """

    name: str
    description: str
    model: str
    config: Mapping[str, Any] = field(hash=False)
    batch: int = 2
    tokens: int = 1024
    target: int = 0
    image: int = 0
    dropout: float = 0.0
    shallow: Mapping[str, Any] = field(default_factory=dict, hash=False)
    quick: bool = False
    default: bool = True


_SHALLOW = {"batch": 2, "tokens": 96, "dropout": 0.0}

_T5 = {"d_model": 768, "d_ff": 3072, "d_kv": 64, "num_heads": 12, "num_layers": 12, "vocab_size": 1000}
_GATED = _T5 | {"d_ff": 2048, "feed_forward_proj": "gated-gelu"}
_BEIT = {"use_relative_position_bias": True}
_SWIN = {"embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32]}
_BLOOM = {"vocab_size": 1000, "hidden_size": 768, "n_layer": 12, "n_head": 12}
_MPT = {"vocab_size": 1000, "d_model": 768, "n_layers": 12, "n_heads": 12, "max_seq_len": 1024}

_OFA = {"d_model": 768, "encoder_ffn_dim": 3072, "decoder_ffn_dim": 3072, "vocab_size": 1000}
_OFA |= {"encoder_layers": 6, "decoder_layers": 6, "encoder_attention_heads": 12, "decoder_attention_heads": 12}
_OFA |= {"max_position_embeddings": 1024, "token_bucket_size": 256, "image_bucket_size": 42, "code_image_size": 128}
_OFASYS = {"dim": 768, "heads": 12, "layers": 6, "vocabulary": 1000, "token_bucket_size": 256, "image_bucket_size": 42}
_OFASYS |= {"max_positions": 1024}

_TWO_T5 = {"num_layers": 2, "num_decoder_layers": 2}
_TWO, _TWO_OFA = {"layers": 2}, {"encoder_layers": 2, "decoder_layers": 2}
_TWO_VIT, _TWO_SWIN = {"num_hidden_layers": 2}, {"depths": [2, 2, 2, 2]}

_SPECS = [
    Spec("t5_base_enc_1024", "T5-base's encoder, 2 x 1024 tokens", "T5EncoderModel", _T5, shallow=_TWO_T5, quick=True),
    Spec("umt5_base_enc_1024", "UMT5-base's encoder, 2 x 1024 tokens", "UMT5EncoderModel", _GATED, shallow=_TWO_T5),
    Spec("mt5_base_512", "mT5-base, 2 x 512 to 128 tokens", "MT5Model", _GATED, 2, 512, 128, shallow=_TWO_T5),
    Spec("beit_base_224", "BEiT-base, 4 images of 224", "BeitModel", _BEIT, 4, image=224, shallow=_TWO_VIT),
    Spec("swin_base_224", "Swin-base, 4 images of 224", "SwinModel", _SWIN, 4, image=224, shallow=_TWO_SWIN),
    Spec("bloom_1024", "BLOOM as large as T5-base, 2 x 1024", "BloomModel", _BLOOM, shallow={"n_layer": 2}),
    Spec("mpt_1024", "MPT as large as T5-base, 2 x 1024", "MptModel", _MPT, shallow={"n_layers": 2}),
    Spec("ofa_port_base", "OFA's port (replica), image 480", "OFAModel", _OFA, 2, 124, 32, 480, shallow=_TWO_OFA),
    Spec(
        "ofasys_base", "OFASys (replica), image 480", "GeneralistModel", _OFASYS, 2, 124, 32, 480, shallow={"layers": 2}
    ),
]
_SPECS.insert(
    1,
    replace(_SPECS[0], name="t5_base_enc_1024_dropout", description="the same, dropout 0.1", dropout=0.1, quick=False),
)
CASES: dict[str, Spec] = {spec.name: spec for spec in _SPECS}


@dataclass(frozen=True)
class Problem:
    """A model with eager attention, and what it is called with."""

    spec: Spec
    model: nn.Module
    inputs: dict[str, Tensor]


def make(spec: Spec, dtype: str) -> Problem:
    torch.manual_seed(0)
    model = _model(spec).to(DTYPES[dtype])
    for parameter in model.parameters():
        if not parameter.any():  # tables start at zero: they would not be tested
            nn.init.normal_(parameter, std=0.02)
    return Problem(spec, model.train(spec.dropout > 0), _inputs(spec, DTYPES[dtype]))


# Libraries whose code cannot be here: the classes that their patch is tested on.
_REPLICAS = ("OFAModel", "GeneralistModel")


def _eager_model(spec: Spec) -> nn.Module:
    if spec.model == "OFAModel":
        from tests.patching import ofa_port

        return ofa_port.OFAModel(ofa_port.OFAConfig(**spec.config))
    if spec.model == "GeneralistModel":
        from tests.patching import ofasys_port

        return ofasys_port.GeneralistModel(ofasys_port.config(**spec.config))
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise Unavailable("transformers is not installed (pip install 'ofakern[bench]')") from error
    kind = getattr(transformers, spec.model)
    model: nn.Module = kind(kind.config_class(**spec.config, attn_implementation="eager"))
    return model


def _model(spec: Spec) -> nn.Module:
    model = _eager_model(spec)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = spec.dropout
        if isinstance(vars(module).get("dropout"), float):
            module.dropout = spec.dropout
        if isinstance(vars(module).get("drop_prob"), float):
            module.drop_prob = 0.0
    return model


def _inputs(spec: Spec, dtype: torch.dtype) -> dict[str, Tensor]:
    pixels = torch.randn(spec.batch, 3, spec.image, spec.image).to(dtype)
    if spec.image and spec.model not in _REPLICAS:
        return {"pixel_values": pixels}
    inputs = {"input_ids": torch.randint(3, 1000, (spec.batch, spec.tokens))}
    if spec.target:
        inputs["decoder_input_ids"] = torch.randint(3, 1000, (spec.batch, spec.target))
    if spec.image:
        inputs |= {"patch_images": pixels, "patch_masks": torch.ones(spec.batch, dtype=torch.bool)}
    return inputs


def _call(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """Logits or hidden states; OFASys's model takes slots."""
    if type(model).__name__ != "GeneralistModel":
        made = model(**inputs)
        out: Tensor = made.last_hidden_state if hasattr(made, "last_hidden_state") else made[0]
        return out
    from tests.patching.ofasys_port import Slot

    source = [Slot("image_resnet", inputs["patch_images"]), Slot("text", inputs["input_ids"])]
    out = model([*source, Slot("text", inputs["decoder_input_ids"], is_src=False)])[0]
    return out


def _sharing(model: nn.Module) -> nn.Module:
    """Another instance of the model that holds the same parameters."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def _patched(problem: Problem) -> Contender:
    model = _sharing(problem.model)
    report = ofakern.patch(model)
    if not report.replaced:
        raise Unavailable("nothing of this model can be replaced")
    return _contender("patched", problem, model)


def _eager(problem: Problem) -> Contender:
    return _contender("eager", problem, _sharing(problem.model))


def _sdpa(problem: Problem) -> Contender:
    model = _sharing(problem.model)
    if not getattr(model, "_supports_sdpa", False):
        raise Unavailable("transformers has no SDPA for this model")
    model.config = copy.deepcopy(model.config)
    model.set_attn_implementation("sdpa")
    return _contender("sdpa", problem, model)


CONTENDERS: dict[str, Callable[[Problem], Contender]] = {"patched": _patched, "eager": _eager, "sdpa": _sdpa}


def _contender(name: str, problem: Problem, model: nn.Module) -> Contender:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.0)

    def forward() -> Tensor:
        torch.manual_seed(1)
        return _call(model, problem.inputs)

    def step() -> Tensor:
        out = forward()
        out.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return out.detach()

    exact = problem.spec.dropout == 0
    return Contender(name, forward, tuple(parameters), exact=exact, steps={"step": step})


def work(spec: Spec, dtype: str, phase: str) -> Work:
    """Matrix products of the eager model (a causal model's hidden half included); parameters and gradients once."""
    flops, parameters = _count(spec.name)
    size = torch.finfo(DTYPES[dtype]).bits // 8
    return Work(flops, parameters * size) if phase == "fwd" else Work(3 * flops, 3 * parameters * size)


@lru_cache(maxsize=len(_SPECS))
def _count(case: str) -> tuple[float, int]:
    spec = CASES[case]
    model = _model(spec).eval()
    parameters = sum(p.numel() for p in model.parameters())
    device = "cpu" if spec.model in _REPLICAS else "meta"  # OFA's code asks whether there are pads
    model.to(device)
    inputs = {name: x.to(device) for name, x in _inputs(spec, torch.float32).items()}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        _call(model, inputs)
    return float(counter.get_total_flops()), parameters


def verify(spec: Spec, dtype: str, harness: Any) -> None:
    """A shallow, short copy of the case: output and gradients beside float64, at most twice the eager model's error."""
    image = min(spec.image, 224)
    problem = make(replace(spec, **_SHALLOW, image=image, config={**spec.config, **spec.shallow}), dtype)
    exact = _outcome(copy.deepcopy(problem.model).double(), problem.inputs)
    peer = _off(_outcome(_sharing(problem.model), problem.inputs), exact)
    patched = _sharing(problem.model)
    assert ofakern.patch(patched).replaced, "nothing of this model can be replaced"
    found, bound = _off(_outcome(patched, problem.inputs), exact), 2 * peer + torch.finfo(DTYPES[dtype]).eps
    assert found <= bound, f"relative error {found:.2e} above {bound:.2e}"


def _outcome(model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    """The output and every gradient, float64."""
    dtype = next(model.parameters()).dtype
    model.zero_grad()
    out = _call(model, {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()})
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(dtype)).sum().backward()
    return [x.detach().double() for x in (out, *(p.grad for p in model.parameters() if p.grad is not None))]


def _off(have: list[Tensor], exact: list[Tensor]) -> float:
    """Root mean square of the tensors' relative errors; where all cancels (a key's bias) only roundings are left."""
    sizes = [float(want.abs().max()) for want in exact]
    nothing = 1e-9 * sorted(sizes)[len(sizes) // 2]
    pairs = [pair for pair, size in zip(zip(have, exact, strict=True), sizes, strict=True) if size > nothing]
    off = [float((mine - want).norm() / want.norm()) for mine, want in pairs]
    return float(torch.tensor(off).square().mean().sqrt())
