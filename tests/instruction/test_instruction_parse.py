"""Trees of well-formed instructions, and the round trip through their canonical text."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ofakern.errors import InstructionError, OfakernTypeError
from ofakern.instruction import Attribute, Group, Instruction, Modality, PlainText, Slot, parse

# Every instruction that OFASys documents for its tasks, and those of the recorded reference runs, as written there.
OFASYS = Path(__file__).with_name("ofasys_instructions.txt").read_text(encoding="utf-8").splitlines()


def one(text: str) -> Instruction:
    (instruction,) = parse(text)
    return instruction


def text_slot(name: str | None = "x", *attributes: Attribute) -> Slot:
    return Slot(Modality.TEXT, name, attributes)


def test_modality_numbers_are_those_of_ofasys_checkpoints() -> None:
    names = ["TEXT", "IMAGE", "BOX", "AUDIO", "MOTION", "PHONE", "VIDEO", "STRUCT", "CATEGORY"]
    assert [(m.name, m.value) for m in Modality] == [(name, place) for place, name in enumerate(names, 1)]


@pytest.mark.parametrize("text", OFASYS)
def test_ofasys_instructions_parse_and_survive_the_round_trip(text: str) -> None:
    instruction = one(text)
    assert one(str(instruction)) == instruction
    assert len(instruction.slots) == text.count("[")


def test_quotes_around_a_slot_are_plain_text() -> None:
    instruction = one('the text " [TEXT:src] "? -> [TEXT:x]')
    assert instruction.source == (PlainText('the text "'), text_slot("src"), PlainText('"?'))


def test_white_space_stands_anywhere_between_the_parts_of_a_slot() -> None:
    spaced = "\n [ TEXT\t: x , max_length = 3 ,\n no_loss , note = ' a b ' ]->[\u3000TEXT : y ] "
    attributes = (Attribute("max_length", "3"), Attribute("no_loss"), Attribute("note", " a b "))
    assert one(spaced) == Instruction((text_slot("x", *attributes),), (text_slot("y"),))


def test_repeated_group_with_plain_text_and_unnamed_slots() -> None:
    group = Group((PlainText("a"), Slot(Modality.BOX), PlainText("is (or was)"), text_slot(None)))
    assert one("->( a [BOX] is (or was) [TEXT] ) *").target == (group,)


def test_alternatives_keep_their_order_and_their_place() -> None:
    text = "a -> [TEXT:x] ||| [TEXT:y] -> [TEXT:x]"
    first, second = parse(text)
    assert str(first) == "a -> [TEXT:x]" and str(second) == "[TEXT:y] -> [TEXT:x]"
    assert text[slice(*second.slots[0].name_span)] == "y"


def test_escapes_take_the_meaning_away() -> None:
    text = r"\[a\] \-> \||| \(\* b) -\> \\ \" \' -> [TEXT:x,note='it\'s \"-> ] |||\"']"
    instruction = one(text)
    assert instruction.source == (PlainText("[a] -> ||| (* b) -> \\ \" '"),)
    assert instruction.target[0] == text_slot("x", Attribute("note", 'it\'s "-> ] |||"'))
    assert one(str(instruction)) == instruction


def test_plain_parentheses_need_no_escape() -> None:
    assert one("what (if any) :) -> [TEXT:x]").source == (PlainText("what (if any) :)"),)


def test_empty_source_is_a_language_model() -> None:
    assert one("-> [TEXT:x]") == Instruction((), (text_slot("x"),))


def test_one_name_on_both_sides_is_one_column() -> None:
    assert [slot.name for slot in one("[TEXT:x] -> [TEXT:x]").slots] == ["x", "x"]


def test_spans_point_into_the_text() -> None:
    text = 'go [IMAGE : img , adaptor = "image_vit"] on -> ([BOX:b] [TEXT:t])*'
    image, box, label = one(text).slots
    assert text[slice(*image.span)] == '[IMAGE : img , adaptor = "image_vit"]'
    assert text[slice(*image.modality_span)] == "IMAGE" and text[slice(*image.name_span)] == "img"
    assert text[slice(*image.attributes[0].key_span)] == "adaptor"
    assert text[slice(*image.attributes[0].value_span)] == '"image_vit"'
    assert text[slice(*box.name_span)] == "b" and text[slice(*label.span)] == "[TEXT:t]"
    assert [text[slice(*node.span)] for node in one(text).source] == ["go", str(text[3:40]), "on"]


def test_text_must_be_a_str() -> None:
    with pytest.raises(OfakernTypeError, match="parse: text must be a str, got int"):
        parse(3)  # type: ignore[arg-type]


def test_control_characters_never_break_the_message() -> None:
    for text in (
        "a \\\n -> [TEXT:x]",
        '[TEXT:a,note="\\\n"] -> [TEXT:x]',
        "[TEXT:\x00] -> [TEXT:x]",
        "[\x1b] -> [TEXT:x]",
    ):
        with pytest.raises(InstructionError) as caught:
            parse(text)
        lines = str(caught.value).split("\n")
        assert len(lines) <= 5 and "^" in lines[2] and not any(char < " " for line in lines for char in line)


# --- properties -------------------------------------------------------------------------------------------------------

MARKS = st.sampled_from(list("[]()*\\\"'->|,:=［【 \n") + ["->", "|||", "-->", "word", "图", "e\u0301"])
CHARACTERS = st.characters(exclude_categories=("Cs",))
PLAIN = (
    st.lists(MARKS | CHARACTERS, min_size=1, max_size=8)
    .map(lambda parts: "".join(parts).strip())
    .filter(bool)
    .map(PlainText)
)
NAMES = st.text("abz_09", min_size=1, max_size=4)
VALUES = st.none() | st.lists(MARKS | CHARACTERS, max_size=6).map("".join)


@st.composite
def slots(draw: st.DrawFn) -> Slot:
    modality = draw(st.sampled_from(Modality))
    name = draw(st.none() | NAMES)
    attributes = draw(st.lists(st.builds(Attribute, NAMES, VALUES), max_size=3, unique_by=lambda a: a.key))
    # The name carries its modality: one name may not have two.
    return Slot(modality, None if name is None else f"{modality.name}{name}", tuple(attributes))


def merged(nodes: list[Slot | PlainText | Group]) -> tuple[Slot | PlainText | Group, ...]:
    """Two plain texts never stand beside each other in a parsed tree."""
    return tuple(
        node
        for before, node in zip([None, *nodes], nodes, strict=False)
        if not (isinstance(before, PlainText) and isinstance(node, PlainText))
    )


def has_slot(nodes: tuple[Slot | PlainText | Group, ...]) -> bool:
    return any(not isinstance(node, PlainText) for node in nodes)


LEAVES = st.lists(slots() | PLAIN, max_size=4).map(merged)
GROUPS = LEAVES.filter(has_slot).map(Group)
SIDES = st.lists(slots() | PLAIN | GROUPS, max_size=4).map(merged)
TREES = st.lists(st.builds(Instruction, SIDES, SIDES.filter(has_slot)), min_size=1, max_size=2)


@settings(max_examples=200, deadline=None)
@given(TREES)
def test_every_tree_survives_the_round_trip(trees: list[Instruction]) -> None:
    assert parse(" ||| ".join(map(str, trees))) == tuple(trees)


@settings(max_examples=300, deadline=None)
@given(st.lists(MARKS | st.sampled_from(["TEXT", "[TEXT:x]", "([BOX:b])*", "text"]) | CHARACTERS, max_size=16))
def test_any_text_parses_to_a_stable_tree_or_raises_instruction_error(parts: list[str]) -> None:
    text = "".join(parts)
    try:
        trees = parse(text)
    except InstructionError as error:
        assert "^" in str(error).splitlines()[2]
        return
    assert parse(" ||| ".join(map(str, trees))) == trees
    assert sum(len(tree.slots) for tree in trees) <= text.count("[")
