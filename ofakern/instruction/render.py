"""Error text for instructions: the place under a caret, with the columns a terminal really uses."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from difflib import get_close_matches

from ofakern.errors import InstructionError
from ofakern.instruction.nodes import Span

__all__ = ["caret_lines", "char_width", "close_match", "display_width", "instruction_error", "pad"]

_LINE_WIDTH = 96
_ELLIPSIS = "..."


def char_width(char: str) -> int:
    """Terminal columns of one code point: 2 for wide (Chinese, emoji), 0 for combining marks and joiners, else 1."""
    if unicodedata.category(char) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(char) in ("W", "F") else 1


def display_width(text: str) -> int:
    """Terminal columns of ``text``."""
    return sum(map(char_width, text))


def pad(text: str, width: int) -> str:
    """``text`` filled with blanks to ``width`` terminal columns."""
    return text + " " * (width - display_width(text))


def _window(widths: list[int], start: int, end: int) -> tuple[int, int]:
    """The code points to show: all when they fit, else a stretch that holds ``start`` and what fits around it."""
    if sum(widths) <= _LINE_WIDTH:
        return 0, len(widths)
    budget = _LINE_WIDTH - 2 * len(_ELLIPSIS)
    focus = min(sum(widths[start:end]), budget // 2)
    first, room = start, (budget - focus) // 2
    while first > 0 and widths[first - 1] <= room:
        first -= 1
        room -= widths[first]
    last, room = first, budget
    while last < len(widths) and widths[last] <= room:
        room -= widths[last]
        last += 1
    while first > 0 and widths[first - 1] <= room:
        first -= 1
        room -= widths[first]
    return first, last


def caret_lines(text: str, span: Span) -> tuple[str, str]:
    """The text around ``span`` on one line (control characters as blanks) and the line of carets that goes under it."""
    shown = "".join(" " if unicodedata.category(char) in ("Cc", "Zl", "Zp") else char for char in text)
    widths = [char_width(char) for char in shown]
    first, last = _window(widths, span.start, span.end)
    before = _ELLIPSIS if first > 0 else ""
    after = _ELLIPSIS if last < len(shown) else ""
    column = len(before) + sum(widths[first : span.start])
    carets = max(1, sum(widths[span.start : min(span.end, last)]))
    return (before + shown[first:last] + after).rstrip(), " " * column + "^" * carets


def close_match(word: str, known: Iterable[str]) -> str | None:
    """The one of ``known`` that ``word`` most likely means (case does not matter), or None when nothing is near."""
    lowered = {name.lower(): name for name in known}
    near = get_close_matches(word.lower(), lowered, n=1, cutoff=0.6)
    return lowered[near[0]] if near else None


def instruction_error(
    text: str, span: Span, message: str, *, meant: str | None = None, hint: str | None = None
) -> InstructionError:
    """An error whose message shows ``text`` with carets under ``span``, then the suggestion and the remedy."""
    line, carets = caret_lines(text, span)
    lines = [f"instruction: {message}", f"  {line}", f"  {carets}"]
    if meant is not None:
        lines.append(f"Did you mean {meant}?")
    if hint is not None:
        lines.append(f"Try: {hint}")
    return InstructionError("\n".join(lines))
