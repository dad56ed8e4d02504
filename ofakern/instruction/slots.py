"""Reading one slot: `[MODALITY:name,attribute,key=value,...]`, white space anywhere between its parts."""

from __future__ import annotations

import re
from typing import NoReturn

from ofakern.instruction.modality import MODALITY_ALIASES, Modality
from ofakern.instruction.nodes import ESCAPABLE, Attribute, Slot, Span
from ofakern.instruction.render import close_match, instruction_error

__all__ = ["SlotReader"]

_SPACE = re.compile(r"\s*")
_WORD = re.compile(r"[A-Za-z0-9_]+")
_RUN = re.compile(r"[^\s,:=\[\]\"']+")
_BARE = re.compile(r"(?:(?!->|\|\|\|)[^\s,=\[\]\"'()*\\])+")
_NAMES = tuple(modality.name for modality in Modality)
# A Chinese keyboard's marks where ASCII ones are meant.
_ASCII_MARKS = {"：": ":", "，": ",", "＝": "=", "］": "]", "】": "]", "、": ",", "“": '"', "”": '"'}


class SlotReader:
    """Reads slots of one text; every error shows the whole text."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.pos = 0
        self.start = 0

    def read(self, start: int) -> tuple[Slot, int]:
        """The slot whose `[` stands at ``start``, and the place after its `]`."""
        self.start, self.pos = start, start + 1
        self.skip()
        modality, modality_span = self.modality()
        self.skip()
        name: str | None = None
        name_span = Span(self.pos, self.pos)
        if self.char() == ":":
            self.pos += 1
            self.skip()
            name, name_span = self.name(modality)
            self.skip()
        attributes: list[Attribute] = []
        while self.char() == ",":
            self.pos += 1
            self.skip()
            attributes.append(self.attribute(attributes))
            self.skip()
        if self.char() != "]":
            self.fail_expected(modality, name, attributes)
        self.pos += 1
        span = Span(start, self.pos)
        return Slot(modality, name, tuple(attributes), span, modality_span, name_span), self.pos

    def names_modality(self, place: int) -> bool:
        """Whether the word at ``place`` is a modality's name in any case."""
        word = _WORD.match(self.text, place)
        return word is not None and word.group().upper() in _NAMES

    # --- parts --------------------------------------------------------------------------------------------------

    def char(self) -> str:
        return self.text[self.pos : self.pos + 1]

    def skip(self) -> None:
        space = _SPACE.match(self.text, self.pos)
        self.pos = space.end() if space else self.pos

    def fail(self, span: Span, message: str, *, meant: str | None = None, hint: str | None = None) -> NoReturn:
        raise instruction_error(self.text, span, message, meant=meant, hint=hint)

    def take(self, pattern: re.Pattern[str]) -> tuple[str, Span] | None:
        found = pattern.match(self.text, self.pos)
        if found is None:
            return None
        self.pos = found.end()
        return found.group(), Span(*found.span())

    def modality(self) -> tuple[Modality, Span]:
        taken = self.take(_WORD)
        if taken is None:
            self.fail_no_modality()
        word, span = taken
        if word in _NAMES:
            return Modality[word], span
        upper = word.upper()
        if upper in _NAMES:
            self.fail(span, f"a modality must be written in upper case, got {word!r}", meant=repr(upper))
        alias = MODALITY_ALIASES.get(upper)
        near = alias.name if alias is not None else close_match(word, _NAMES)
        self.fail(
            span,
            f"modality must be one of {', '.join(_NAMES)}, got {word!r}",
            meant=repr(near) if near else None,
            hint=None if near else r"write \[ and \] for brackets in plain text",
        )

    def fail_no_modality(self) -> NoReturn:
        if self.char() == "[":
            self.fail(
                Span(self.pos, self.pos + 1),
                "a slot must begin with a modality, got another `[`",
                hint=r"write a repeated group as ([BOX:b] [TEXT:t])*, or \[ for a bracket in plain text",
            )
        self.check_closed()
        self.fail(
            Span(self.pos, self.pos + 1),
            f"a slot must begin with a modality ({', '.join(_NAMES)}), got {self.char()!r}",
            hint=r"[TEXT:name], or \[ for a bracket in plain text",
        )

    def name(self, modality: Modality) -> tuple[str, Span]:
        run = _RUN.match(self.text, self.pos)
        word = _WORD.match(self.text, self.pos)
        if run is None:
            self.check_closed()
            here = Span(self.pos, self.pos + 1)
            if self.char() in ("]", ","):
                self.fail(
                    here,
                    "a slot's name must not be empty after `:`",
                    hint=f"[{modality.name}:name], or [{modality.name}] for an unnamed slot",
                )
            self.fail(here, f"a slot's name must be made of A-Z a-z 0-9 _, got {self.char()!r}")
        if word is None or word.end() < run.end():
            self.fail_name(run.group(), word.end() if word else self.pos)
        self.pos = word.end()
        return word.group(), Span(*word.span())

    def fail_name(self, run: str, place: int) -> NoReturn:
        char = self.text[place]
        if char in _ASCII_MARKS:
            self.fail_mark(place)
        if self.text.startswith(("->", "|||"), place):
            self.check_closed()
        better = re.sub(r"[^A-Za-z0-9_]+", "_", run).strip("_")
        self.fail(
            Span(place, place + 1),
            f"a slot's name must be made of A-Z a-z 0-9 _, got {char!r}",
            meant=repr(better) if better else None,
        )

    def fail_mark(self, place: int) -> NoReturn:
        char = self.text[place]
        self.fail(
            Span(place, place + 1),
            f"a slot's marks must be ASCII `: , = ]`, got {char!r}",
            meant=repr(_ASCII_MARKS[char]),
        )

    def attribute(self, before: list[Attribute]) -> Attribute:
        taken = self.take(_WORD)
        if taken is None:
            self.check_closed()
            here = Span(self.pos, self.pos + 1)
            self.fail(
                here,
                f"an attribute must begin with its name, got {self.char()!r}",
                hint="`flag` or `key=value` after each comma, none after the last",
            )
        key, key_span = taken
        if any(attribute.key == key for attribute in before):
            self.fail(key_span, f"attribute {key!r} must be given once, got it twice", hint="keep one of them")
        value: str | None = None
        end = self.pos
        value_span = Span(end, end)
        self.skip()
        if self.char() == "=":
            self.pos += 1
            self.skip()
            value, value_span = self.value(key)
            end = self.pos
        return Attribute(key, value, Span(key_span.start, end), key_span, value_span)

    def value(self, key: str) -> tuple[str, Span]:
        if self.char() in ('"', "'"):
            return self.quoted()
        taken = self.take(_BARE)
        if taken is None:
            self.check_closed()
            here = Span(self.pos, self.pos + 1)
            if self.char() in ("]", ","):
                self.fail(
                    here, f"attribute {key!r} must have a value after `=`", hint=f'{key}=VALUE, or {key}="" for none'
                )
            self.fail_unquoted(here)
        if self.char() in ("=", "(", ")", "*", "\\", "'", '"'):
            self.fail_unquoted(Span(self.pos, self.pos + 1))
        return taken

    def fail_unquoted(self, here: Span) -> NoReturn:
        self.fail(
            here,
            f"a value that holds {self.text[here.start]} must stand in quotes",
            hint='key="value"; a backslash before a quote or a backslash inside',
        )

    def quoted(self) -> tuple[str, Span]:
        start, quote = self.pos, self.char()
        chars: list[str] = []
        self.pos += 1
        while self.char() != quote:
            if self.char() == "\\":
                self.pos += 1
                if self.char() not in ESCAPABLE:
                    got = repr(self.char()) if self.char() else "the end"
                    self.fail(
                        Span(self.pos - 1, min(self.pos + 1, len(self.text))),
                        f"a backslash must stand before a quote or a backslash, got {got}",
                        hint=r"write \\ for a backslash",
                    )
            if not self.char():
                self.fail(
                    Span(start, start + 1), f"a quoted value must end with {quote}, got the end of the instruction"
                )
            chars.append(self.char())
            self.pos += 1
        self.pos += 1
        return "".join(chars), Span(start, self.pos)

    # --- the end of a slot ----------------------------------------------------------------------------------------

    def check_closed(self) -> None:
        """Raises at the slot's `[` when nothing closes it before the next slot, the arrow or the end."""
        end = re.compile(r"\[|\]|->|\|\|\|").search(self.text, self.pos)
        if end is None or end.group() != "]":
            self.fail(
                Span(self.start, self.start + 1),
                "a slot must be closed by `]`, got none before the next slot, the arrow or the end",
                hint=r"add ], or write \[ for a bracket in plain text",
            )

    def fail_expected(self, modality: Modality, name: str | None, attributes: list[Attribute]) -> NoReturn:
        self.check_closed()
        char, here = self.char(), Span(self.pos, self.pos + 1)
        if char in _ASCII_MARKS:
            self.fail_mark(self.pos)
        run = _RUN.match(self.text, self.pos)
        if name is None and not attributes and char == "=":
            self.fail(here, "a slot's name must follow `:`, got `=`", meant="':'")
        if name is None and not attributes and run is not None:
            self.fail(
                here, f"`:` must stand before a slot's name, got {char!r}", meant=f"'[{modality.name}:{run.group()}]'"
            )
        if attributes:
            last = attributes[-1]
            hint = "a comma between attributes, quotes around a value that holds white space or marks"
            self.fail(here, f"`,` or `]` must follow attribute {last.key!r}, got {char!r}", hint=hint)
        better = f"{name}_{run.group()}" if run is not None and _WORD.fullmatch(run.group()) else None
        self.fail(
            here,
            f"`,` or `]` must follow the name {name!r}, got {char!r}",
            meant=repr(better) if better else None,
        )
