"""The caret stands under its place in terminal columns, also in long and in Chinese instructions."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ofakern.errors import InstructionError
from ofakern.instruction import Span, close_match, display_width, parse
from ofakern.instruction.render import caret_lines


def under_caret(line: str, carets: str) -> str:
    """The characters of ``line`` that stand above the carets, measured in columns."""
    start, end = len(carets) - len(carets.lstrip(" ")), len(carets)
    column, found = 0, ""
    for char in line:
        if start <= column < end:
            found += char
        column += display_width(char)
    return found


@pytest.mark.parametrize(
    "before",
    [
        "",
        "what is it? ",
        "看图片，回答问题。",
        "cafe\u0301 ",
        "🙂 ok ",
        "a " * 200,
        "长" * 200,
        "two\nlines\tand a tab ",
    ],
)
@pytest.mark.parametrize("after", [" -> [TEXT:b]", " -> [TEXT:b] " + "后" * 200])
def test_caret_stands_under_the_wrong_word(before: str, after: str) -> None:
    with pytest.raises(InstructionError) as caught:
        parse(f"{before}[text:a]{after}")
    _, line, carets, meant = str(caught.value).splitlines()
    assert under_caret(line, carets) == "text"
    assert meant == "Did you mean 'TEXT'?"
    assert display_width(line) <= 98


def test_caret_after_the_end_of_a_long_text_is_shown() -> None:
    line, carets = caret_lines("x" * 300, Span(300, 300))
    assert line.startswith("...x") and line.endswith("x") and len(carets) == len(line) + 1


@given(st.text(max_size=200), st.integers(0, 200), st.integers(0, 30))
def test_caret_is_always_inside_the_shown_line(text: str, start: int, length: int) -> None:
    start = min(start, len(text))
    line, carets = caret_lines(text, Span(start, min(start + length, len(text))))
    assert carets.strip(" ") and set(carets.strip(" ")) == {"^"}
    assert "\n" not in line and display_width(line) <= 96
    assert len(carets) <= 98


def test_close_match_ignores_case_and_refuses_what_is_far() -> None:
    assert close_match("Closed_sett", ["closed_set", "no_loss"]) == "closed_set"
    assert close_match("banana", ["closed_set", "no_loss"]) is None
