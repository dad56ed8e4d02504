"""`patch`: walks a model and puts drop-in layers where they can stand."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from ofakern.errors import OfakernTypeError, OfakernValueError
from ofakern.nn.dropin import DropIn
from ofakern.patching import rules
from ofakern.patching.guards import guard_model
from ofakern.patching.report import LeftAlone, PatchReport, Replaced, Swap

_MARK = "_ofakern_patched"


def patch(model: nn.Module) -> PatchReport:
    """Replaces the attention modules of `model` that a layer of `ofakern.nn.dropin` can stand in for.

    Changes instances only, in this model only: no class and no library is touched. Layers share the parameters,
    submodules and hooks of what they replace, so optimizers, state dicts and checkpoints stay valid, and
    `report.undo()` puts the very same modules back. What must go together (T5's layers share one bias) is replaced
    together or not at all. While patched, asking the model for attention weights raises: they are never formed.

    Returns a report: each replaced module, each attention-like module left alone and why. A model without a replaceable
    module is left as it is, and the report says so.

    Raises OfakernTypeError: no module. OfakernValueError: the model, or a part of it, is patched already.
    """
    if not isinstance(model, nn.Module):
        raise OfakernTypeError(f"patch: model must be a torch.nn.Module, got {type(model).__name__}")
    _refuse_patched(model)
    places = list(_places(model))
    swaps, refusals = _plan(places)
    for swap in swaps.values():
        object.__setattr__(swap.after, _MARK, True)
        swap.parent._modules[swap.name] = swap.after
    replaced = tuple(
        Replaced(path, type(swap.before).__name__, f"ofakern {type(swap.after).__name__}")
        for path, swap in swaps.items()
    )
    return PatchReport(
        model=type(model).__name__,
        replaced=replaced,
        left_alone=tuple(_left_alone(model, refusals)),
        swaps=tuple(swaps.values()),
        cleanups=tuple(guard_model(model, [swap.after for swap in swaps.values()])),
    )


class _Place(NamedTuple):
    path: str
    parent: nn.Module
    name: str
    module: nn.Module
    group: tuple[str, str] | None
    layer: type[DropIn]


def _refuse_patched(model: nn.Module) -> None:
    patched = [path for path, module in model.named_modules() if getattr(module, _MARK, False)]
    if patched:
        raise OfakernValueError(
            f"patch: model must not be patched already, got {len(patched)} patched modules (first: {patched[0]!r})\n"
            "Try: report.undo() of the first patch."
        )


def _places(parent: nn.Module, above: tuple[tuple[str, nn.Module], ...] = ()) -> Iterator[_Place]:
    """Every child that has a drop-in layer, in the model's order; a module that stands in several places comes once for
    each. above: the modules around `parent`, from the root down, with their paths."""
    path = above[-1][0] if above else ""
    around = above or (("", parent),)
    for name, child in parent._modules.items():
        if child is None or isinstance(child, DropIn) or any(child is module for _, module in around):
            continue
        inner = f"{path}.{name}" if path else name
        layer = rules.layer_for(child)
        if layer is not None:
            yield _Place(inner, parent, name, child, rules.group_of(layer, around), layer)
        else:
            yield from _places(child, (*around, (inner, child)))


def _plan(places: list[_Place]) -> tuple[dict[str, Swap], dict[str, str]]:
    """What to swap, by path in the model's order, and why the other places stay."""
    made: dict[int, DropIn | str] = {}
    for place in places:
        if id(place.module) not in made:
            made[id(place.module)] = rules.replacement(place.module, place.layer, place.parent)
    groups: dict[tuple[str, str], list[_Place]] = defaultdict(list)
    for place in places:
        if place.group is not None:
            groups[place.group].append(place)
    refusals: dict[str, str] = {}
    for place in places:
        result = made[id(place.module)]
        if isinstance(result, str):
            refusals[place.path] = result
            if place.group is not None:
                for other in groups[place.group]:
                    refusals.setdefault(other.path, f"shares the {place.group[0]} with {place.path}, which stays")
    swaps = {}
    for place in places:
        after = made[id(place.module)]
        if place.path not in refusals and isinstance(after, DropIn):
            swaps[place.path] = Swap(place.parent, place.name, place.module, after)
    return swaps, refusals


def _left_alone(model: nn.Module, refusals: dict[str, str]) -> Iterator[LeftAlone]:
    """What was refused, and the innermost modules whose name speaks of attention and that have no drop-in layer."""
    named = dict(model.named_modules(remove_duplicate=False))
    concerned = {path for path, module in named.items() if isinstance(module, DropIn) or rules.attention_like(module)}
    for path, module in named.items():
        if path in refusals:
            yield LeftAlone(path, type(module).__name__, refusals[path])
        elif path in concerned and not isinstance(module, DropIn):
            around = [path.rsplit(".", cut)[0] for cut in range(1, path.count(".") + 1)]
            ours = any(outer in refusals or isinstance(named[outer], DropIn) for outer in around)
            inner = any(other.startswith(f"{path}." if path else "") and other != path for other in concerned)
            if not ours and not inner:
                yield LeftAlone(path, type(module).__name__, "no drop-in layer for this class")
