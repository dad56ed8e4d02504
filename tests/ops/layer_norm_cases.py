"""Random calls of the fused LayerNorms, and how one is proved against the float64 oracle by the rule of rule.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from rule import assert_kept
from torch import Tensor

from ofakern.ops.layer_norm import add_layer_norm, embed_layer_norm, gelu_layer_norm, head_scale_layer_norm
from ofakern.ops.layer_norm import reference as oracle

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPS: Mapping[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "add": (add_layer_norm, oracle.add_layer_norm_reference),
    "gelu": (gelu_layer_norm, oracle.gelu_layer_norm_reference),
    "head_scale": (head_scale_layer_norm, oracle.head_scale_layer_norm_reference),
    "embed": (embed_layer_norm, oracle.embed_layer_norm_reference),
}


@dataclass
class Case:
    """One call: `leaves` by argument name are differentiated, `options` are the other arguments, `douts` one per output
    (None: nothing flows in)."""

    op: str
    leaves: dict[str, Tensor]
    douts: tuple[Tensor | None, ...]
    dtype: torch.dtype
    options: dict[str, Any] = field(default_factory=dict)

    def to(self, dtype: torch.dtype) -> Case:
        douts = tuple(None if dout is None else dout.to(dtype) for dout in self.douts)
        return Case(self.op, {n: x.to(dtype) for n, x in self.leaves.items()}, douts, dtype, self.options)


def make_case(
    op: str,
    seed: int = 0,
    rows: int = 37,
    width: int = 48,
    *,
    dtype: torch.dtype = torch.float32,
    heads: int = 3,
    dropout_p: float = 0.0,
    total_only: bool = False,
    types: str = "one",
    strided: bool = False,
    half_parameters: bool = False,
) -> Case:
    """types: none, one (a single row for all), many; strided: activations that are not contiguous; half_parameters:
    weight and bias in the call's dtype instead of float32."""
    gen = torch.Generator().manual_seed(seed)

    def normal(*shape: int, like: torch.dtype = dtype) -> Tensor:
        x = torch.randn(shape, generator=gen).to(like)
        return x.t().contiguous().t() if strided and x.ndim == 2 else x

    own = dtype if half_parameters else torch.float32
    affine = {"weight": 1.0 + 0.3 * normal(width, like=own), "bias": normal(width, like=own)}
    if op == "add":
        leaves = {"x": normal(rows, width), "residual": normal(rows, width) * 2 + 1}
        douts: tuple[Tensor | None, ...] = (normal(rows, width), normal(rows, width))
        if total_only:
            douts = (None, douts[1])
        options: dict[str, Any] = {}
        if dropout_p:
            options = {"dropout_p": dropout_p, "dropout_seed": torch.tensor([seed + 5, 2**62 + 3])}
        return Case(op, leaves | affine, douts, dtype, options)
    if op == "gelu":
        return Case(op, {"x": normal(rows, width) * 2} | affine, (normal(rows, width),), dtype)
    if op == "head_scale":
        x = normal(rows, width).reshape(rows, heads, width // heads)
        scale = {"head_scale": 1.0 + 0.5 * normal(heads, like=torch.float32)}
        return Case(op, {"x": x} | scale | affine, (normal(rows, width),), dtype)
    tokens = torch.randint(0, 11, (rows,), generator=gen) ** 2 % 13  # some entries often, some never
    options = {"tokens": tokens, "scale": 1.7}
    leaves = {"table": normal(13, width)}
    if types != "none":
        leaves["type_table"] = normal(1 if types == "one" else 4, width)
    if types == "many":
        options["types"] = torch.randint(0, 4, (rows,), generator=gen)
    return Case(op, leaves | affine, (normal(rows, width),), dtype, options)


def run(case: Case, function: Callable[..., Any], **more: Any) -> dict[str, Tensor]:
    """Outputs and the gradients of all leaves, by name."""
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in case.leaves.items()}
    outs = function(**leaves, **case.options, **more)
    outs = outs if isinstance(outs, tuple) else (outs,)
    pairs = [(out, dout) for out, dout in zip(outs, case.douts, strict=True) if dout is not None]
    grads = torch.autograd.grad([o for o, _ in pairs], list(leaves.values()), [d for _, d in pairs], allow_unused=True)
    found = {f"out{n}": out.detach() for n, out in enumerate(outs)}
    return found | {
        f"d{n}": torch.zeros_like(g) if x is None else x for (n, g), x in zip(leaves.items(), grads, strict=True)
    }


def run_on(backend: str) -> Callable[[Case], dict[str, Tensor]]:
    return lambda case: run(case, OPS[case.op][0], backend=backend)


run_cpu = run_on("cpu")


def check(case: Case, call: Callable[[Case], dict[str, Tensor]] = run_cpu) -> None:
    """`call` (the CPU kernel) keeps the rule on every output and every gradient."""
    have = call(case)
    exact = run(case.to(torch.float64), OPS[case.op][1])
    peer = run(case, plain(case.op))
    sizes = _sizes(case)
    assert have.keys() == exact.keys()
    for name in have:
        assert have[name].dtype == peer[name].dtype, name
        assert_kept(f"{case.op} {name}", have[name], exact[name], peer[name], sizes[name], case.dtype)


