"""KeyValueCache.of_projection: keys and values of a source straight from the product that makes them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rule import assert_kept
from torch import Tensor

from ofakern.errors import OfakernTypeError, OfakernValueError
from ofakern.ops.decode_attention import KeyValueCache
from ofakern.ops.decode_linear import PackedWeight, prepack_weight

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Lengths of samples, H, K, Kv, D.
SHAPES = (
    ([64], 2, 64, 64, 96),
    ([5], 1, 8, 40, 17),
    ([100, 0, 33, 1], 3, 40, 24, 70),
    ([31, 97], 2, 100, 16, 1100),
)


def drawn(shape: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """states, both weights, and the bias of values."""
    lengths, heads, key_width, value_width, depth = shape
    random = torch.Generator().manual_seed(sum(lengths) + depth)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=random, dtype=torch.float64).to(dtype)

    widths = heads * key_width, heads * value_width
    return (normal(sum(lengths), depth), *(normal(width, depth) for width in widths), normal(widths[1]))


def made(shape: Any, states: Tensor, key_weight: Tensor, value_weight: Tensor, bias: Tensor) -> KeyValueCache:
    weight = prepack_weight([key_weight, value_weight], [None, bias])
    return KeyValueCache.of_projection(states, weight, shape[0], shape[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_keys_and_values(isa: str, shape: Any, dtype: torch.dtype) -> None:
    lengths, heads, key_width, value_width, _ = shape
    states, key_weight, value_weight, bias = drawn(shape, dtype)
    cache = made(shape, states, key_weight, value_weight, bias)
    k, v, _ = cache.natural()
    for name, have, weight, added in (("k", k, key_weight, None), ("v", v, value_weight, bias)):
        terms = [x.double() for x in (states, weight, torch.zeros(len(weight)) if added is None else added)]
        exact, size = F.linear(*terms), F.linear(*(x.abs() for x in terms))
        assert_kept(name, have.flatten(1), exact, F.linear(states, weight, added), size, dtype)
    again = KeyValueCache.of_source(k.view(-1, heads, key_width), v.view(-1, heads, value_width), lengths)
    assert torch.equal(cache.keys, again.keys) and torch.equal(cache.values, again.values)  # pads included
    assert torch.equal(cache.lengths, again.lengths) and cache.dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_depend_neither_on_threads_nor_on_neighbours(dtype: torch.dtype) -> None:
    shape = ([150, 70], 2, 16, 16, 64)
    states, *weights = drawn(shape, dtype)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        several = made(shape, states, *weights)
        torch.set_num_threads(1)
        alone = made(([70], *shape[1:]), states[150:], *weights)
        whole = made(shape, states, *weights)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(several.keys, whole.keys) and torch.equal(several.values, whole.values)
    for have, want in zip(alone.natural()[:2], whole.natural()[:2], strict=True):
        assert have is not None and want is not None and torch.equal(have, want[150:])


def test_poisoned_storage_is_all_written(cpu: Any) -> None:
    shape = ([40, 3], 2, 24, 20, 33)
    states, key_weight, value_weight, _ = drawn(shape, torch.float32)
    weight, runs = prepack_weight([key_weight, value_weight]), torch.tensor([[0, 40], [64, 3]], dtype=torch.int32)
    keys, values = torch.full((96 * 2 * 24,), torch.nan), torch.full((96 * 2 * 32,), torch.nan)
    rest = (states, weight.data, None, runs, 2, 24, 20, 1)
    cpu.decode_attention_project(keys, values, *rest)
    assert torch.isfinite(keys).all() and torch.isfinite(values).all()
    for name, arguments in (
        ("values", (keys, values[32:], *rest)),
        ("runs", (keys, values, states[1:], *rest[1:])),
        ("packed must have H", (keys, values, *rest[:4], 2, 24, 21, 1)),
        ("runs\\[0\\]", (keys, values, *rest[:3], runs + 8, *rest[4:])),
    ):
        with pytest.raises(OfakernValueError, match=name):
            cpu.decode_attention_project(*arguments)


def test_empty_and_strided_states() -> None:
    shape = ([7, 9], 2, 16, 16, 32)
    states, *weights = drawn(shape, torch.float32)
    wide = torch.cat([states, states], 1)
    assert torch.equal(made(shape, wide[:, :32], *weights).keys, made(shape, states, *weights).keys)
    assert made(([], *shape[1:]), states[:0], *weights).slots == 0


def refused(message: str, error: type[Exception] = OfakernValueError, **changes: Any) -> Any:
    return pytest.param(message, error, changes, id=message)


X = torch.ones(6, 8)


def packed(keys: int = 4, values: int = 4, **options: Any) -> PackedWeight:
    return prepack_weight([torch.ones(keys, 8), torch.ones(values, 8)], **options)


@pytest.mark.parametrize(
    ("message", "error", "changes"),
    [
        refused("states must be a tensor", OfakernTypeError, states=3),
        refused("states must have shape", states=X[:, :7]),
        refused("and dtype torch.float32", states=X.double()),
        refused("got Tensor", OfakernTypeError, weight=lambda: X),
        refused("got another one", OfakernTypeError, weight=lambda: packed(int8=True)),
        refused("for the CPU kernel", OfakernTypeError, weight=lambda: packed(backend="reference")),
        refused("keys and values of 3 heads", heads=3),
        refused("keys and values of 0 heads", heads=0),
        refused("at most 256 wide", weight=lambda: packed(514)),
        refused("add up to 6", lengths=[3, 4]),
        refused("non-negative", lengths=[-1, 7]),
    ],
)
def test_refusals(message: str, error: type[Exception], changes: dict[str, Any]) -> None:
    given: dict[str, Any] = {"states": X, "weight": packed, "lengths": [6], "heads": 2} | changes
    weight = given.pop("weight")()
    with pytest.raises(error, match=message):
        KeyValueCache.of_projection(weight=weight, **given)
