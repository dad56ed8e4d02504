"""What `patch` did to a model, as a table; and the way back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import NamedTuple

from torch import nn

from ofakern.errors import OfakernRuntimeError


class Swap(NamedTuple):
    """One child of one module: what stood there and what stands there now."""

    parent: nn.Module
    name: str
    before: nn.Module
    after: nn.Module


@dataclass(frozen=True)
class Replaced:
    """A module whose place a drop-in layer took. path: as `named_modules` gives it; before, after: class names."""

    path: str
    before: str
    after: str


@dataclass(frozen=True)
class LeftAlone:
    """An attention-like module that stayed, and why."""

    path: str
    kind: str
    reason: str


@dataclass
class PatchReport:
    """What was replaced by what, what was left alone and why; `undo()` puts the very same modules back.

    A context manager too: leaving it undoes the patch. `print(report)` shows the table.
    """

    model: str
    replaced: tuple[Replaced, ...] = ()
    left_alone: tuple[LeftAlone, ...] = ()
    swaps: tuple[Swap, ...] = field(default=(), repr=False)
    cleanups: tuple[Callable[[], None], ...] = field(default=(), repr=False)

    def undo(self) -> None:
        """Puts the replaced modules back, with the parameters that the layers in their place hold now.

        A second call does nothing. Raises OfakernRuntimeError, and changes nothing, when somebody else has put another
        module where a drop-in layer stood.
        """
        strangers = [swap for swap in self.swaps if swap.parent._modules.get(swap.name) is not swap.after]
        if strangers:
            swap = strangers[0]
            raise OfakernRuntimeError(
                f"undo: every replaced module must still be in its place, got {len(strangers)} that are not "
                f"({swap.name!r} of {type(swap.parent).__name__} is "
                f"{type(swap.parent._modules.get(swap.name)).__name__} now)"
            )
        for swap in self.swaps:
            _hand_back(swap.before, swap.after)
            swap.parent._modules[swap.name] = swap.before
        for cleanup in self.cleanups:
            cleanup()
        self.swaps, self.cleanups = (), ()

    def __enter__(self) -> PatchReport:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()

    def __str__(self) -> str:
        lines = [f"patch {self.model}: {len(self.replaced)} replaced, {len(self.left_alone)} left alone"]
        if not self.replaced:
            lines.append("  no module of this model can be replaced: it is untouched")
        paths = [row.path for row in self.replaced] + [row.path for row in self.left_alone]
        width = max(map(len, paths), default=0)
        lines += [f"  {row.path:<{width}}  {row.before} -> {row.after}" for row in self.replaced]
        lines += [f"  {row.path:<{width}}  {row.kind} left alone: {row.reason}" for row in self.left_alone]
        return "\n".join(lines)


def _hand_back(before: nn.Module, after: nn.Module) -> None:
    """The mode set while patched goes back; all the rest is shared between the two."""
    now = dict(after.named_modules())
    for path, module in before.named_modules():
        if path in now:
            module.training = now[path].training