def plain(op: str) -> Callable[..., Any]:
    """The op as torch users write it, every step in the tensors' own dtype."""

    def norm(z: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        return torch.nn.functional.layer_norm(z, z.shape[-1:], weight.to(z.dtype), bias.to(z.dtype), eps)

    def add(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5,
            dropout_p: float = 0.0, dropout_seed: Tensor | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
        if dropout_seed is not None:
            keep = oracle.dropout_keep(dropout_seed, dropout_p, x.shape[0], x.shape[1])
            x = x * keep.to(x.dtype) * (1 / (1 - dropout_p))
        total = residual + x
        return norm(total, weight, bias, eps), total

    def gelu(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
        return norm(torch.nn.functional.gelu(x), weight, bias, eps)

    def head_scale(x: Tensor, head_scale: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
        return norm((x * head_scale.to(x.dtype)[:, None]).flatten(1), weight, bias, eps)

    def embed(tokens: Tensor, table: Tensor, weight: Tensor, bias: Tensor, type_table: Tensor | None = None,
              types: Tensor | None = None, scale: float = 1.0, eps: float = 1e-5) -> Tensor:  # fmt: skip
        z = torch.nn.functional.embedding(tokens, table) * scale
        if type_table is not None:
            z = z + (type_table[0] if types is None else type_table[types])
        return norm(z, weight, bias, eps)

    return {"add": add, "gelu": gelu, "head_scale": head_scale, "embed": embed}[op]


def _sizes(case: Case) -> dict[str, Tensor]:
    """What each result adds up, in absolute values: the float64 call with every step's terms made positive.

    An output adds |xhat * weight| and |bias|; dz adds |g| and the two means' terms, times rstd; a parameter's gradient
    adds its terms over the rows.
    """
    wide = case.to(torch.float64)
    exact = run(wide, OPS[case.op][1])
    z = _before_norm(wide)
    width = z.shape[-1]
    mean = z.mean(-1, keepdim=True)
    rstd = torch.rsqrt((z - mean).square().mean(-1, keepdim=True) + 1e-5)
    xhat_size = (z.abs() + mean.abs()) * rstd
    weight, bias = wide.leaves["weight"].abs(), wide.leaves["bias"].abs()
    dout = torch.zeros_like(z) if wide.douts[0] is None else wide.douts[0].abs()
    g = dout * weight
    dz = rstd * (g + g.mean(-1, keepdim=True) + xhat_size * (g * xhat_size).mean(-1, keepdim=True))
    if case.op == "add" and wide.douts[1] is not None:
        dz = dz + wide.douts[1].abs()
    sizes = {"out0": xhat_size * weight + bias, "dweight": (dout * xhat_size).sum(0), "dbias": dout.sum(0)}
    if case.op == "add":
        p, seed = case.options.get("dropout_p", 0.0), case.options.get("dropout_seed")
        keep = 1.0 if seed is None else oracle.dropout_keep(seed, p, z.shape[0], width) / (1 - p)
        sizes |= {
            "out1": wide.leaves["x"].abs() * keep + wide.leaves["residual"].abs(),
            "dresidual": dz,
            "dx": dz * keep,
        }
    elif case.op == "gelu":
        sizes["dx"] = dz * 1.2  # the slope of GELU is at most 1.13
    elif case.op == "head_scale":
        x, scale = wide.leaves["x"], wide.leaves["head_scale"].abs()
        heads = dz.view(x.shape)
        sizes |= {"dx": heads * scale[:, None], "dhead_scale": (heads * x.abs()).sum((0, 2))}
    else:
        for name, index, factor in (
            ("table", case.options["tokens"], 1.7),
            ("type_table", case.options.get("types"), 1.0),
        ):
            if name in wide.leaves:
                index = torch.zeros_like(case.options["tokens"]) if index is None else index
                sizes[f"d{name}"] = torch.zeros_like(wide.leaves[name]).index_add_(0, index, dz * factor)
    assert sizes.keys() == exact.keys(), (sizes.keys(), exact.keys())
    return {name: torch.maximum(size, exact[name].abs()) for name, size in sizes.items()}


def _before_norm(wide: Case) -> Tensor:
    leaves = wide.leaves
    if wide.op == "add":
        return run(wide, OPS["add"][1])["out1"]
    if wide.op == "gelu":
        return torch.nn.functional.gelu(leaves["x"])
    if wide.op == "head_scale":
        return (leaves["x"] * leaves["head_scale"][:, None]).flatten(1)
    z = leaves["table"][wide.options["tokens"]] * wide.options["scale"]
    if "type_table" in leaves:
        types = wide.options.get("types")
        z = z + (leaves["type_table"][0] if types is None else leaves["type_table"][types])
    return z
