"""decode_layers: whole decoder steps against float64, and bit for bit against the ops that they replace."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rule import assert_kept
from torch import Tensor

import ofakern
from ofakern.errors import BackendError, OfakernRuntimeError, OfakernTypeError, OfakernValueError
from ofakern.ops.decode_attention import KeyValueCache, decode_attention
from ofakern.ops.decode_layers import LayerParts, PreparedLayers, StepNorm, decode_layers, prepare_layers
from ofakern.ops.decode_layers.reference import decode_layers_reference
from ofakern.ops.decode_linear import decode_linear, prepack_weight
from ofakern.ops.decode_linear.reference import quantize_rows
from ofakern.ops.layer_norm import add_layer_norm, gelu_layer_norm

pytestmark = pytest.mark.usefixtures("cpu")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PROJECTIONS = ("own", "own_out", "cross", "cross_out", "fc1", "fc2")
EXTRAS = ("own_extra", "cross_extra", "ffn_norm")


@dataclass(frozen=True)
class Form:
    """What a decoder's layers look like. extras: NormFormer's norms; heads: weights of the heads."""

    norm_first: bool = True
    activation: str = "gelu"
    extras: bool = True
    residual: bool = False
    heads: bool = True
    shared_bias: bool = False
    biased: bool = True
    finish: bool = True


FORMS = {
    "OFA": Form(),
    "post-norm, relu": Form(False, "relu", extras=False, heads=False, finish=False),
    "post-norm, gelu, bare ffn": Form(False, extras=False, residual=True, finish=False, shared_bias=True),
    "residual scale, no biases": Form(residual=True, biased=False),
    "pre-norm without a last norm": Form(finish=False, activation="relu"),
}


@dataclass
class Case:
    """Two samples of `rows` rows, `counts` steps and `lengths` source tokens; layers as the reference takes them."""

    form: Form
    dtype: torch.dtype
    layers: list[dict[str, Any]]
    finish: tuple[Tensor, Tensor, float] | None
    x: Tensor
    past: list[tuple[Tensor, Tensor]]
    source: list[tuple[Tensor, Tensor]]
    slots: Tensor
    table: Tensor
    own_bias: Tensor | None
    cross_bias: Tensor | None
    int8: bool = False
    heads: int = 5
    row_offsets: tuple[int, ...] = (0, 3, 5)
    counts: tuple[int, ...] = (4, 2)
    lengths: tuple[int, ...] = (37, 530)

    def options(self) -> dict[str, Any]:
        form = self.form
        return {"heads": self.heads, "norm_first": form.norm_first, "activation": form.activation}

    def prepared(self) -> PreparedLayers:
        def norm(parts: tuple[Tensor, Tensor, float] | None) -> StepNorm | None:
            return None if parts is None else StepNorm(*parts)

        layers = []
        for layer in self.layers:
            packed = {name: prepack_weight(*layer[name], int8=self.int8) for name in PROJECTIONS}
            norms = {name: norm(layer[name]) for name in ("own_norm", "cross_norm", "final_norm", *EXTRAS)}
            rest = {name: layer[name] for name in ("own_heads", "cross_heads", "residual", "own_scale", "cross_scale")}
            layers.append(LayerParts(**packed, **norms, **rest))  # type: ignore[arg-type]
        return prepare_layers(layers, **self.options(), finish=norm(self.finish))

    def caches(self) -> tuple[list[KeyValueCache], list[KeyValueCache]]:
        """What is not the past's is NaN."""
        own = []
        for k, v in self.past:
            cache = KeyValueCache.empty(len(k), self.heads, k.shape[2], None, self.dtype)
            for store, values in ((cache.keys, k), (cache.values, v)):
                store.fill_(torch.nan)[self.before()] = values[self.before()]
            own.append(cache)
        return own, [KeyValueCache.of_source(k, v, self.lengths) for k, v in self.source]

    def before(self) -> Tensor:
        """Slots that are written already."""
        taken = [self.table[r, : n - 1] for r, n in enumerate(self.row_counts())]
        return torch.unique(torch.cat(taken)).long()

    def row_counts(self) -> list[int]:
        return [n for b, n in enumerate(self.counts) for _ in range(self.row_offsets[b], self.row_offsets[b + 1])]

    def inputs(self) -> tuple[Tensor, ...]:
        offsets, counts = (torch.tensor(x, dtype=torch.int32) for x in (self.row_offsets, self.counts))
        return offsets, self.slots, self.table, counts

    def run(self) -> tuple[Tensor, list[KeyValueCache]]:
        own, source = self.caches()
        biases = {"own_bias": self.own_bias, "cross_bias": self.cross_bias}
        return decode_layers(self.x, self.prepared(), own, source, *self.inputs(), **biases), own

    def reference(self, dtype: torch.dtype) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """In `dtype`: everything but the norms, whose parameters stay what they are."""
        to: Callable[[Any], Any] = partial(_mapped, change=lambda x: x.to(dtype))
        layers = [
            {name: to(self._weight(part) if name in PROJECTIONS else part) for name, part in layer.items()}
            for layer in self.layers
        ]
        past = [(k.clone().to(dtype), v.clone().to(dtype)) for k, v in self.past]
        biases = [None if b is None else b.to(torch.promote_types(dtype, torch.float32)) for b in self.biases()]
        out = decode_layers_reference(
            self.x.to(dtype),
            layers,
            past,
            to(self.source),
            self.lengths,
            self.row_offsets,
            self.slots,
            self.table,
            self.counts,
            **self.options(),
            finish=to(self.finish),
            own_bias=biases[0],
            cross_bias=biases[1],
        )
        return out, past

    def biases(self) -> tuple[Tensor | None, Tensor | None]:
        return self.own_bias, self.cross_bias

    def _weight(self, part: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
        if not self.int8:
            return part
        stored, scale = quantize_rows(part[0])
        return stored * scale[:, None], part[1]


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (list, tuple)):
        return type(value)(_mapped(one, change) for one in value)
    return value


