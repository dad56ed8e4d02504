"""Inputs of `cross_entropy`, its oracle in float64 and plain torch in the inputs' dtype, and the comparison."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rule import assert_kept
from torch import Tensor

from ofakern.data.batch import Allowed
from ofakern.ops.cross_entropy import cross_entropy

Call = Callable[["Case", str], dict[str, Tensor]]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    dloss: Tensor
    options: dict[str, Any]

    def leaves(self, dtype: torch.dtype) -> list[Tensor | None]:
        found = (self.hidden, self.weight, self.bias)
        return [None if x is None else x.detach().to(dtype).requires_grad_() for x in found]


def make_case(
    seed: int = 0,
    tokens: int = 70,
    width: int = 40,
    vocabulary: int = 300,
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
    ignored: float = 0.3,
    allowed: str = "all",
    epsilon: float = 0.1,
    strides: str = "contiguous",
) -> Case:
    """allowed: "all", "rows" (a CSR table), "range" (per token), "one_range" or "subset"."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=g).to(dtype)
    weight = torch.randn(vocabulary, width, generator=g).to(dtype)
    if strides == "strided":
        hidden = torch.cat([hidden, torch.full_like(hidden, torch.nan)], 1)[:, :width]
        weight = weight.T.contiguous().T
    labels = torch.randint(vocabulary, (tokens,), generator=g)
    ignore = torch.rand(tokens, generator=g) < ignored
    options: dict[str, Any] = {"epsilon": epsilon}
    if allowed == "rows":
        rows = [
            torch.cat([label[None], torch.randperm(vocabulary, generator=g)[: int(label) % 7]]).unique()
            if n % 4
            else torch.zeros(0, dtype=torch.int64)
            for n, label in enumerate(labels)
        ]
        offsets = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0)
        options["allowed"] = Allowed(offsets, torch.cat([*rows, torch.zeros(0, dtype=torch.int64)]))
    elif allowed == "range":
        lo = (labels - labels % 11).clamp(min=0)
        options |= {"allowed_range": torch.stack([lo, lo + 11], 1).int(), "always_allowed": 3}
    elif allowed == "one_range":
        lo, hi = vocabulary // 3, max(vocabulary // 2, 1)
        labels = torch.randint(min(lo, hi - 1), hi, (tokens,), generator=g)
        options |= {"allowed_range": (min(lo, hi - 1), hi), "always_allowed": 0}
    elif allowed == "subset":
        subset = torch.randperm(vocabulary, generator=g)[: max(vocabulary // 3, 1)]
        labels = subset[torch.randint(len(subset), (tokens,), generator=g)]
        options["subset"] = subset
    labels[ignore] = -100
    if strides == "strided":
        hidden[ignore] = torch.nan  # never read
    offset = torch.randn(vocabulary, generator=g).to(dtype) if bias else None
    return Case(hidden, weight, offset, labels, torch.rand(tokens, generator=g), options)


def run(case: Case, backend: str, dtype: torch.dtype, reduction: str) -> dict[str, Tensor]:
    """Per-token or summed losses with all gradients."""
    leaves = case.leaves(dtype)
    if backend != "reference" and not case.hidden.is_contiguous() and leaves[0] is not None and leaves[1] is not None:
        leaves[:2] = [case.hidden.detach().requires_grad_(), case.weight.detach().requires_grad_()]
    if backend == "reference" and leaves[0] is not None:
        leaves[0] = leaves[0].detach().nan_to_num().requires_grad_()
    out = cross_entropy(
        leaves[0], leaves[1], case.labels, leaves[2],
        **case.options, reduction=reduction, return_best=True, backend=backend,
    )  # fmt: skip
    scalar = (out.loss * case.dloss.to(out.loss.dtype)).sum() if reduction == "none" else out.loss * 0.7
    given = [leaf for leaf in leaves if leaf is not None]
    grads = torch.autograd.grad(scalar, given)
    assert out.best is not None
    named = {"loss": out.loss.detach(), "nll": out.nll, "best": out.best, "tokens": out.tokens}
    return named | dict(zip(("dhidden", "dweight", "dbias"), grads, strict=False))


def check(case: Case, reduction: str = "none", call: Call | None = None) -> None:
    """Our kernel (the CPU's unless `call` is given) keeps the rule on every output and every gradient; best ids have
    the largest score."""
    dtype = case.hidden.dtype
    have = run(case, "cpu", dtype, reduction) if call is None else call(case, reduction)
    exact = run(case, "reference", torch.float64, reduction)
    peer = run(case, "reference", dtype, reduction)
    assert int(have["tokens"]) == int((case.labels != -100).sum())
    sizes = _sizes(case, exact, reduction)
    for name, size in sizes.items():
        assert_kept(name, have[name], exact[name], peer[name].to(exact[name].dtype), size, dtype)
    hidden, weight = case.hidden.double().nan_to_num(), case.weight.double()
    scores = hidden @ weight.T + (0 if case.bias is None else case.bias.double())
    labelled = case.labels != -100
    assert torch.equal(have["best"] == -100, ~labelled)
    ours, best = (scores.gather(1, x["best"].clamp(min=0)[:, None])[:, 0][labelled] for x in (have, exact))
    torch.testing.assert_close(ours, best, rtol=1e-5, atol=1e-4)


def _sizes(case: Case, exact: dict[str, Tensor], reduction: str) -> dict[str, Tensor]:
    """For every element the sum of the absolute values it adds up."""
    hidden, weight = case.hidden.double().nan_to_num().abs(), case.weight.double().abs()
    scores = hidden @ weight.T + (0 if case.bias is None else case.bias.double().abs())
    labelled = (case.labels != -100).double()
    tokens = labelled * (case.dloss.double() if reduction == "none" else 0.7)
    each = labelled * (2 * scores.amax(1) + exact["loss"].abs().max() + 1)
    loss = each if reduction == "none" else each.sum()
    # |d loss / d score| is at most 1 + 1 in all, of which the probabilities and the smoothing are spread over V.
    exact_spread = _gradient_spread(case)
    spread = tokens[:, None] * (torch.softmax(scores, 1) * (exact_spread != 0) + exact_spread)
    sizes = {"loss": loss, "nll": loss, "dhidden": spread @ weight, "dweight": spread.T @ hidden}
    if case.bias is not None:
        sizes["dbias"] = spread.sum(0)
    return sizes


def _gradient_spread(case: Case) -> Tensor:
    """Every gradient of a score, in absolute value, from the oracle itself."""
    hidden = case.hidden.double().nan_to_num()
    weight = torch.eye(case.weight.shape[0], dtype=torch.float64)
    bias = None if case.bias is None else case.bias.double()
    scores = (hidden @ case.weight.double().T).requires_grad_()
    out = cross_entropy(scores, weight, case.labels, bias, **case.options, reduction="none", backend="reference")
    finite = out.loss.masked_fill(out.loss.isinf(), 0.0)
    return torch.autograd.grad(finite.sum(), scores)[0].nan_to_num().abs()
