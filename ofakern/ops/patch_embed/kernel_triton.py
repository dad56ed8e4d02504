"""patch_embed on GPUs in Triton: blocks, launches, and what op.py registers. The kernels: triton_kernels/. They have
not run on a GPU yet: `auto` does not take them.

A program owns a block of tokens: it multiplies their pixels, as they are, with the folded weight, some columns at a
time, leaves the rows in the result and normalises them from there, while they are in the cache. Blocks of tokens do not
cross tensors of images, so that strides are one number each. Sums over tokens are parts in an order that shapes fix:
no atomics, the same bits every time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ofakern.ops.patch_embed.triton_kernels import gradients, pixels, rows
from ofakern.ops.triton_launch import Launch, ceil_div, options, power_of_2, run, shared_memory


class Blocks(NamedTuple):
    """tokens x columns of a tile, pixels of a step of its product, warps, and how many steps its loads run ahead."""

    tokens: int
    columns: int
    step: int
    warps: int
    stages: int


# By the bytes of an element; from what compiles for sm_90 without spills, not from timings: there are none yet.
_BLOCKS = {2: Blocks(128, 128, 64, 8, 3), 4: Blocks(32, 64, 32, 4, 2)}
# The weight's gradient: columns of it x pixels, and tokens of a step.
_SUMS = {2: Blocks(64, 128, 128, 8, 3), 4: Blocks(32, 32, 32, 4, 2)}
_ROOMY = 160 * 1024  # bytes of shared memory that three stages need, with some to spare
_PROGRAMS = 256  # of the weight's gradient: enough to fill a GPU
_NORMALISED = 64  # columns of a tile that LayerNorm takes at a time
_FOLDED, _FINISHED = 256, 1024
_POSITION_COLUMNS, _POSITION_ROWS = 256, 4


@dataclass(frozen=True)
class Given:
    """A call's inputs, ready for kernels; images without tokens are left out."""

    images: list[Tensor]
    weight: Tensor
    scale: tuple[float, ...]
    shift: tuple[float, ...]
    bias: Tensor | None
    type_embedding: Tensor | None
    position: Tensor | None
    position_index: Tensor | None
    ln_weight: Tensor | None
    ln_bias: Tensor | None
    eps: float

    @staticmethod
    def of(
        images: Sequence[Tensor], weight: Tensor, scale: Sequence[float], shift: Sequence[float], *rest: Any
    ) -> Given:
        kept = [x for x in images if x.numel()]
        return Given(kept, weight, tuple(scale), tuple(shift), *rest)

    @property
    def counts(self) -> list[int]:
        """Tokens per tensor of images."""
        return [x.shape[0] * cells for x, cells in zip(self.images, self.cells, strict=True)]

    @property
    def cells(self) -> list[int]:
        """Tokens per image, for each tensor."""
        kt, ph, pw = self.weight.shape[2:]
        return [(x.shape[1] // kt) * (x.shape[3] // ph) * (x.shape[4] // pw) for x in self.images]

    @property
    def interleaved(self) -> bool:
        return bool(self.images) and self.images[0].stride(4) != 1

    @property
    def bytes(self) -> bool:
        return not self.images or self.images[0].dtype == torch.uint8

    @property
    def depth(self) -> int:
        return self.weight[0].numel()


class Walk(NamedTuple):
    """How the kernels find pixels: arguments and constants that all of them take, and how many tiles there are."""

    arguments: dict[str, Any]
    constants: dict[str, Any]
    tiles: int


class Folded(NamedTuple):
    """What pixels are multiplied by, and what makes it."""

    weight: Tensor
    vector: Tensor
    channels: Tensor
    scale: float
    launch: Launch


def forward_triton(*arguments: Any) -> Tensor:
    """The registered op patch_embed_fwd."""
    given = Given.of(*arguments)
    weight = given.weight
    out = torch.empty((sum(given.counts), weight.shape[0]), dtype=weight.dtype, device=weight.device)
    if out.shape[0]:
        run("patch_embed", weight, forward_launches(given, out, shared_memory(weight)))
    return out


def backward_triton(dout: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """The registered op patch_embed_bwd: dweight, dbias, dposition, dln_weight, dln_bias; no elements where absent."""
    given = Given.of(*arguments)
    dweight, dbias, *optional = _empty_gradients(given)
    if not given.images:
        return dweight.zero_(), dbias.zero_(), *(x.zero_() for x in optional)
    shared, dy, sums = shared_memory(dout), dout, [dbias, *optional[1:]]
    if given.ln_weight is None:
        torch.sum(dout, 0, dtype=torch.float32, out=dbias)
    else:
        dy = torch.empty_like(dout)
        launches, parts = row_gradient_launches(given, dout, dy, shared)
        run("patch_embed", dout, launches)
        for part, total in zip(parts, sums, strict=True):
            torch.sum(part, 0, out=total)
    launches = weight_launches(given, dweight, dy, dbias, shared)
    if given.position is not None:
        launches.append(position_launch(given, optional[0], dy))
    run("patch_embed", dout, launches)
    return dweight, dbias, *optional


def _empty_gradients(given: Given) -> list[Tensor]:
    """As backward_triton returns them."""
    device = given.weight.device
    leaves = (given.weight, given.weight[:, 0, 0, 0, 0], given.position, given.ln_weight, given.ln_bias)
    dtypes = (given.weight.dtype, torch.float32, given.weight.dtype, torch.float32, torch.float32)
    return [
        torch.empty(0 if x is None else x.shape, dtype=dtype, device=device)
        for x, dtype in zip(leaves, dtypes, strict=True)
    ]


def forward_launches(given: Given, out: Tensor, shared: int) -> list[Launch]:
    """Writes out `[N, D]`; shared: bytes of shared memory that a program may use."""
    blocks, stages = _blocks(_BLOCKS, given.weight, shared)
    walk, folded = walk_of(given, blocks.tokens), folded_of(given, blocks)
    arguments, constants = _row_arguments(given, walk, folded, blocks)
    arguments |= {"out": out, "ln_weight": given.ln_weight, "ln_bias": given.ln_bias}
    constants |= {"NORM": given.ln_weight is not None}
    launch = Launch(rows.patch_embed_forward, (walk.tiles,), arguments, constants, options(blocks.warps, stages))
    return [folded.launch, launch]


def row_gradient_launches(given: Given, dout: Tensor, dy: Tensor, shared: int) -> tuple[list[Launch], Tensor]:
    """Writes dy `[N, D]`, and parts f32 `[3, tiles, D]` whose sums over tiles are those of dy, dout unit and dout."""
    blocks, stages = _blocks(_BLOCKS, given.weight, shared)
    walk, folded = walk_of(given, blocks.tokens), folded_of(given, blocks)
    arguments, constants = _row_arguments(given, walk, folded, blocks)
    parts = torch.empty((3, walk.tiles, dy.shape[1]), dtype=torch.float32, device=dy.device)
    arguments |= {"dy": dy, "parts": parts, "dout": dout, "ln_weight": given.ln_weight}
    launch = Launch(rows.patch_embed_row_gradient, (walk.tiles,), arguments, constants, options(blocks.warps, stages))
    return [folded.launch, launch], parts


def weight_launches(given: Given, dweight: Tensor, dy: Tensor, dbias: Tensor, shared: int) -> list[Launch]:
    """Writes dweight of dy `[N, D]` and its sum over tokens."""
    blocks, stages = _blocks(_SUMS, given.weight, shared)
    width, depth = dy.shape[1], given.depth
    walk = walk_of(given, blocks.tokens)
    columns, step = (min(n, power_of_2(m, 16)) for n, m in ((blocks.columns, width), (blocks.step, depth)))
    grid = (ceil_div(width, columns), ceil_div(depth, step))
    each = max(1, ceil_div(walk.tiles, max(1, _PROGRAMS // (grid[0] * grid[1]))))
    splits = ceil_div(walk.tiles, each)
    sums = torch.empty((splits, width, depth), dtype=torch.float32, device=dy.device)
    arguments = walk.arguments | {"sums": sums, "dy": dy, "tiles_per_split": each}
    constants = walk.constants | {"WIDTH": width, "DEPTH": depth, "BLOCK_D": columns, "BLOCK_K": step}
    channels = _channels(given.scale, given.shift, given.bytes, dy.device)
    finish = {"dweight": dweight, "sums": sums, "dbias": dbias, "channels": channels, "splits": splits}
    finishing = _order(given) | {"WIDTH": width, "DEPTH": depth, "BLOCK": min(_FINISHED, power_of_2(depth, 16))}
    return [
        Launch(gradients.patch_embed_weight_sums, (*grid, splits), arguments, constants, options(blocks.warps, stages)),
        Launch(
            gradients.patch_embed_weight_gradient,
            (width, ceil_div(depth, finishing["BLOCK"])),
            finish,
            finishing,
            options(4, 1),
        ),
    ]


def position_launch(given: Given, dposition: Tensor, dy: Tensor) -> Launch:
    """Writes dposition `[P, D]`."""
    places, width = dposition.shape
    one = len(given.images) == 1 and given.position_index is None
    arguments: dict[str, Any] = {"dposition": dposition, "dy": dy, "order": None, "offsets": None}
    arguments |= {"images": given.images[0].shape[0] if one else 0, "per_image": given.cells[0] if one else 1}
    if not one:
        place, order = torch.sort(_places(given, dy.device), stable=True)
        offsets = torch.searchsorted(place, torch.arange(places + 1, device=dy.device))
        arguments |= {"order": order, "offsets": offsets}
    block = min(_POSITION_COLUMNS, power_of_2(width, 16))
    constants = {"SORTED": not one, "WIDTH": width, "BLOCK": block, "ROWS": _POSITION_ROWS}
    grid = (places, ceil_div(width, block))
    return Launch(gradients.patch_embed_position_gradient, grid, arguments, constants, options(4, 2))


def folded_of(given: Given, blocks: Blocks) -> Folded:
    """weight `[D, K]` and vector `[D]`, padded to whole tiles with zeros."""
    width, depth, device = given.weight.shape[0], given.depth, given.weight.device
    columns, step = _tile(blocks, width, depth)
    high, ld = ceil_div(width, columns) * columns, ceil_div(depth, step) * step
    weight = torch.empty((high, ld), dtype=given.weight.dtype, device=device)
    vector = torch.empty(high, dtype=torch.float32, device=device)
    channels = _channels(given.scale, given.shift, given.bytes, device)
    arguments = {"folded": weight, "vector": vector, "weight": given.weight, "channels": channels}
    arguments |= {"bias": given.bias, "type_embedding": given.type_embedding}  # type: ignore[dict-item]
    constants = _order(given) | {"BIAS": given.bias is not None, "TYPE": given.type_embedding is not None}
    constants |= {"WIDTH": width, "DEPTH": depth, "LD": ld, "BLOCK": min(_FOLDED, power_of_2(ld))}
    launch = Launch(rows.patch_embed_fold, (high,), arguments, constants, options(4, 1))
    return Folded(weight, vector, channels, given.scale[0], launch)


def walk_of(given: Given, tokens: int) -> Walk:
    """Tiles of `tokens` tokens that do not cross tensors of images; several tensors are found through a table."""
    kt, ph, pw = given.weight.shape[2:]
    channels, first = given.weight.shape[1], given.images[0]
    tiles = [ceil_div(count, tokens) for count in given.counts]
    numbers = _strides(given, tiles, tokens)
    align = 16 if all(n % 16 == 0 for row in numbers for n in row[:5]) else 1
    for row in numbers:
        row[:5] = [n // align for n in row[:5]]
    table = None
    if len(numbers) > 1:
        owners = [image for image, count in enumerate(tiles) for _ in range(count)]
        flat = torch.tensor(owners + [n for row in numbers for n in row])
        table = flat if first.device.type == "cpu" else flat.pin_memory().to(first.device, non_blocking=True)
    names = ("n_stride", "t_stride", "c_stride", "h_stride", "rows", "columns", "per_image", "tokens")
    arguments: dict[str, Any] = dict(zip(names, numbers[0][1:9], strict=True))
    arguments |= {"pixels": first, "table": table, "tiles": sum(tiles)}
    run_length = pw * channels if given.interleaved else pw
    constants = {"TABLE": table is not None, "FRAMES": kt, "HEIGHT": ph, "RUN": run_length, "PATCH": run_length}
    constants |= {"BYTES": given.bytes, "ALIGN": align, "BLOCK_N": tokens}
    return Walk(arguments, constants, sum(tiles))


def _strides(given: Given, tiles: list[int], tokens: int) -> list[list[int]]:
    """pixels.FIELDS numbers of each tensor: where it starts after the first one; strides of n, t, c, h; rows and
    columns of patches; tokens of an image and in all; tokens and tiles before it."""
    _, ph, pw = given.weight.shape[2:]
    found, token, tile, base = [], 0, 0, given.images[0].data_ptr()
    for x, cells, count, own in zip(given.images, given.cells, given.counts, tiles, strict=True):
        start = (x.data_ptr() - base) // x.element_size()
        strides = [x.stride(n) for n in (0, 1, 2, 3)]
        found.append([start, *strides, x.shape[3] // ph, x.shape[4] // pw, cells, count, token, tile])
        token, tile = token + count, tile + own
    return found


def _row_arguments(given: Given, walk: Walk, folded: Folded, blocks: Blocks) -> tuple[dict[str, Any], dict[str, Any]]:
    width, depth = given.weight.shape[0], given.depth
    columns, step = _tile(blocks, width, depth)
    position = given.position
    arguments = walk.arguments | {"folded": folded.weight, "vector": folded.vector, "scale": folded.scale}
    arguments |= {"position": position, "position_index": given.position_index, "eps": given.eps}
    arguments |= {"places": 0 if position is None else position.shape[0]}
    constants = walk.constants | {"POSITION": position is not None, "INDEX": given.position_index is not None}
    constants |= {"WIDTH": width, "DEPTH": depth, "LD": folded.weight.shape[1]}
    constants |= {"BLOCK_D": columns, "BLOCK_K": step, "BLOCK_C": min(_NORMALISED, columns)}
    return arguments, constants


def _tile(blocks: Blocks, width: int, depth: int) -> tuple[int, int]:
    """Columns and pixels of a tile: no more than there are."""
    return min(blocks.columns, power_of_2(width, 16)), min(blocks.step, power_of_2(depth, 16))


def _blocks(table: dict[int, Blocks], like: Tensor, shared: int) -> tuple[Blocks, int]:
    blocks = table[like.element_size()]
    return blocks, blocks.stages if shared >= _ROOMY else 2


def _order(given: Given) -> dict[str, Any]:
    channels = given.weight.shape[1]
    return {"CHANNELS": channels, "VOLUME": given.depth // channels, "INTERLEAVED": given.interleaved}


@lru_cache(maxsize=32)
def _channels(scale: tuple[float, ...], shift: tuple[float, ...], bytes_: bool, device: torch.device) -> Tensor:
    """f32 `[4, C]`: ratio of the scales, offset / ratio, scale, offset. Kept: a copy to the device waits for it."""
    centre = float(pixels.CENTRE.value) if bytes_ else 0.0
    ratio = [a / scale[0] for a in scale]
    offset = [s + a * centre for a, s in zip(scale, shift, strict=True)]
    constant = [o / r for o, r in zip(offset, ratio, strict=True)]
    return torch.tensor([ratio, constant, list(scale), offset], dtype=torch.float32, device=device)


def _places(given: Given, device: torch.device) -> Tensor:
    """int64 `[N]`: each token's row of the position table."""
    if given.position_index is not None:
        return given.position_index.long()
    own = [torch.arange(n, device=device).repeat(x.shape[0]) for n, x in zip(given.cells, given.images, strict=True)]
    return torch.cat(own)
