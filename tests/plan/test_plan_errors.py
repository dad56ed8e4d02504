"""Every malformed instruction: its carets, its message, its suggestion; and the README that shows them."""

from __future__ import annotations

import pytest
import readme_sections
from error_cases import ATTRIBUTES, GRAMMAR, Case

from ofakern.errors import InstructionError, OfakernError
from ofakern.instruction import display_width, parse
from ofakern.plan import build_plan


@pytest.mark.parametrize("case", GRAMMAR + ATTRIBUTES, ids=lambda case: case.title)
def test_error_points_at_its_place(case: Case) -> None:
    lines = readme_sections.message(case).splitlines()
    assert lines[0].startswith("instruction: ") and case.message in lines[0]
    assert lines[1] == "  " + case.text
    before, marked = case.marked.split("»")[0].split("«")
    assert lines[2] == " " * (2 + display_width(before)) + "^" * max(1, display_width(marked))
    assert case.suggestion in "\n".join(lines[3:])
    assert all(line.startswith(("Did you mean ", "Try: ")) for line in lines[3:])


@pytest.mark.parametrize("case", GRAMMAR, ids=lambda case: case.title)
def test_the_parser_alone_refuses_bad_grammar(case: Case) -> None:
    with pytest.raises(InstructionError):
        parse(case.text)


def test_an_instruction_error_is_a_value_error() -> None:
    with pytest.raises(ValueError) as caught:
        build_plan("")
    assert isinstance(caught.value, OfakernError)


def test_readme_shows_every_error_and_attribute_as_they_are() -> None:
    text = readme_sections.README.read_text(encoding="utf-8")
    assert readme_sections.filled(text) == text, "run: python tests/plan/readme_sections.py"
