"""Text -> `Instruction`s. Recursive descent in one pass; README.md in this folder has the grammar.

`[`, `]`, `*`, `->`, `|||`, `\\` always have their meaning unless a backslash stands before them, and a parenthesis that
holds a slot is a repeated group: nothing that looks like structure is ever taken for plain text.
"""

from __future__ import annotations

import re
from typing import NoReturn

from ofakern.errors import OfakernTypeError
from ofakern.instruction.modality import Modality
from ofakern.instruction.nodes import ESCAPABLE, Group, Instruction, Node, PlainText, Slot, Span
from ofakern.instruction.render import instruction_error
from ofakern.instruction.slots import SlotReader

__all__ = ["parse"]

_ARROW = "->"
_OR = "|||"
_ARROW_LIKE = re.compile(r"=>|→|⇒|—>|–>|-\s+>|<-")
_GROUP_HINT = r"write \( for a parenthesis in plain text"


class _PlainBuffer:
    """Plain text being collected: resolved characters and where they came from."""

    def __init__(self) -> None:
        self.chars: list[str] = []
        self.places: list[int] = []

    def add(self, char: str, place: int) -> None:
        self.chars.append(char)
        self.places.append(place)

    def flush(self) -> PlainText | None:
        """The collected text without white space at its ends, or None when nothing else was there."""
        whole = "".join(self.chars)
        text = whole.strip()
        first = len(whole) - len(whole.lstrip())
        places = self.places[first : first + len(text)]
        self.chars, self.places = [], []
        return PlainText(text, Span(places[0], places[-1] + 1)) if text else None


