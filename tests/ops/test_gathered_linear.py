"""gathered_linear: every row's allowed logits against float64 products, on every instruction set, and its refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rule import assert_kept
from torch import Tensor

import ofakern
from ofakern.errors import BackendError, OfakernRuntimeError, OfakernTypeError, OfakernValueError
from ofakern.ops.gathered_linear import gathered_linear
from ofakern.ops.gathered_linear.reference import gathered_linear_reference

pytestmark = pytest.mark.usefixtures("cpu")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
VOCABULARY = 300
# How many tokens each state allows: none, one, blocks and their remainders, more than a task.
COUNTS = (5, 0, 1, 64, 65, 2, 3, 150, 0)


def draw(dtype: torch.dtype, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(dtype)


def table(counts: tuple[int, ...] = COUNTS) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(len(counts))
    first = torch.tensor([0, *counts]).cumsum(0).int()
    runs = [torch.randperm(VOCABULARY, generator=generator)[:n].sort().values for n in counts]
    return first, torch.cat(runs).int()


def rows_in_states(rows: int) -> Tensor:
    return torch.randint(len(COUNTS), (rows,), generator=torch.Generator().manual_seed(rows), dtype=torch.int32)


def check(hidden: Tensor, weight: Tensor, states: Tensor, first: Tensor, tokens: Tensor) -> None:
    values, row_first, row_tokens = gathered_linear(hidden, weight, states, first, tokens)
    assert values.dtype == torch.float32
    exact, places, ids = gathered_linear_reference(hidden.double(), weight.double(), states, first, tokens)
    assert torch.equal(row_first, places) and torch.equal(row_tokens, ids)
    peer, _, _ = gathered_linear_reference(hidden, weight, states, first, tokens)
    size, _, _ = gathered_linear_reference(hidden.double().abs(), weight.double().abs(), states, first, tokens)
    assert_kept("values", values, exact, peer, size, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "depth"), [(1, 1), (3, 16), (7, 33), (40, 100), (90, 257)], ids=str)
def test_products(isa: str, rows: int, depth: int, dtype: torch.dtype) -> None:
    check(draw(dtype, rows, depth), draw(dtype, VOCABULARY, depth), rows_in_states(rows), *table())


def test_the_reference_is_the_masked_full_product() -> None:
    hidden, weight, states = draw(torch.float64, 12, 20), draw(torch.float64, VOCABULARY, 20), rows_in_states(12)
    first, tokens = table()
    values, row_first, row_tokens = gathered_linear(hidden, weight, states, first, tokens)
    logits = hidden @ weight.T
    for row, state in enumerate(states.tolist()):
        begin, end = int(row_first[row]), int(row_first[row + 1])
        allowed = tokens[int(first[state]) : int(first[state + 1])]
        assert torch.equal(row_tokens[begin:end], allowed)
        torch.testing.assert_close(values[begin:end], logits[row, allowed.long()])


def test_all_rows_in_one_state() -> None:
    check(draw(torch.float32, 23, 40), draw(torch.float32, VOCABULARY, 40), torch.full((23,), 7).int(), *table())


def test_bits_do_not_depend_on_threads_or_neighbours() -> None:
    hidden, weight, states = draw(torch.bfloat16, 60, 130), draw(torch.bfloat16, VOCABULARY, 130), rows_in_states(60)
    values, row_first, _ = gathered_linear(hidden, weight, states, *table())
    torch.set_num_threads(3)
    assert torch.equal(values, gathered_linear(hidden, weight, states, *table())[0])
    for row in (0, 17, 59):
        alone, _, _ = gathered_linear(hidden[row : row + 1], weight, states[row : row + 1], *table())
        assert torch.equal(alone, values[row_first[row] : row_first[row + 1]])


def test_views_and_long_states() -> None:
    wide, weight, states = draw(torch.float32, 10, 48), draw(torch.float32, VOCABULARY, 48), rows_in_states(10)
    first, tokens = table()
    expected = gathered_linear(wide[:, :24].contiguous(), weight[:, :24].contiguous(), states, first, tokens)
    found = gathered_linear(wide[:, :24], weight[:, :24], states.long(), first, tokens)
    strided = gathered_linear(wide.T[:24].T, weight.T.contiguous()[:24].T, states, first, tokens)
    spread = torch.stack((tokens, tokens), 1)[:, 0]
    for got in (found, strided, gathered_linear(wide[:, :24], weight[:, :24], states, first, spread)):
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    negative = torch._neg_view(wide[:, :24])
    assert torch.equal(gathered_linear(negative, weight[:, :24], states, first, tokens)[0], -expected[0])


def test_nothing_to_do() -> None:
    first, tokens = table()
    weight = draw(torch.float32, VOCABULARY, 8)
    values, row_first, row_tokens = gathered_linear(torch.empty(0, 8), weight, torch.empty(0).int(), first, tokens)
    assert len(values) == len(row_tokens) == 0 and row_first.tolist() == [0]
    values, row_first, _ = gathered_linear(torch.ones(2, 8), weight, torch.tensor([1, 8]), first, tokens)
    assert len(values) == 0 and row_first.tolist() == [0, 0, 0]
    values, _, _ = gathered_linear(torch.ones(1, 0), torch.ones(VOCABULARY, 0), torch.tensor([0]), first, tokens)
    assert values.tolist() == [0] * 5


def test_rows_of_other_tokens_are_not_read() -> None:
    first, tokens = table()
    weight = torch.full((VOCABULARY, 33), torch.nan)
    weight[tokens[: int(first[1])].long()] = 1.0
    values, _, _ = gathered_linear(draw(torch.float32, 2, 33), weight, torch.zeros(2).int(), first, tokens)
    assert torch.isfinite(values).all()


def test_poisoned_outputs_are_all_written(cpu: Any) -> None:
    inputs = (draw(torch.float32, 9, 20), draw(torch.float32, VOCABULARY, 20), rows_in_states(9), *table())
    count = cpu.gathered_linear_count(inputs[2], inputs[3])
    values, row_tokens = torch.full((count,), torch.nan), torch.full((count,), -1, dtype=torch.int32)
    row_first = torch.full((10,), -1, dtype=torch.int32)
    scratch = torch.full((cpu.gathered_linear_workspace(*inputs),), 255, dtype=torch.uint8)
    cpu.gathered_linear_forward(values, row_first, row_tokens, scratch, *inputs, 1)
    assert torch.isfinite(values).all() and row_tokens.min() >= 0 and row_first.min() >= 0
    with pytest.raises(OfakernValueError, match="workspace"):
        cpu.gathered_linear_forward(values, row_first, row_tokens, scratch[:64], *inputs, 1)
    with pytest.raises(OfakernValueError, match="values must have shape"):
        cpu.gathered_linear_forward(values[1:], row_first, row_tokens, scratch, *inputs, 1)


def test_opcheck_compile_and_autocast() -> None:
    inputs = (draw(torch.float32, 5, 12), draw(torch.float32, VOCABULARY, 12), rows_in_states(5), *table())
    torch.library.opcheck(torch.ops.ofakern.gathered_linear_fwd.default, inputs)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *x: gathered_linear(x[0] * 2, *x[1:])[0], fullgraph=True, backend="aot_eager")
    expected = gathered_linear(inputs[0] * 2, *inputs[1:])[0]
    torch.testing.assert_close(compiled(*inputs), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gathered_linear(inputs[0] * 2, *inputs[1:])[0], expected)
    with pytest.raises(OfakernRuntimeError, match="under vmap"):
        torch.vmap(lambda h: gathered_linear(h, *inputs[1:]))(inputs[0].expand(2, 5, 12))


def test_past_the_dispatcher_and_through_it_are_the_same() -> None:
    inputs = (draw(torch.float32, 5, 12), draw(torch.float32, VOCABULARY, 12), rows_in_states(5), *table())
    for one, other in zip(gathered_linear(*inputs), torch.ops.ofakern.gathered_linear_fwd(*inputs), strict=True):
        assert torch.equal(one, other)


def test_explain_names_the_backend() -> None:
    inputs = (draw(torch.float32, 5, 12), draw(torch.float32, VOCABULARY, 12), rows_in_states(5), *table())
    assert "runs on 'cpu'" in ofakern.explain("gathered_linear", *inputs)
    assert "runs on 'reference'" in ofakern.explain(
        "gathered_linear", inputs[0].double(), inputs[1].double(), *inputs[2:]
    )


FIRST, TOKENS = torch.tensor([0, 2, 3]).int(), torch.tensor([4, 7, 0]).int()
REFUSED: list[tuple[str, type[Exception], dict[str, Any]]] = [
    ("hidden must be a tensor", OfakernTypeError, {"hidden": 1}),
    ("hidden must be float32", OfakernTypeError, {"hidden": torch.ones(2, 6).int()}),
    ("hidden must have shape \\[R,D\\]", OfakernValueError, {"hidden": torch.ones(6)}),
    ("weight must have hidden's dtype", OfakernTypeError, {"weight": torch.ones(8, 6).half()}),
    ("weight must have shape \\[V,D=6\\]", OfakernValueError, {"weight": torch.ones(8, 5)}),
    ("weight must be on hidden's device", OfakernValueError, {"weight": torch.ones(8, 6, device="meta")}),
    ("states must be int32 or int64", OfakernTypeError, {"states": torch.zeros(2)}),
    ("states must have shape \\[R=2\\]", OfakernValueError, {"states": torch.zeros(3).int()}),
    ("states must be in \\[0, S=2\\)", OfakernValueError, {"states": torch.tensor([0, 2])}),
    ("states must be in \\[0, S=2\\)", OfakernValueError, {"states": torch.tensor([-1, 0])}),
    ("first must be int32", OfakernTypeError, {"first": FIRST.long()}),
    ("first must have one dimension", OfakernValueError, {"first": FIRST[None]}),
    ("first must hold at least one state", OfakernValueError, {"first": FIRST[:1]}),
    ("first must not fall", OfakernValueError, {"first": torch.tensor([0, 2, 1]).int()}),
    ("first must end within tokens", OfakernValueError, {"first": torch.tensor([0, 2, 4]).int()}),
    ("tokens must be in \\[0, V=8\\)", OfakernValueError, {"tokens": torch.tensor([4, 8, 0]).int()}),
    ("tokens must be in \\[0, V=8\\)", OfakernValueError, {"tokens": torch.tensor([4, 7, -1]).int()}),
    ("must not need a gradient", OfakernRuntimeError, {"hidden": torch.ones(2, 6, requires_grad=True)}),
    ("no CUDA kernel for gathered_linear", BackendError, {"backend": "cuda"}),
]


@pytest.mark.parametrize(("message", "error", "changes"), REFUSED)
def test_refusals(message: str, error: type[Exception], changes: dict[str, Any]) -> None:
    arguments = {
        "hidden": torch.ones(2, 6),
        "weight": torch.ones(8, 6),
        "states": torch.tensor([0, 1]),
        "first": FIRST,
        "tokens": TOKENS,
    }
    with pytest.raises(error, match=message):
        gathered_linear(**(arguments | changes))