def draw(form: Form = FORMS["OFA"], dtype: torch.dtype = torch.float32, width: int = 40, hidden: int = 72) -> Case:
    generator = torch.Generator().manual_seed(width)
    heads = 5

    def normal(*shape: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
        return torch.randn(shape, generator=generator) * scale + mean

    def projection(n: int, k: int) -> tuple[Tensor, Tensor | None]:
        return normal(n, k, scale=k**-0.5).to(dtype), normal(n, scale=0.3) if form.biased else None

    def norm(n: int, there: bool = True) -> tuple[Tensor, Tensor, float] | None:
        made = normal(n, scale=0.2, mean=1.0).to(dtype), normal(n, scale=0.2).to(dtype), 1e-5
        return made if there else None

    shapes = ((3 * width, width), (width, width), (width, width), (width, width), (hidden, width), (width, hidden))
    layers: list[dict[str, Any]] = []
    for _ in range(2):
        layer: dict[str, Any] = {name: projection(*s) for name, s in zip(PROJECTIONS, shapes, strict=True)}
        layer |= {name: norm(width) for name in ("own_norm", "cross_norm", "final_norm")}
        layer |= {name: norm(hidden if name == "ffn_norm" else width, form.extras) for name in EXTRAS}
        layer |= {name: normal(heads, mean=1.0) if form.heads else None for name in ("own_heads", "cross_heads")}
        layer["residual"] = normal(width, scale=0.2, mean=1.0).to(dtype) if form.residual else None
        layers.append(layer | {"own_scale": 0.3, "cross_scale": 0.25})
    case = Case(
        form,
        dtype,
        layers,
        norm(width, form.finish),
        normal(5, width).to(dtype),
        [tuple(normal(16, heads, width // heads).to(dtype) for _ in range(2)) for _ in range(2)],  # type: ignore[misc]
        [],
        torch.tensor([9, 2, 15, 0, 7], dtype=torch.int32),
        torch.tensor([[4, 5, 6, 9], [4, 5, 8, 2], [4, 5, 6, 15], [1, 0, 3, 3], [1, 7, 3, 3]], dtype=torch.int32),
        normal(1 if form.shared_bias else 2, heads, 6) if form.biased else None,
        normal(heads, 567) if form.biased else None,
    )
    tokens = sum(case.lengths)
    case.source = [tuple(normal(tokens, heads, width // heads).to(dtype) for _ in range(2)) for _ in range(2)]  # type: ignore[misc]
    return case


def check(case: Case) -> None:
    got, caches = case.run()
    exact, exact_past = case.reference(torch.float64)
    peer, peer_past = case.reference(case.dtype)
    size = exact.abs() + 1.0  # what LayerNorm's outputs and residuals of this size are sums of
    assert got.dtype == case.dtype
    assert_kept("out", got, exact, peer, size, case.dtype)
    written = case.slots.long()
    for cache, wanted, other in zip(caches, exact_past, peer_past, strict=True):
        for store, values, theirs in zip((cache.keys, cache.values), wanted, other, strict=True):
            assert_kept(
                "cache", store[written], values[written], theirs[written], values[written].abs() + 1, case.dtype
            )
            untouched = torch.tensor([s for s in range(16) if s not in {*written.tolist(), *case.before().tolist()}])
            assert store[untouched].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS.values(), ids=list(FORMS))
def test_whole_steps(isa: str, form: Form, dtype: torch.dtype) -> None:
    check(draw(form, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_int8_weights(isa: str, dtype: torch.dtype) -> None:
    check(replace(draw(dtype=dtype), int8=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bits_are_those_of_the_ops(isa: str, dtype: torch.dtype) -> None:
    case = draw(dtype=dtype)
    assert torch.equal(case.run()[0], by_op(case))


def by_op(case: Case) -> Tensor:
    """OFA's layers, one public op after the other."""
    own, source = case.caches()
    offsets, slots, table, counts = case.inputs()

    def linear(x: Tensor, layer: dict[str, Any], name: str) -> Tensor:
        out = decode_linear(x, prepack_weight(*layer[name]))
        assert isinstance(out, Tensor)
        return out

    def norm(x: Tensor, parts: Any, onto: Tensor | None = None) -> tuple[Tensor, Tensor]:
        residual = torch.zeros_like(x) if onto is None else onto
        return add_layer_norm(x, residual, parts[0].float(), parts[1].float(), parts[2])

    x, seen = case.x, norm(case.x, case.layers[0]["own_norm"])[0]
    assert case.own_bias is not None
    for number, layer in enumerate(case.layers):
        q, k, v = (part.reshape(len(x), case.heads, -1) for part in linear(seen, layer, "own").chunk(3, 1))
        own[number].write(slots, k, v)
        attend = partial(decode_attention, head_scale=layer["own_heads"], scale=layer["own_scale"])
        y = attend(q.contiguous(), own[number], offsets, slots=table, counts=counts, bias=case.own_bias[number])
        y = norm(linear(y.flatten(1), layer, "own_out"), layer["own_extra"])[0]
        seen, x = norm(y, layer["cross_norm"], x)
        q = linear(seen, layer, "cross").reshape(len(x), case.heads, -1)
        attend = partial(decode_attention, head_scale=layer["cross_heads"], scale=layer["cross_scale"])
        y = linear(attend(q, source[number], offsets, bias=case.cross_bias).flatten(1), layer, "cross_out")
        seen, x = norm(norm(y, layer["cross_extra"])[0], layer["final_norm"], x)
        weight, bias, eps = layer["ffn_norm"]
        y = linear(gelu_layer_norm(linear(seen, layer, "fc1"), weight.float(), bias.float(), eps), layer, "fc2")
        seen, x = norm(y, (case.layers[1]["own_norm"], case.finish)[number], x)
    return seen


def test_bits_do_not_depend_on_threads() -> None:
    """Nor on how often: threads that stay together meet in loops of every length."""
    case = draw(dtype=torch.bfloat16)
    first = case.run()[0]
    for threads in (2, 3, 5):
        torch.set_num_threads(threads)
        for _ in range(8):
            assert torch.equal(case.run()[0], first)


def test_a_row_does_not_depend_on_other_samples() -> None:
    case = draw()
    whole, _ = case.run()
    alone = replace(
        case,
        x=case.x[:3],
        row_offsets=(0, 3),
        counts=(4,),
        lengths=(37,),
        slots=case.slots[:3],
        table=case.table[:3],
        source=[(k[:37], v[:37]) for k, v in case.source],
        own_bias=None if case.own_bias is None else case.own_bias[:, :, :4].contiguous(),
        cross_bias=None if case.cross_bias is None else case.cross_bias[:, :37].contiguous(),
    )
    assert torch.equal(alone.run()[0], whole[:3])


def test_no_rows() -> None:
    case = draw()
    own, source = case.caches()
    nobody = torch.zeros(3, dtype=torch.int32)
    out = decode_layers(
        case.x[:0], case.prepared(), own, source, nobody, case.slots[:0], case.table[:0], nobody[:2] + 1, own_bias=None
    )
    assert out.shape == (0, 40)


def test_poisoned_memory_is_all_written(cpu: Any) -> None:
    case = draw(dtype=torch.bfloat16)
    own, source = case.caches()
    flat = [x for o, s in zip(own, source, strict=True) for x in (o.keys, o.values, s.keys, s.values, s.runs)]
    arguments = (case.x, flat, *case.inputs(), *case.biases(), 2)
    bound = case.prepared().bound
    out = torch.full_like(case.x, torch.nan)
    scratch = torch.full((cpu.decode_layers_workspace(bound, *arguments),), 255, dtype=torch.uint8)
    cpu.decode_layers_forward(bound, out, scratch, *arguments)
    assert torch.equal(out, case.run()[0])
    with pytest.raises(OfakernValueError, match="workspace"):
        cpu.decode_layers_forward(bound, out, scratch[:64], *arguments)
    with pytest.raises(OfakernValueError, match="5 tensors of each layer"):
        cpu.decode_layers_workspace(bound, case.x, flat[:9], *arguments[2:])


def test_parameters_are_copied_when_prepared() -> None:
    case = draw()
    want, prepared = case.run()[0], case.prepared()
    own, source = case.caches()
    case.layers[0]["own_norm"][0].zero_()
    got = decode_layers(
        case.x, prepared, own, source, *case.inputs(), own_bias=case.own_bias, cross_bias=case.cross_bias
    )
    assert torch.equal(got, want)


def test_prepared_layers_belong_to_their_instruction_set(cpu: Any) -> None:
    before, case = cpu.isa(), draw()
    prepared, (own, source) = case.prepared(), case.caches()
    try:
        cpu.set_isa("scalar" if before != "scalar" else "avx2")
        with pytest.raises(OfakernValueError, match="packed for the active instruction set"):
            decode_layers(case.x, prepared, own, source, *case.inputs())
    finally:
        cpu.set_isa(before)


def test_explain_names_the_backend() -> None:
    case = draw()
    own, source = case.caches()
    text = ofakern.explain("decode_layers", case.x, case.prepared(), own, source, *case.inputs())
    assert "runs on 'cpu'" in text and "takes no prepared layers" in text


NAMES = ("x", "prepared", "own", "source", "row_offsets", "slots", "table", "counts")


def slots_caches(*shape: int, int8: bool = False) -> Callable[[Any], Any]:
    return lambda _: [KeyValueCache.empty(*shape, int8=int8)] * 2


def source_caches(dtype: torch.dtype, *lengths: int) -> Callable[[Any], Any]:
    x = torch.zeros(sum(lengths), 5, 8, dtype=dtype)
    return lambda _: [KeyValueCache.of_source(x, x, lengths)] * 2


REFUSED: list[tuple[str, type[Exception], str, Callable[[Any], Any]]] = [
    ("prepared must be PreparedLayers", OfakernTypeError, "prepared", lambda p: 3),
    ("x must be a tensor", OfakernTypeError, "x", lambda x: [x]),
    ("x must have the layers' dtype", OfakernTypeError, "x", lambda x: x.half()),
    ("x must have shape", OfakernValueError, "x", lambda x: x[:, 1:].contiguous()),
    ("x must not need a gradient", OfakernRuntimeError, "x", lambda x: x.requires_grad_()),
    ("own must have a cache per layer", OfakernValueError, "own", lambda c: c[:1]),
    ("source must have a cache per layer", OfakernValueError, "source", lambda c: [*c, *c]),
    (r"own\[0\] must be a cache of slots", OfakernValueError, "own", source_caches(torch.float32, 16)),
    (r"own\[0\] must be a cache of slots and not int8", OfakernValueError, "own", slots_caches(16, 5, 8, int8=True)),
    (r"source\[0\] must be a packed source", OfakernValueError, "source", slots_caches(16, 5, 8)),
    ("own_keys must have shape", OfakernValueError, "own", slots_caches(16, 4, 10)),
    ("source_keys must have x's dtype", OfakernValueError, "source", source_caches(torch.half, 37, 530)),
    (r"slots\[4\] must be a slot of the cache \(16\)", OfakernValueError, "slots", lambda s: torch.cat([s[:4], s[:1]])),
    (r"slots\[0\] must be a slot of the cache", OfakernValueError, "slots", lambda s: s + 7),
    ("slots must", OfakernValueError, "slots", lambda s: s[:4]),
    ("slots must be int32", OfakernTypeError, "slots", lambda s: s.long()),
    (r"slots\[0\] must name slots of the cache", OfakernValueError, "table", lambda t: t + 12),
    (r"counts\[0\] must be in 0..T", OfakernValueError, "counts", lambda n: n + 1),
    ("row_offsets must rise", OfakernValueError, "row_offsets", lambda o: o + 1),
    ("bias must have shape", OfakernValueError, "own_bias", lambda b: b[:, :, :5].contiguous()),
    ("own_bias must be of every layer", OfakernValueError, "own_bias", lambda b: torch.cat([b, b])),
    ("bias must", OfakernValueError, "cross_bias", lambda b: b[:, :5].contiguous()),
    ("takes no prepared layers", BackendError, "backend", lambda b: "reference"),
    ("no CUDA kernel for decode_layers", BackendError, "backend", lambda b: "cuda"),
]


@pytest.mark.parametrize(("message", "error", "name", "change"), REFUSED)
def test_refusals(message: str, error: type[Exception], name: str, change: Callable[[Any], Any]) -> None:
    case = draw()
    own, source = case.caches()
    call = dict(zip(NAMES, (case.x, case.prepared(), own, source, *case.inputs()), strict=True))
    call |= {"own_bias": case.own_bias, "cross_bias": case.cross_bias, "backend": "auto"}
    call[name] = change(call[name])
    with pytest.raises(error, match=message):
        decode_layers(**call)  # type: ignore[arg-type]


def test_refused_parts() -> None:
    case = draw()
    first = case.layers[0]

    def prepare(**changes: Any) -> None:
        layer = first | changes
        replace(case, layers=[layer, case.layers[1]]).prepared()

    weight, bias = first["fc1"]
    with pytest.raises(OfakernValueError, match=r"layers\[0\].fc2 must give 40 outputs"):
        prepare(fc2=(torch.zeros(41, 72), None))
    with pytest.raises(OfakernValueError, match="x must have shape"):
        prepare(fc1=(torch.zeros(72, 41), None))
    with pytest.raises(OfakernValueError, match=r"layers\[0\].own_norm.weight must have shape"):
        prepare(own_norm=(torch.ones(41), torch.ones(41), 1e-5))
    with pytest.raises(OfakernValueError, match=r"layers\[0\].own_heads must have shape"):
        prepare(own_heads=torch.ones(4))
    with pytest.raises(OfakernValueError, match="packed for x's dtype"):
        prepare(fc1=(weight.half(), bias))
    with pytest.raises(OfakernValueError, match="heads must divide D"):
        replace(case, heads=7).prepared()
    with pytest.raises(OfakernValueError, match="layers must not be empty"):
        prepare_layers([], heads=5)
    with pytest.raises(OfakernValueError, match="activation must be one of"):
        replace(case, form=replace(case.form, activation="silu")).prepared()
    with pytest.raises(OfakernTypeError, match=r"layers\[0\].own must be a PackedWeight"):
        prepare_layers([replace_part("own", torch.ones(3, 3))], heads=5)


def replace_part(name: str, value: Any) -> LayerParts:
    norm = StepNorm(torch.ones(3), torch.ones(3), 1e-5)
    parts: dict[str, Any] = dict.fromkeys(PROJECTIONS, prepack_weight(torch.ones(3, 3)))
    return LayerParts(**parts | {name: value}, own_norm=norm, cross_norm=norm, final_norm=norm)


def test_a_bare_relu_layer_is_what_torch_makes_of_it() -> None:
    """A second derivation, without the reference: one row, one key of itself, a source of one token."""
    case = draw(FORMS["post-norm, relu"])
    layer = case.layers[0]
    one = replace(
        case,
        x=case.x[:1],
        layers=[layer],
        past=case.past[:1],
        source=[(k[:1], v[:1]) for k, v in case.source[:1]],
        row_offsets=(0, 1),
        counts=(1,),
        lengths=(1,),
        slots=case.slots[:1],
        table=case.slots[:1, None].clone(),
        own_bias=None,
        cross_bias=None,
    )

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, *layer[name])

    def norm(x: Tensor, name: str) -> Tensor:
        weight, bias, eps = layer[name]
        return F.layer_norm(x, (40,), weight, bias, eps)

    x = norm(one.x + linear(linear(one.x, "own")[:, 80:], "own_out"), "own_norm")
    x = norm(x + linear(one.source[0][1].flatten(1), "cross_out"), "cross_norm")
    x = norm(x + linear(F.relu(linear(x, "fc1")), "fc2"), "final_norm")
    torch.testing.assert_close(one.run()[0], x, rtol=1e-5, atol=1e-5)