class _Parser:
    """The state of one parse: the text, the place, and the modality every name has so far."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.pos = 0
        self.slots = SlotReader(text)
        self.modality_of: dict[str, Modality] = {}

    def fail(self, span: Span, message: str, *, meant: str | None = None, hint: str | None = None) -> NoReturn:
        raise instruction_error(self.text, span, message, meant=meant, hint=hint)

    def at(self, token: str) -> bool:
        return self.text.startswith(token, self.pos)

    def ended(self) -> bool:
        return self.pos >= len(self.text)

    # --- alternatives -------------------------------------------------------------------------------------------

    def templates(self) -> tuple[Instruction, ...]:
        found = [self.instruction()]
        while not self.ended():
            self.pos += len(_OR)
            found.append(self.instruction())
        return tuple(found)

    def instruction(self) -> Instruction:
        start = self.pos
        source = self.side()
        if not self.at(_ARROW):
            self.fail_no_arrow(start)
        arrow = Span(self.pos, self.pos + len(_ARROW))
        self.check_arrow(arrow)
        self.pos = arrow.end
        target = self.side()
        if self.at(_ARROW):
            self.fail(
                Span(self.pos, self.pos + len(_ARROW)),
                "an instruction must have one `->`, got a second one",
                hint=r"write \-> for an arrow in plain text, or ||| between two alternatives",
            )
        if not any(isinstance(node, Slot | Group) for node in target):
            self.fail_empty_target(target, arrow)
        return Instruction(source, target, self.text, Span(start, self.pos))

    def fail_no_arrow(self, start: int) -> NoReturn:
        body = self.text[start : self.pos]
        if not body.strip():
            self.fail(
                Span(self.pos, self.pos),
                "an instruction must have the form `source -> target`, got nothing",
                hint="[IMAGE:img] what does the image describe? -> [TEXT:cap]",
            )
        like = _ARROW_LIKE.search(body)
        span = Span(start + like.start(), start + like.end()) if like else Span(start + len(body.rstrip()), self.pos)
        self.fail(
            span,
            "an instruction must have one `->` between source and target, got none",
            meant="'->'" if like else None,
            hint=None if like else "end it with `-> [TEXT:answer]`",
        )

    def check_arrow(self, arrow: Span) -> None:
        start, end = arrow
        while start > 0 and self.text[start - 1] in "-=<" and self.text[start - 2 : start - 1] != "\\":
            start -= 1
        while self.text[end : end + 1] == ">":
            end += 1
        if (start, end) != arrow:
            self.fail(
                Span(start, end),
                f"the arrow must be written ->, got {self.text[start:end]}",
                meant="'->'",
                hint="put white space between the arrow and plain text",
            )

    def fail_empty_target(self, target: tuple[Node, ...], arrow: Span) -> NoReturn:
        span = Span(target[0].span.start, target[-1].span.end) if target else arrow
        got = "only plain text" if target else "nothing"
        self.fail(span, f"the target must hold at least one slot, got {got}", hint="-> [TEXT:answer]")

    # --- one side -----------------------------------------------------------------------------------------------

    def side(self) -> tuple[Node, ...]:
        """Nodes up to `->`, `|||` or the end, which stay unread."""
        nodes: list[Node] = []
        plain = _PlainBuffer()
        parens: list[int] = []
        while not self.ended() and not self.at(_ARROW) and not self.at(_OR):
            if self.at("(") and self.holds_slot():
                self.append(nodes, plain.flush())
                nodes.append(self.group())
            else:
                self.item(nodes, plain, parens)
        self.append(nodes, plain.flush())
        self.check_pipes()
        return tuple(nodes)

    def check_pipes(self) -> None:
        end = self.pos
        while self.text[end : end + 1] == "|":
            end += 1
        if end - self.pos > len(_OR):
            self.fail(Span(self.pos, end), f"alternatives must be separated by |||, got {self.text[self.pos : end]}")

    @staticmethod
    def append(nodes: list[Node], plain: PlainText | None) -> None:
        if plain is not None:
            nodes.append(plain)

    def item(self, nodes: list[Node], plain: _PlainBuffer, parens: list[int]) -> None:
        """One slot, or one character of plain text; ``parens`` holds the places of its open plain parentheses."""
        char, here = self.text[self.pos], Span(self.pos, self.pos + 1)
        if char == "[":
            self.append(nodes, plain.flush())
            nodes.append(self.slot())
            return
        if char == "\\":
            char = self.escaped()
        elif char == "]":
            self.fail(
                here, "a `]` must close a slot, got one without `[`", hint=r"write \] for a bracket in plain text"
            )
        elif char == "*":
            self.fail_star(here)
        elif char in "［【" and self.slots.names_modality(self.pos + 1):
            self.fail(here, f"a slot must begin with [, got {char}", meant="'['", hint=f"write \\{char} for plain text")
        elif char == "(":
            parens.append(self.pos)
        elif char == ")":
            self.close_plain(parens)
        plain.add(char, here.start)
        self.pos += 1

    def escaped(self) -> str:
        """The character after the backslash; the place moves on to it."""
        char = self.text[self.pos + 1 : self.pos + 2]
        if char not in ESCAPABLE:
            got = repr(char) if char else "the end"
            self.fail(
                Span(self.pos, min(self.pos + 2, len(self.text))),
                f"a backslash must stand before one of [ ] ( ) * \\ ' \" -> |||, got {got}",
                hint=r"write \\ for a backslash",
            )
        self.pos += 1
        return char

    def close_plain(self, parens: list[int]) -> None:
        start = parens.pop() if parens else None
        star = re.compile(r"\s*\*").match(self.text, self.pos + 1)
        if star is None:
            return
        if start is None:
            self.fail(Span(self.pos, star.end()), "`)*` must close a repeated group, got one without `(`")
        self.fail(
            Span(start, star.end()),
            "a repeated group must hold at least one slot, got only plain text",
            hint=r"write \* for a star in plain text",
        )

    def fail_star(self, here: Span) -> NoReturn:
        before = self.text[: self.pos].rstrip()
        hint = r"write \* for a star in plain text"
        if before.endswith("]") and not before.endswith("\\]"):
            slot = before[before.rfind("[") :]
            hint = f"({slot})* repeats the slot; {hint}"
        self.fail(here, "`*` must follow a repeated group ( ... ), got one without a group", hint=hint)

    # --- groups -------------------------------------------------------------------------------------------------

    def holds_slot(self) -> bool:
        """Whether a slot begins before the parenthesis at this place closes (or the side ends)."""
        depth, place = 1, self.pos + 1
        while place < len(self.text) and depth > 0:
            if self.text.startswith((_ARROW, _OR), place):
                return False
            char = self.text[place]
            if char == "[":
                return True
            if char == "\\":
                place += 1
            depth += {"(": 1, ")": -1}.get(char, 0)
            place += 1
        return False

    def group(self) -> Group:
        start = self.pos
        self.pos += 1
        nodes: list[Node] = []
        plain = _PlainBuffer()
        parens: list[int] = []
        while not self.at(")") or parens:
            if self.ended() or self.at(_ARROW) or self.at(_OR):
                self.fail(
                    Span(start, start + 1),
                    "a repeated group must be closed by `)*`, got no `)` on this side",
                    hint=_GROUP_HINT,
                )
            if self.at("(") and self.holds_slot():
                self.fail(
                    Span(self.pos, self.pos + 1),
                    "a repeated group must not stand inside another one",
                    hint=f"close the first group with )* before it, or {_GROUP_HINT}",
                )
            self.item(nodes, plain, parens)
        self.append(nodes, plain.flush())
        closing = re.compile(r"\)\s*\*?").match(self.text, self.pos)
        if closing is None or not closing.group().endswith("*"):
            self.fail(
                Span(self.pos, self.pos + 1),
                "a parenthesis around a slot must be a repeated group `( ... )*`, got no `*`",
                hint=f"add *, or {_GROUP_HINT}",
            )
        self.pos = closing.end()
        items = tuple(node for node in nodes if not isinstance(node, Group))
        return Group(items, Span(start, self.pos))

    # --- slots --------------------------------------------------------------------------------------------------

    def slot(self) -> Slot:
        slot, self.pos = self.slots.read(self.pos)
        if slot.name is not None:
            first = self.modality_of.setdefault(slot.name, slot.modality)
            if first is not slot.modality:
                self.fail(
                    slot.modality_span,
                    f"name {slot.name!r} must have one modality, got {slot.modality.name} after {first.name}",
                    hint=f"[{first.name}:{slot.name}], or another name",
                )
        return slot


def parse(text: str) -> tuple[Instruction, ...]:
    """The instruction's alternatives, one for each part between ``|||``.

    Checks the grammar: modalities, names, brackets, groups, arrows. Attributes are typed by `ofakern.plan.build_plan`,
    which knows what each modality accepts.

    Raises InstructionError (a caret under the place, a suggestion where one is near) and OfakernTypeError when ``text``
    is not a str.
    """
    if not isinstance(text, str):
        raise OfakernTypeError(f"parse: text must be a str, got {type(text).__name__}")
    return _Parser(text).templates()
