"""The Triton kernels of every op but attention compile ahead of time; spills and shared memory are held to a record.

No GPU is needed. `python tests/build/test_triton_ops_compile.py` writes the record anew.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from triton_aot import BF16, CACHE, F16, SHARED_MEMORY, TargetDriver, assert_no_more, resources, write_record  # noqa: E402

from ofakern.ops.cross_entropy import kernel_triton as cross_entropy  # noqa: E402
from ofakern.ops.layer_norm import kernel_triton as layer_norm  # noqa: E402
from ofakern.ops.patch_embed import kernel_triton as patch_embed  # noqa: E402
from ofakern.ops.rms_norm import kernel_triton as rms_norm  # noqa: E402
from ofakern.ops.routed_ffn import kernel_triton as routed_ffn  # noqa: E402

RECORD = Path(__file__).with_name("triton_ops_resources.json")
Launches = Iterator[Any]


def layer_norms(dtype: torch.dtype, shared_memory: int) -> Launches:
    """OFA-base's widths, 512 rows."""
    rows, width, wide = 512, 768, 3072
    x, weight, stats = torch.empty(rows, width, dtype=dtype), torch.empty(width), torch.empty(rows, 2)
    seed, tokens = torch.zeros(2, dtype=torch.int64), torch.zeros(rows, dtype=torch.int64)
    yield from layer_norm.add_forward_call(x, x, weight, weight, seed, 1e-5, 0.1).launches
    yield from layer_norm.add_backward_call(x, x, x, stats, weight, seed, 0.1).launches
    heads, scale = x.view(rows, 12, 64), torch.empty(12)
    yield from layer_norm.head_forward_call(heads, scale, weight, weight, 1e-5).launches
    yield from layer_norm.head_backward_call(x, heads, scale, stats, weight).launches
    table = torch.empty(100, width, dtype=dtype)
    yield from layer_norm.embed_forward_call(tokens, table, tokens, table, weight, weight, 1.0, 1e-5).launches
    yield from layer_norm.embed_backward_call(x, tokens, table, None, table[:1], stats, weight, 1.0).launches
    x, weight = torch.empty(rows, wide, dtype=dtype), torch.empty(wide)
    yield from layer_norm.gelu_forward_call(x, weight, weight, 1e-5).launches
    yield from layer_norm.gelu_backward_call(x, x, stats, weight).launches


def rms_norms(dtype: torch.dtype, shared_memory: int) -> Launches:
    """T5-base's width, 512 rows."""
    x, weight, rstd = torch.empty(512, 768, dtype=dtype), torch.empty(768), torch.empty(512)
    yield from rms_norm.forward_call(x, weight, 1e-6).launches
    yield from rms_norm.backward_call(x, x, rstd, weight).launches


def cross_entropies(dtype: torch.dtype, shared_memory: int) -> Launches:
    """OFA-base's width, 512 tokens of 5,000 ids: losses with all ids, a CSR table and ranges; a gradient."""
    tokens, width, vocabulary = 512, 768, 5000
    hidden, weight, bias = (
        torch.empty(*shape, dtype=dtype) for shape in ((tokens, width), (vocabulary, width), (5000,))
    )
    labels, offsets = torch.zeros(tokens, dtype=torch.int64), torch.zeros(tokens + 1, dtype=torch.int64)
    rows = slice(0, tokens)
    limits = torch.zeros(tokens, 2, dtype=torch.int32)
    for allowed in ((None, None, None), (offsets, labels, None), (None, None, limits)):
        given = cross_entropy.Given.of(hidden, weight, bias, labels, *allowed, 4, 0.1)
        chunk = cross_entropy.chunk_of(given, rows, shared_memory)
        found = cross_entropy.empty_losses(given, True)
        yield from chunk.marking + cross_entropy.loss_launches(given, chunk, rows, found)
    dscore = torch.empty(tokens, vocabulary, dtype=dtype)
    yield cross_entropy.gradient_launch(given, chunk, dscore, found[0], found[2])


def routed(dtype: torch.dtype, shared_memory: int) -> Launches:
    """An expert of OFA-base's feed-forward layer, tokens grouped by an index."""
    tokens, width, wide = 300, 768, 3072
    x, y = torch.empty(tokens, width, dtype=dtype), torch.empty(tokens, wide, dtype=dtype)
    weights, biases = [torch.empty(wide, width, dtype=dtype)], [torch.empty(wide, dtype=dtype)]
    index, counts = torch.zeros(tokens, dtype=torch.int64), [tokens]
    yield from routed_ffn.forward_launches(y, x, weights, biases, counts, index, None, shared_memory)
    grads = [x, weights[0], biases[0]]
    yield from routed_ffn.gradient_launches(
        grads, y, x, weights, counts, index, None, (True, True, True), shared_memory
    )


