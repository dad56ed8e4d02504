"""Keys and values of past tokens: written once, never moved, in the layout that the backend reads best."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ofakern.errors import OfakernTypeError, OfakernValueError
from ofakern.ops.decode_attention import op
from ofakern.ops.decode_attention.reference import quantize_heads
from ofakern.ops.decode_linear import PackedWeight
from ofakern.ops.memory import large_empty
from ofakern.ops.selection import KERNEL_DTYPES

_WHERE = "KeyValueCache"
_FLOATS = (*KERNEL_DTYPES, torch.float64)


@dataclass(frozen=True)
class KeyValueCache:
    """Keys and values for `decode_attention`. Opaque: made by `empty` or `of_source`, read by the op only.

    Of two kinds. Slots (`empty`): `write` puts tokens anywhere, the op finds them through a table of slots. Source
    (`of_source`): all tokens of each sample at once, `runs` says where they are.

    keys, values: storage. key_scales, value_scales: float32, with int8 storage. runs: int32 `[B,2]` (first key, count)
    of a source cache, on the CPU; None of a slots cache. packed: source keys stand in blocks for the CPU kernel.
    heads, key_width, value_width: H, K, Kv. dtype: what q must have. device_runs: `runs` where the keys are; longest:
    the most keys of a sample, both for a GPU's calls: made once, for all steps and layers.
    """

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None
    value_scales: Tensor | None
    runs: Tensor | None
    packed: bool
    heads: int
    key_width: int
    value_width: int
    dtype: torch.dtype
    device_runs: Tensor | None = field(init=False)
    longest: int = field(init=False)

    def __post_init__(self) -> None:
        runs = self.runs
        object.__setattr__(self, "device_runs", None if runs is None else runs.to(self.keys.device))
        object.__setattr__(self, "longest", 0 if runs is None else max(runs[:, 1].tolist(), default=0))

    @staticmethod
    def empty(
        slots: int,
        heads: int,
        key_width: int,
        value_width: int | None = None,
        dtype: torch.dtype = torch.float32,
        *,
        int8: bool = False,
        device: torch.device | str = "cpu",
    ) -> KeyValueCache:
        """A slots cache; its content is undefined until written, and a slot that no table names is never read.

        value_width: key_width if not given. int8: values are rounded to int8 with one float32 scale per slot and head
        (an element is off by at most 1/254 of the largest magnitude of its slot and head).
        Raises OfakernValueError, OfakernTypeError.
        """
        value_width = key_width if value_width is None else value_width
        if min(slots, heads - 1, key_width - 1, value_width - 1) < 0 or max(key_width, value_width) > op.MAX_WIDTH:
            raise OfakernValueError(
                f"{_WHERE}.empty: slots must be at least 0, heads at least 1 and widths in 1..{op.MAX_WIDTH}, "
                f"got {slots}, {heads}, {key_width}, {value_width}"
            )
        if dtype not in _FLOATS:
            raise OfakernTypeError(f"{_WHERE}.empty: dtype must be a float dtype, got {dtype}")
        stored = torch.int8 if int8 else dtype
        keys = large_empty((slots, heads, key_width), stored, device)
        values = large_empty((slots, heads, value_width), stored, device)
        k_scale, v_scale = (torch.empty((slots, heads), device=device) if int8 else None for _ in range(2))
        return KeyValueCache(keys, values, k_scale, v_scale, None, False, heads, key_width, value_width, dtype)

    @staticmethod
    def of_source(
        k: Tensor, v: Tensor, lengths: Sequence[int] | Tensor, *, int8: bool = False, backend: str = "auto"
    ) -> KeyValueCache:
        """A source cache of packed samples: k `[N,H,K]`, v `[N,H,Kv]` (last dimension contiguous), lengths of samples.

        backend: who will read it: "auto" and "cpu" pack the keys of CPU tensors in blocks, "cuda" and "reference" keep
            copies.
        int8: as in `empty`. Raises OfakernValueError, OfakernTypeError, BackendError.
        """
        counts = [int(n) for n in lengths]
        _check_source(k, v, counts)
        chosen = op.BACKENDS.select(backend, k)
        heads, key_width, value_width = k.shape[1], k.shape[2], v.shape[2]
        k, v = k.detach(), v.detach()
        k_scale: Tensor | None = None
        v_scale: Tensor | None = None
        dtype = k.dtype
        if int8:
            (k, k_scale), (v, v_scale) = quantize_heads(k), quantize_heads(v)
        packed = chosen == "cpu"
        runs = _runs(counts, op.BLOCK if packed else 1)
        if packed:
            keys, values = op.pack(k, v, runs)
            k_scale = None if k_scale is None else _packed_scales(k_scale, runs)
            v_scale = None if v_scale is None else _packed_scales(v_scale, runs)
        else:
            keys, values = k.clone(), v.clone()
        return KeyValueCache(keys, values, k_scale, v_scale, runs, packed, heads, key_width, value_width, dtype)

    @staticmethod
    def of_projection(states: Tensor, weight: PackedWeight, lengths: Sequence[int], heads: int) -> KeyValueCache:
        """A source cache of packed samples whose keys and values are projections of `states` `[N,D]`, in one pass.

        weight: of keys `[H*K,D]` and values `[H*Kv,D]` together, from `prepack_weight`, not int8; its biases are added.
        lengths: of samples. heads: H. As `of_source` of the products, which are rounded once, behind their bias.
        Raises OfakernValueError, OfakernTypeError.
        """
        counts = [int(n) for n in lengths]
        _check_projection(states, weight, counts, heads)
        runs = _runs(counts, op.BLOCK)
        keys, values = op.project(states.detach(), weight, runs, heads)
        key_width, value_width = (width // heads for width in weight.widths)
        return KeyValueCache(keys, values, None, None, runs, True, heads, key_width, value_width, states.dtype)

    @property
    def slots(self) -> int:
        """Room of a slots cache; keys of a source cache."""
        return self.keys.shape[0] if self.runs is None else int(self.runs[:, 1].sum())

    @property
    def room(self) -> int:
        """Keys that a source cache's storage has room for, pads included."""
        return self.keys.shape[0] // self._entries("keys")

    @property
    def nbytes(self) -> int:
        parts = (self.keys, self.values, self.key_scales, self.value_scales)
        return sum(x.numel() * x.element_size() for x in parts if x is not None)

    @property
    def lengths(self) -> Tensor:
        """int32 `[B]`: keys of each sample of a source cache."""
        return self._source_runs("lengths")[:, 1]

    def write(self, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Puts k `[n,H,K]` and v `[n,H,Kv]` into the slots (int32 or int64 `[n]`), in the cache's dtype.

        Raises OfakernValueError for wrong shapes or a source cache; a slot outside the cache raises IndexError.
        """
        if self.runs is not None:
            raise OfakernValueError(f"{_WHERE}.write: a source cache must not be written, got one\nTry: empty")
        wanted = ((slots.shape[0], self.heads, self.key_width), (slots.shape[0], self.heads, self.value_width))
        if slots.ndim != 1 or (tuple(k.shape), tuple(v.shape)) != wanted:
            raise OfakernValueError(
                f"{_WHERE}.write: slots, k and v must have shapes [n], [n,{self.heads},{self.key_width}] and "
                f"[n,{self.heads},{self.value_width}], got {list(slots.shape)}, {list(k.shape)}, {list(v.shape)}"
            )
        index = slots.to(self.keys.device, torch.int64, non_blocking=True)  # all that index_copy_ takes
        with torch.no_grad():
            for store, scales, x in ((self.keys, self.key_scales, k), (self.values, self.value_scales, v)):
                if scales is None:
                    store.index_copy_(0, index, x.to(store.dtype))
                else:
                    rounded, scale = quantize_heads(x)
                    store.index_copy_(0, index, rounded)
                    scales.index_copy_(0, index, scale)

    def grown(self, slots: int) -> KeyValueCache:
        """A slots cache with at least as many slots and this one's content. Raises OfakernValueError."""
        if self.runs is not None:
            raise OfakernValueError(f"{_WHERE}.grown: a source cache must not grow, got one\nTry: joined")
        room = slots - self.slots
        if room <= 0:
            return self
        return self._mapped(lambda x: _joined([x, x.new_empty((room, *x.shape[1:]))]))

    def select(self, samples: Tensor | Sequence[int]) -> KeyValueCache:
        """The source cache of these samples in this order, on the same storage (nothing is copied)."""
        index = torch.as_tensor(samples, dtype=torch.int64, device="cpu")
        return replace(self, runs=self._source_runs("select")[index])

    def standing(self, runs: Tensor, longest: int) -> KeyValueCache:
        """The source cache on this storage whose samples stand where `runs` says: int32 `[B,2]` on the keys' device.

        Nothing reads `runs` here, so that it may be written between calls of the op, as the inputs of a CUDA graph are.
        longest: no sample has more keys.
        """
        found = copy(self)
        for name, value in (("runs", runs), ("device_runs", runs), ("longest", longest)):
            object.__setattr__(found, name, value)
        return found

    def joined(self, other: KeyValueCache) -> KeyValueCache:
        """A source cache of this one's samples, then the other's, for requests that come and go.

        The other's samples are copied into room that no sample of this cache uses; only where there is not enough is
        everything moved, into half as much again as is needed. This cache, and all that `select` made of it, must not
        be used afterwards. Raises OfakernValueError when the two do not fit together.
        """
        mine, theirs = self._kind(), other._kind()
        if mine != theirs:
            raise OfakernValueError(f"{_WHERE}.joined: other must be of the same kind {mine}, got {theirs}")
        runs, incoming = self._source_runs("joined"), other._source_runs("joined")
        first = _free_places(runs, incoming[:, 1].tolist(), self.room, self._unit())
        if first is None:
            needed = sum(_whole(count, self._unit()) for count in torch.cat([runs, incoming])[:, 1].tolist())
            return self._moved(_whole(needed * 3 // 2, self._unit())).joined(other)
        placed = incoming.clone()
        placed[:, 0] = torch.tensor(first, dtype=torch.int32, device="cpu")
        self._take(other, incoming, placed)
        return replace(self, runs=torch.cat([runs, placed]))

    def _kind(self) -> tuple[Any, ...]:
        return (self.packed, self.heads, self.key_width, self.value_width, self.dtype, self.keys.dtype)

    def _moved(self, room: int) -> KeyValueCache:
        """This source cache in new storage for `room` keys."""
        runs = self._source_runs("joined")
        new: dict[str, Any] = {
            name: large_empty((room * self._entries(name), *store.shape[1:]), store.dtype, store.device)
            for name, store in self._stores().items()
        }
        moved = replace(self, runs=_runs(runs[:, 1].tolist(), self._unit()), **new)
        moved._take(self, runs, moved._source_runs("joined"))
        return moved

    def _take(self, other: KeyValueCache, runs: Tensor, placed: Tensor) -> None:
        """Copies the other's runs to where `placed` says."""
        sources, targets = other._stores(), self._stores()
        for name, target in targets.items():
            parts = zip(self._regions(name, sources[name], runs), self._regions(name, target, placed), strict=True)
            for source, part in parts:
                part.copy_(source)

    def _regions(self, name: str, store: Tensor, runs: Tensor) -> list[Tensor]:
        """Each run's part of a storage: a sample's part is contiguous in every layout."""
        each, unit = self._entries(name), self._unit()
        return [store[first * each : (first + _whole(count, unit)) * each] for first, count in runs.tolist()]

    def _unit(self) -> int:
        """Keys of which every run takes a multiple."""
        return op.BLOCK if self.packed else 1

    def _entries(self, name: str) -> int:
        """Of a source cache: entries of a storage's first dimension per key."""
        widths = {
            "keys": op.padded_key_width(self.key_width, self.keys.dtype),
            "values": op.padded_value_width(self.value_width),
        }
        return self.heads * widths.get(name, 1) if self.packed else 1

    def _stores(self) -> dict[str, Tensor]:
        whole = {name: getattr(self, name) for name in _STORES}
        return {name: store for name, store in whole.items() if store is not None}

    def natural(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """k `[S,H,K]`, v `[S,H,Kv]` as numbers (int8 multiplied out to float32) and, of a source cache, each sample's
        first row of them (int64 `[B]`). For the reference and for looking at a cache."""
        if self.packed and self.runs is not None:
            return _unpacked(self)
        k, v = self.keys, self.values
        if self.key_scales is not None and self.value_scales is not None:
            k, v = k * self.key_scales[..., None], v * self.value_scales[..., None]
        return k, v, None if self.runs is None else self.runs[:, 0].long()

    def _source_runs(self, method: str) -> Tensor:
        if self.runs is None:
            raise OfakernValueError(f"{_WHERE}.{method}: the cache must be of a source, got slots\nTry: of_source")
        return self.runs

    def _mapped(self, change: Any) -> KeyValueCache:
        scales = [None if x is None else change(x) for x in (self.key_scales, self.value_scales)]
        return replace(
            self, keys=change(self.keys), values=change(self.values), key_scales=scales[0], value_scales=scales[1]
        )


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """torch.cat along the first dimension into memory for caches."""
    length = sum(part.shape[0] for part in parts)
    out = large_empty((length, *parts[0].shape[1:]), parts[0].dtype, parts[0].device)
    return torch.cat(list(parts), out=out)


def _check_source(k: Tensor, v: Tensor, counts: Sequence[int]) -> None:
    for name, x in (("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise OfakernTypeError(f"{_WHERE}.of_source: {name} must be a tensor, got {type(x).__name__}")
        if x.dtype not in _FLOATS:
            raise OfakernTypeError(f"{_WHERE}.of_source: {name} must have a float dtype, got {x.dtype}")
        if x.ndim != 3 or x.shape[1] < 1 or not 1 <= x.shape[2] <= op.MAX_WIDTH:
            raise OfakernValueError(
                f"{_WHERE}.of_source: {name} must have shape [N,H,K] with H at least 1 and K in 1..{op.MAX_WIDTH}, "
                f"got {list(x.shape)}"
            )
    if v.dtype != k.dtype or v.device != k.device:
        raise OfakernTypeError(
            f"{_WHERE}.of_source: v must have k's dtype and device ({k.dtype}, {k.device}), got {v.dtype}, {v.device}"
        )
    if v.shape[:2] != k.shape[:2]:
        raise OfakernValueError(
            f"{_WHERE}.of_source: v must have k's tokens and heads {list(k.shape[:2])}, got {list(v.shape[:2])}"
        )
    if min(counts, default=0) < 0 or sum(counts) != k.shape[0]:
        raise OfakernValueError(
            f"{_WHERE}.of_source: lengths must be non-negative and add up to {k.shape[0]}, got {list(counts)[:8]}"
        )


def _check_projection(states: Tensor, weight: PackedWeight, counts: list[int], heads: int) -> None:
    where = f"{_WHERE}.of_projection"
    if not isinstance(states, Tensor):
        raise OfakernTypeError(f"{where}: states must be a tensor, got {type(states).__name__}")
    if not isinstance(weight, PackedWeight) or not weight.packed or weight.scale is not None:
        got = "another one" if isinstance(weight, PackedWeight) else type(weight).__name__
        raise OfakernTypeError(
            f"{where}: weight must be a PackedWeight of a float type for the CPU kernel, got {got}\nTry: prepack_weight"
        )
    if states.ndim != 2 or states.shape[1] != weight.depth or states.dtype != weight.dtype:
        raise OfakernValueError(
            f"{where}: states must have shape [N,D={weight.depth}] and dtype {weight.dtype}, "
            f"got {list(states.shape)}, {states.dtype}"
        )
    if len(weight.widths) != 2 or heads < 1 or any(width % heads for width in weight.widths):
        raise OfakernValueError(
            f"{where}: weight must be of keys and values of {heads} heads, got widths {list(weight.widths)}"
        )
    if max(weight.widths) > heads * op.MAX_WIDTH:
        raise OfakernValueError(
            f"{where}: heads must be at most {op.MAX_WIDTH} wide, got {max(weight.widths) // heads}"
        )
    if min(counts, default=0) < 0 or sum(counts) != states.shape[0]:
        raise OfakernValueError(
            f"{where}: lengths must be non-negative and add up to {states.shape[0]}, got {counts[:8]}"
        )


def _runs(counts: Sequence[int], unit: int) -> Tensor:
    """int32 `[B,2]`: every run begins at a multiple of `unit`."""
    runs, first = torch.empty((len(counts), 2), dtype=torch.int32, device="cpu"), 0
    for b, count in enumerate(counts):
        runs[b, 0], runs[b, 1] = first, count
        first += _whole(count, unit)
    return runs


def _whole(count: int, unit: int) -> int:
    return -(-count // unit) * unit


def _free_places(runs: Tensor, counts: Sequence[int], room: int, unit: int) -> list[int] | None:
    """For each count the first key of a place that no run uses, the earliest that fits; None when one finds none."""
    taken = sorted((first, first + _whole(count, unit)) for first, count in runs.tolist() if count)
    gaps, end = [], 0
    for lo, hi in [*taken, (room, room)]:
        if lo > end:
            gaps.append([end, lo])
        end = max(end, hi)
    places = []
    for count in counts:
        size = _whole(count, unit)
        gap = next((g for g in gaps if g[1] - g[0] >= size), None)
        if gap is None and size:
            return None
        places.append(0 if gap is None else gap[0])
        if gap is not None:
            gap[0] += size
    return places


def _packed_scales(scales: Tensor, runs: Tensor) -> Tensor:
    """`[N,H]` in the order of packed keys: for each sample `[H, padded keys]`."""
    parts, row = [], 0
    for count in runs[:, 1].tolist():
        part = scales.new_zeros((scales.shape[1], _whole(count, op.BLOCK)))
        part[:, :count] = scales[row : row + count].T
        parts.append(part.flatten())
        row += count
    return torch.cat(parts) if parts else scales.new_zeros(0)


def _unpacked(cache: KeyValueCache) -> tuple[Tensor, Tensor, Tensor]:
    heads, runs = cache.heads, cache._source_runs("natural")
    width = op.padded_key_width(cache.key_width, cache.keys.dtype)
    step = op.depth_step(cache.keys.dtype)
    ks, vs = [], []
    whole = {name: cache._regions(name, store, runs) for name, store in cache._stores().items()}
    for b, count in enumerate(runs[:, 1].tolist()):
        if not count:
            continue
        keys, values, *scales = (part[b] for part in whole.values())
        # Blocks [H, n, depth / step, 32 keys, step]; panels [H, columns / 32, keys / step, 32 columns, step].
        k = keys.view(heads, -1, width // step, op.BLOCK, step).permute(1, 3, 0, 2, 4).flatten(3).flatten(0, 1)
        padded = k.shape[0]
        v = values.view(heads, -1, padded // step, op.BLOCK, step).permute(2, 4, 0, 1, 3).flatten(3).flatten(0, 1)
        if scales:
            k, v = (x * scale.view(heads, -1).T[..., None] for x, scale in zip((k, v), scales, strict=True))
        ks.append(k[:count, :, : cache.key_width])
        vs.append(v[:count, :, : cache.value_width])
    lengths = runs[:, 1].long()
    dtype = cache.keys.dtype if cache.key_scales is None else torch.float32
    empty = [torch.empty((0, heads, n), dtype=dtype) for n in (cache.key_width, cache.value_width)]
    return torch.cat([empty[0], *ks]), torch.cat([empty[1], *vs]), torch.cumsum(lengths, 0) - lengths


_STORES = ("keys", "values", "key_scales", "value_scales")
