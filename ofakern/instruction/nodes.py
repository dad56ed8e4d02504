"""The tree an instruction parses to. Nodes compare by meaning: where they stood in the text is not part of equality.

``str(node)`` writes the canonical form, which parses to an equal node.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from ofakern.instruction.modality import Modality

__all__ = ["ESCAPABLE", "Attribute", "Group", "Instruction", "Node", "PlainText", "Slot", "Span"]

# A backslash takes the special meaning from any one of these; before anything else it is an error.
ESCAPABLE = frozenset("[]()*\\\"'->|,:=［【")

_MUST_ESCAPE = re.compile(r"[\[\]()*\\［【]")
_PIPES = re.compile(r"\|{3,}")
_BARE_VALUE = re.compile(r"[A-Za-z0-9_.+/:-]+")


class Span(NamedTuple):
    """Code points ``text[start:end]`` of the text that was parsed (all of it, alternatives included)."""

    start: int
    end: int


_NOWHERE = Span(0, 0)


def _escape_plain(text: str) -> str:
    escaped = _MUST_ESCAPE.sub(r"\\\g<0>", text).replace("->", "\\->")
    return _PIPES.sub(lambda pipes: "\\|" * len(pipes.group()), escaped)


@dataclass(frozen=True, slots=True)
class Attribute:
    """``key`` (a flag, ``value`` is None) or ``key=value``; the value is still text, the planner types it."""

    key: str
    value: str | None = None
    span: Span = field(default=_NOWHERE, compare=False, repr=False)
    key_span: Span = field(default=_NOWHERE, compare=False, repr=False)
    value_span: Span = field(default=_NOWHERE, compare=False, repr=False)

    def __str__(self) -> str:
        if self.value is None:
            return self.key
        if _BARE_VALUE.fullmatch(self.value):
            return f"{self.key}={self.value}"
        quoted = self.value.replace("\\", "\\\\").replace('"', '\\"')
        return f'{self.key}="{quoted}"'


@dataclass(frozen=True, slots=True)
class Slot:
    """``[MODALITY:name,attribute,...]``; ``name`` is None for an unnamed slot."""

    modality: Modality
    name: str | None = None
    attributes: tuple[Attribute, ...] = ()
    span: Span = field(default=_NOWHERE, compare=False, repr=False)
    modality_span: Span = field(default=_NOWHERE, compare=False, repr=False)
    name_span: Span = field(default=_NOWHERE, compare=False, repr=False)

    def __str__(self) -> str:
        name = "" if self.name is None else f":{self.name}"
        return f"[{self.modality.name}{name}{''.join(f',{attribute}' for attribute in self.attributes)}]"


@dataclass(frozen=True, slots=True)
class PlainText:
    """Words between slots: escapes resolved, white space at both ends dropped, inside it kept."""

    text: str
    span: Span = field(default=_NOWHERE, compare=False, repr=False)

    def __str__(self) -> str:
        return _escape_plain(self.text)


@dataclass(frozen=True, slots=True)
class Group:
    """``( ... )*``: the items repeat once for each element of their columns' lists. Groups do not nest."""

    items: tuple[Slot | PlainText, ...]
    span: Span = field(default=_NOWHERE, compare=False, repr=False)

    def __str__(self) -> str:
        return f"({' '.join(str(item) for item in self.items)})*"


Node = Slot | PlainText | Group


@dataclass(frozen=True, slots=True)
class Instruction:
    """One alternative: ``source -> target``. ``text`` is the whole text that was parsed; every span points into it."""

    source: tuple[Node, ...]
    target: tuple[Node, ...]
    text: str = field(default="", compare=False, repr=False)
    span: Span = field(default=_NOWHERE, compare=False, repr=False)

    def __str__(self) -> str:
        sides = (" ".join(str(node) for node in side) for side in (self.source, self.target))
        return " -> ".join(sides).strip()

    @property
    def slots(self) -> tuple[Slot, ...]:
        """All slots, source first, those of repeated groups included, in reading order."""
        return tuple(_slots((*self.source, *self.target)))


def _slots(nodes: tuple[Node, ...]) -> Iterator[Slot]:
    for node in nodes:
        if isinstance(node, Slot):
            yield node
        elif isinstance(node, Group):
            yield from _slots(node.items)
