"""Is the kernel right on the very cases that are timed? The rule is that of the op's tests (tests/ops/harness.py)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.moved import moved, runner
from ofakern.ops.attention import AttentionLayout, RelativeTerm

_ROWS = 128  # queries of the timed size that are compared with the float64 reference


def reduced_size(problem: Any, harness: Any, backend: str) -> None:
    """Output and every gradient of the case with fewer tokens and heads; new tensors start as NaN."""
    case = _case(harness, problem, problem.layout)
    harness.check(case, runner(backend, harness.run_backend(backend)))


def timed_size(problem: Any, harness: Any, backend: str) -> None:
    """The timed call itself: some queries of the first sample, last head, against the reference on those alone."""
    queries, keys = problem.spec.lengths[0], problem.spec.keys[0]
    picked = torch.linspace(0, queries - 1, min(_ROWS, queries)).long()
    head = slice(problem.spec.heads - 1, problem.spec.heads)
    own_positions = problem.q_pos is not None and not problem.spec.shared  # the gradient of others' is a sum
    names = ["out", "lse", "dq"] + (["dq_pos"] if own_positions else [])

    timed = problem if backend == "cpu" else moved(problem, "cuda")

    def run(_: Any) -> dict[str, Tensor]:
        with harness.poisoned_empty():
            out, lse = timed.run(return_lse=True, backend=backend)
            wanted = [timed.q] + ([timed.q_pos] if own_positions else [])
            grads = torch.autograd.grad(out, wanted, timed.dout)
        values = [out.detach(), lse.detach(), *grads]
        return {name: value.cpu()[picked][:, head] for name, value in zip(names, values, strict=True)}

    case = _case(harness, problem, _layout(problem.layout, picked, keys), picked, keys, head)
    expected = harness.expect(case)
    kept = {part: {n: getattr(expected, part)[n] for n in names} for part in ("exact", "peer", "size")}
    harness.check(case, run, harness.Expected(**kept))


def _layout(layout: AttentionLayout, picked: Tensor, keys: int) -> AttentionLayout:
    terms = [
        RelativeTerm(t.q_coord[picked], t.k_coord[:keys].contiguous(), t.same[picked], t.rows) for t in layout.terms
    ]
    return AttentionLayout.build(layout.visible[picked], [len(picked)], [keys], terms)


def _case(
    harness: Any,
    problem: Any,
    layout: AttentionLayout,
    picked: Tensor | slice = slice(None),
    keys: int | None = None,
    head: slice = slice(None),
) -> Any:
    def part(x: Tensor | None, rows: Tensor | slice) -> Tensor | None:
        return None if x is None else x.detach()[rows][:, head]

    return harness.Case(
        layout=layout,
        q=part(problem.q, picked),
        k=part(problem.k, slice(keys)),
        v=part(problem.v, slice(keys)),
        q_pos=part(problem.q_pos, picked),
        k_pos=part(problem.k_pos, slice(keys)),
        tables=tuple(table.detach()[head] for table in problem.tables),
        head_scale=None if problem.head_scale is None else problem.head_scale.detach()[head],
        dout=part(problem.dout, picked),
        dlse=None,
        options={"scale": problem.scale},
    )