def patch_embeds(dtype: torch.dtype, shared_memory: int) -> Launches:
    """OFA-base's width and patch, a batch of RGB images and several of different sizes, with every gradient."""
    width, batch = 768, torch.empty(2, 1, 3, 480, 480, dtype=torch.uint8)
    weight, vector = torch.empty(width, 3, 1, 16, 16, dtype=dtype), torch.empty(width)
    position, rest = torch.empty(900, width, dtype=dtype), (vector, vector, 1e-5)
    for images in ([batch], [batch[:1], batch[1:]]):
        tokens = sum(x.shape[0] for x in images) * 900
        index = None if len(images) == 1 else torch.zeros(tokens, dtype=torch.int32)
        call = (images, weight, [0.1] * 3, [0.0] * 3, vector, vector, position, index, *rest)
        given, out = patch_embed.Given.of(*call), torch.empty(tokens, width, dtype=dtype)
        yield from patch_embed.forward_launches(given, out, shared_memory)
        yield from patch_embed.row_gradient_launches(given, out, out, shared_memory)[0]
        yield from patch_embed.weight_launches(given, weight, out, vector, shared_memory)
        yield patch_embed.position_launch(given, position, out)


# name: launches, and which of their kernels have products.
OPS: dict[str, tuple[Callable[[torch.dtype, int], Launches], tuple[str, ...]]] = {
    "layer_norm": (layer_norms, ()),
    "rms_norm": (rms_norms, ()),
    "routed_ffn": (routed, ("routed_rows", "routed_weights")),
    "patch_embed": (
        patch_embeds,
        ("patch_embed_forward", "patch_embed_row_gradient", "patch_embed_weight_sums"),
    ),
    "cross_entropy": (cross_entropies, ("cross_entropy_scores", "cross_entropy_gradient")),
}
CASES = [(op, *target) for op in OPS for target in ((80, F16), (90, BF16), (100, BF16))]


def label(case: tuple[Any, ...]) -> str:
    op, capability, dtype = case
    return f"{op} sm_{capability} {str(dtype).removeprefix('torch.')}"


def measure(case: tuple[Any, ...], folder: Path) -> dict[str, dict[str, int]]:
    op, capability, dtype = case
    launches, products = OPS[op]
    named = {variant(n): n for n in launches(dtype, SHARED_MEMORY[capability])}
    return {
        name: resources(launch, capability, launch.kernel.__name__ in products, folder)
        for name, launch in named.items()
    }


def variant(launch: Any) -> str:
    """A kernel's name, and which ids it allows, how its weight lies, or whether it looks images or places up."""
    name = str(launch.kernel.__name__)
    told = ("ALLOWED", "TRANSPOSED", "TABLE", "SORTED")
    kinds = [f"[{launch.constants[kind]}]" for kind in told if kind in launch.constants]
    return "".join([name, *kinds])


@pytest.mark.parametrize("case", CASES, ids=label)
def test_compiles_without_new_spills(case: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(CACHE))
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    assert_no_more(measure(case, tmp_path), record, label(case))


def of_tokens(tokens: int) -> Launches:
    """Launches whose lengths are those of a batch, at small widths; gradients' partitions too."""
    x, weight, index = torch.empty(tokens, 16, dtype=F16), torch.empty(16), torch.zeros(tokens, dtype=torch.int64)
    yield from layer_norm.gelu_forward_call(x, weight, weight, 1e-5).launches
    yield from layer_norm.gelu_backward_call(x, x, torch.empty(tokens, 2), weight).launches
    yield from rms_norm.backward_call(x, x, torch.empty(tokens), weight).launches
    limits, table = torch.zeros(tokens, 2, dtype=torch.int32), torch.empty(40 + tokens, 16, dtype=F16)
    given = cross_entropy.Given.of(x, table, None, index, None, None, limits, tokens, 0.1)
    chunk = cross_entropy.chunk_of(given, slice(0, tokens), SHARED_MEMORY[90])
    found = cross_entropy.empty_losses(given, True)
    yield from cross_entropy.loss_launches(given, chunk, slice(0, tokens), found)
    yield from routed_ffn.forward_launches(x, x, [table[:16]], [], [tokens], index, None, SHARED_MEMORY[90])
    images = [torch.empty(1, 1, 1, 16, 16 * n, dtype=torch.uint8) for n in (tokens, 2 * tokens)]
    weight, rest = torch.empty(16, 1, 1, 16, 16, dtype=F16), (torch.empty(16), torch.empty(16), 1e-5)
    for given in (images[:1], images):
        call = patch_embed.Given.of(given, weight, [1.0], [0.0], None, None, x, index.int(), *rest)
        yield from patch_embed.forward_launches(call, x, SHARED_MEMORY[90])
        yield from patch_embed.row_gradient_launches(call, x, x, SHARED_MEMORY[90])[0]
        yield from patch_embed.weight_launches(call, weight, x, rest[0], SHARED_MEMORY[90])
        yield patch_embed.position_launch(call, x, x)


def test_other_lengths_compile_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked of triton's own launcher, which specialises on small and round numbers where it may."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(CACHE))
    monkeypatch.setattr(triton.runtime.driver, "_active", TargetDriver())

    def warm(tokens: int) -> list[Any]:
        return [n.kernel.warmup(grid=n.grid, **n.arguments, **n.constants, **n.options) for n in of_tokens(tokens)]

    first = warm(200)
    for tokens in (1, 16, 4096):
        for known, again in zip(first, warm(tokens), strict=True):
            assert again is known, again.name


if __name__ == "__main__":
    write_record(RECORD, CASES, label, measure)
