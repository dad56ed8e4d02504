"""Plans: merging, losses, generators, columns, availability, serialisation."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from subprocess import run

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ofakern.errors import (
    CheckpointError,
    InstructionError,
    OfakernRuntimeError,
    OfakernTypeError,
    OfakernValueError,
)
from ofakern.instruction import Instruction, Modality, PlainText, Slot, display_width, parse
from ofakern.modality.registry import SPECS
from ofakern.plan import Plan, PlanSlot, build_plan, build_plans

OFASYS = (
    (Path(__file__).parents[1] / "instruction" / "ofasys_instructions.txt").read_text(encoding="utf-8").splitlines()
)


def shape(plan: Plan) -> list[tuple[str, str, list[str]]]:
    return [(s.modality.name, s.adaptor, [slot.name or slot.text for slot in s.slots]) for s in plan.segments]


def generators(plan: Plan) -> list[tuple[str, bool, str, str]]:
    return [(slot.name or slot.text, slot.loss, slot.generator, slot.postprocess) for slot in plan.target_slots]


@pytest.mark.parametrize("text", OFASYS)
def test_ofasys_instructions_plan_the_same_from_their_canonical_text_and_from_json(text: str) -> None:
    plan = build_plan(text)
    assert build_plan(plan.instruction) == plan
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    assert hash(plan) == hash(Plan.from_dict(plan.to_dict()))
    assert [segment.index for segment in plan.segments] == list(range(len(plan.segments)))
    assert plan.criterion and plan.generator
    table = plan.table().splitlines()
    assert table[0] == plan.instruction and not any(line.endswith(" ") for line in table)


def test_text_like_slots_merge_and_images_stay_apart() -> None:
    plan = build_plan("[IMAGE:a] and [IMAGE:b] compare with [TEXT:q] now [PHONE:p] -> [TEXT:tgt]")
    assert shape(plan) == [
        ("IMAGE", "image_resnet", ["a"]),
        ("TEXT", "text", ["and"]),
        ("IMAGE", "image_resnet", ["b"]),
        ("TEXT", "text", ["compare with", "q", "now", "p"]),
        ("TEXT", "text", ["tgt"]),
    ]
    assert [segment.text_like for segment in plan.segments] == [False, True, False, True, True]
    assert [segment.side for segment in plan.segments] == ["source"] * 4 + ["target"]


def test_a_segment_has_its_first_slots_modality_and_each_slot_its_own_preprocessor() -> None:
    (segment,) = build_plan("[BOX:b] say [TEXT:q,preprocess=text_phone,uncased] -> [TEXT:t]").source
    assert segment.modality is Modality.BOX and segment.adaptor == "text"
    assert [slot.preprocess for slot in segment.slots] == ["box", "text", "text_phone"]
    assert segment.slots[2].flag("uncased") and not segment.slots[1].flag("uncased")


def test_known_text_of_the_target_has_no_loss_and_is_forced_at_its_head() -> None:
    plan = build_plan("[TEXT:a] -> is [TEXT:a,no_loss] it? [TEXT:b] or [TEXT:c]")
    assert generators(plan) == [
        ("is", False, "forced", ""),
        ("a", False, "forced", ""),
        ("it?", False, "forced", ""),
        ("b", True, "sequence", "text"),
        ("or", False, "separator", ""),
        ("c", True, "sequence", "text"),
    ]
    assert plan.criterion == "label_smoothed_cross_entropy" and plan.generator == "sequence"


def test_box_and_closed_set_say_what_they_may_generate() -> None:
    plan = build_plan("[IMAGE:img] where? -> [BOX:b] [TEXT:a,closed_set]")
    assert generators(plan) == [("b", True, "box", "box"), ("a", True, "closed_set", "text")]
    assert plan.closed_set and not build_plan("[TEXT:x] -> [TEXT:y]").closed_set
    assert not build_plan("[TEXT:x] -> [TEXT:y,closed_set=false]").closed_set
    assert "closed set of a" in plan.table()


def test_a_group_of_text_like_slots_stays_in_its_segment() -> None:
    plan = build_plan("[IMAGE:i] what? -> objects: ([BOX:b] is [TEXT:t])* end")
    (segment,) = plan.target
    assert segment.group is None
    runs = [(group, [slot.name or slot.text for slot in slots]) for group, slots in segment.runs()]
    assert runs == [(None, ["objects:"]), (0, ["b", "is", "t"]), (None, ["end"])]
    assert [slot.generator for slot in segment.slots] == ["forced", "box", "separator", "sequence", "separator"]


def test_known_text_in_a_group_is_not_the_prefix() -> None:
    plan = build_plan("[IMAGE:i] what? -> (a [TEXT:t])*")
    assert [slot.generator for slot in plan.target_slots] == ["separator", "sequence"]


def test_a_group_that_mixes_kinds_repeats_as_segments_of_its_own() -> None:
    plan = build_plan("look: ([IMAGE:i] is [TEXT:t])* ([TEXT:u])* so [IMAGE:j] is -> [TEXT:x]")
    assert [(names, s.group) for s, (_, _, names) in zip(plan.source, shape(plan), strict=False)] == [
        (["look:"], None),
        (["i"], 0),
        (["is", "t"], 0),
        (["u", "so"], None),
        (["j"], None),
        (["is"], None),
    ]
    assert plan.source[3].slots[0].group == 1


def test_columns() -> None:
    plan = build_plan("[IMAGE:img] [TEXT:q] -> [TEXT:q,no_loss] [TEXT:hint,no_loss] [TEXT:a]")
    assert plan.source_columns == ("img", "q") and plan.target_columns == ("q", "hint", "a")
    assert plan.required_columns(training=True) == ("img", "q", "hint", "a")
    assert plan.required_columns(training=False) == ("img", "q", "hint")
    assert "q, hint, a (optional at inference)" in plan.table()


def test_unnamed_slots_are_called_by_their_place() -> None:
    plan = build_plan("[IMAGE] what? -> ( [BOX] [TEXT])*")
    assert plan.source_columns == ("0",) and plan.target_columns == ("1", "2")


def test_a_box_counts_in_the_first_image_or_the_one_it_names() -> None:
    plan = build_plan("[IMAGE:a] [IMAGE:b] [BOX:x] -> [BOX:y,image=b]")
    assert [slot.image for slot in plan.slots if slot.modality is Modality.BOX] == ["a", "b"]


def test_defaults_follow_side_adaptor_and_preprocessor() -> None:
    def chosen(text: str) -> list[tuple[str, str]]:
        return [(slot.preprocess, slot.adaptor) for slot in build_plan(text).slots if not slot.plain]

    assert chosen("[IMAGE:a] -> [IMAGE:b]") == [("image", "image_resnet"), ("image_vqgan", "image_vqgan")]
    assert chosen("[AUDIO:a] -> [AUDIO:b]") == [("audio", "audio_fbank"), ("audio", "audio_fbank")]
    assert chosen("[TEXT:t] -> [IMAGE:a,adaptor=image_vqgan]")[1] == ("image_vqgan", "image_vqgan")
    assert chosen("[VIDEO:a] -> [MOTION:b]") == [("video", "video_image_sequence"), ("motion_6d", "motion_6d")]
    assert chosen("[IMAGE:a,preprocess=imagenet] -> [TEXT:t]")[0] == ("imagenet", "image_resnet")


def test_default_image_adaptor_fills_only_what_is_open() -> None:
    text = "[IMAGE:a] [IMAGE:b,adaptor=image_vit] [IMAGE:c,adaptor=image_resnet] -> [IMAGE:d]"
    plan = build_plan(text, default_image_adaptor="image_patch_embed")
    assert [s.adaptor for s in plan.segments] == ["image_patch_embed", "image_vit", "image_resnet", "image_vqgan"]
    with pytest.raises(OfakernValueError, match="default_image_adaptor must be one of image_resnet"):
        build_plan(text, default_image_adaptor="resnet")


def test_typed_attributes() -> None:
    plan = build_plan("[TEXT:a,max_length=12,mask_ratio=0.3,uncased,no_punctuation=false] -> [TEXT:b]")
    slot = plan.source[0].slots[0]
    assert slot.attributes == (("max_length", 12), ("mask_ratio", 0.3), ("uncased", True), ("no_punctuation", False))
    assert slot.attribute("max_length") == 12 and slot.attribute("noise_ratio", 0.0) == 0.0
    assert not slot.flag("no_punctuation")


@pytest.mark.parametrize("value", ["9" * 5000, "1_0", "nan", "inf", "1e999", "٣", "0x1", "' 1 '", "''"])
@pytest.mark.parametrize("key", ["max_length", "mask_ratio"])
def test_only_plain_decimal_numbers_are_numbers(key: str, value: str) -> None:
    with pytest.raises(InstructionError, match="must be a"):
        build_plan(f"[TEXT:a,{key}={value}] -> [TEXT:b]")


def test_the_table_is_aligned_in_terminal_columns() -> None:
    table = build_plan("看图片回答 [IMAGE:img] [TEXT:q] -> 答案是 [TEXT:a]").table()
    rows = [line for line in table.splitlines() if "  text  " in line or "  image_resnet" in line]
    cells = [re.split(r"(?:text|image)  +(?:text|image_resnet)", row)[0] for row in rows]
    assert len(rows) == 5 and len({display_width(cell) for cell in cells}) == 1


def test_bos_and_eos_go_around_text_groups_unless_told_otherwise() -> None:
    plan = build_plan("[IMAGE:i] say [TEXT:a,disable_auto_boseos] -> [TEXT:b]")
    assert [segment.auto_bos_eos for segment in plan.segments] == [False, False, True]


def test_attributes_without_effect_are_noted() -> None:
    assert "is_label changes nothing" in build_plan("[TEXT:q] -> [TEXT:a,is_label]").table()


RUNS_NOW = (
    "[AUDIO:wav] what is said? -> [TEXT:t]",
    "[PHONE:p] -> [AUDIO:a]",
    "[TEXT:t] -> [PHONE:p]",
    "[STRUCT:db,col_type=c:k:c] in words -> [TEXT:t]",
    "[VIDEO:v] what happens? -> [TEXT:cap]",
    "motion capture: [TEXT:t] -> [MOTION:m,preprocess=motion_6d,adaptor=motion_6d]",
    "[MOTION:m,max_length=60] what is it? -> [TEXT:t]",
    "[TEXT:t] -> [IMAGE:i,preprocess=image_vqgan,adaptor=image_vqgan]",
    "[IMAGE:img] [TEXT:q] what? -> it is [TEXT:a,closed_set]",
    "[IMAGE:img,adaptor=image_vit] what? -> ([BOX:b] [TEXT:t])*",
    "[IMAGE:img,adaptor=image_patch_embed] region: [BOX:b] -> [TEXT:t]",
)


@pytest.mark.parametrize("text", RUNS_NOW)
def test_what_runs_now(text: str) -> None:
    plan = build_plan(text)
    plan.require_available()
    assert "cannot run yet" not in plan.table()


@pytest.mark.parametrize(
    ("text", "slot"),
    [
        ("[AUDIO:wav,preprocess=audio_embed] what? -> [TEXT:t]", "[AUDIO:wav]"),
        ("[STRUCT:db,preprocess=database,max_length=8] -> [TEXT:t]", "[STRUCT:db,max_length=8]"),
        ("[IMAGE:i] -> [CATEGORY:c]", "[CATEGORY:c]"),
        ("[IMAGE:i,preprocess=imagenet] -> [TEXT:t]", "[IMAGE:i]"),
        ("[TEXT:q] -> [BOX:b]", "[BOX:b]"),
    ],
)
def test_what_cannot_run_yet_says_so(text: str, slot: str) -> None:
    plan = build_plan(text)
    with pytest.raises(OfakernRuntimeError) as caught:
        plan.require_available()
    assert f"slot {slot} " in str(caught.value) and "plan: " in str(caught.value)
    assert f"{slot}: " in plan.table()


def test_several_alternatives() -> None:
    first, second = build_plans("[TEXT:a] -> [TEXT:b] ||| again [TEXT:a] -> [TEXT:b]")
    assert first.instruction == "[TEXT:a] -> [TEXT:b]" and second.source[0].slots[0].text == "again"
    with pytest.raises(OfakernValueError, match=r"one alternative, got 2\nTry: build_plans"):
        build_plan("[TEXT:a] -> [TEXT:b] ||| again [TEXT:a] -> [TEXT:b]")


def test_instructions_as_trees() -> None:
    text = "say [TEXT:a] -> [TEXT:b]"
    made = Instruction((PlainText("say"), Slot(Modality.TEXT, "a")), (Slot(Modality.TEXT, "b"),))
    assert build_plan(made) == build_plan(parse(text)[0]) == build_plan(text)
    with pytest.raises(OfakernTypeError, match="str or an Instruction, got int"):
        build_plan(3)  # type: ignore[arg-type]


def test_errors_in_a_later_alternative_point_into_the_whole_text() -> None:
    with pytest.raises(InstructionError) as caught:
        build_plans("[TEXT:a] -> [TEXT:b] ||| [TEXT:a,colour] -> [TEXT:b]")
    _, line, carets = str(caught.value).splitlines()[:3]
    assert line[carets.index("^") :].startswith("colour]")


def broken(change: str) -> object:
    data = build_plan("[IMAGE:i] what? -> [TEXT:t,max_length=3]").to_dict()
    slot = data["target"][0]["slots"][0]
    if change == "version":
        data["version"] = 2
    elif change == "missing":
        del slot["loss"]
    elif change == "extra":
        data["source"][0]["more"] = 1
    elif change == "type":
        slot["loss"] = "yes"
    elif change == "modality":
        slot["modality"] = "SMELL"
    elif change == "adaptor":
        slot["adaptor"] = "nose"
    elif change == "attribute":
        slot["attributes"]["max_length"] = [3]
    elif change == "empty":
        data["target"][0]["slots"] = []
    elif change == "index":
        data["target"][0]["index"] = 7
    elif change == "side":
        data["target"][0]["side"] = "source"
    else:
        return [data]
    return data


@pytest.mark.parametrize(
    "change",
    ["version", "missing", "extra", "type", "modality", "adaptor", "attribute", "empty", "index", "side", "list"],
)
def test_data_that_is_no_plan_is_refused(change: str) -> None:
    with pytest.raises(CheckpointError, match=r"^plan: .* (must be|must have|must hold|must be numbered)"):
        Plan.from_dict(broken(change))


def test_plans_compare_by_content() -> None:
    plan = build_plan("[TEXT:a] -> [TEXT:b]")
    assert plan == build_plan(" [ TEXT : a ]->[TEXT:b]") and plan != build_plan("[TEXT:a] -> [TEXT:c]")
    slot = plan.target[0].slots[0]
    assert isinstance(slot, PlanSlot) and replace(slot, loss=False) != slot


def test_specs_are_consistent() -> None:
    assert set(SPECS) == set(Modality)
    for modality, spec in SPECS.items():
        assert spec.modality is modality and spec.default_preprocessor in spec.preprocessors
        assert spec.default_adaptor in spec.preprocessors[spec.default_preprocessor].adaptors
        assert spec.available or spec.note
        for name, one in spec.preprocessors.items():
            assert one.name == name and set(one.adaptors) <= set(spec.adaptors) and (one.available or one.note)
            for side in one.sides:
                assert any(side in spec.adaptors[adaptor].sides for adaptor in one.adaptors), (modality, name, side)
        for kind in (spec.preprocessors, spec.adaptors):
            assert all(key == value.name for one in kind.values() for key, value in one.attributes.items())
        for one, adaptor in product(spec.preprocessors.values(), spec.adaptors.values()):
            assert not set(one.attributes) & set(adaptor.attributes)


def test_planning_loads_no_tensors() -> None:
    code = "import sys, ofakern.plan; sys.exit('torch' in sys.modules)"
    assert run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0


KEYS = sorted({key for spec in SPECS.values() for one in spec.preprocessors.values() for key in one.attributes})
ATTRIBUTES = st.sampled_from([f",{key}{value}" for key in KEYS for value in ("", "=true", "=1", "=0.5", "=i")])
SLOT = st.builds(
    lambda modality, number, extra: f"[{modality.name}:{modality.name.lower()}{number}{extra}]",
    st.sampled_from(Modality),
    st.integers(0, 2),
    st.just("") | ATTRIBUTES,
)
PIECE = SLOT | st.sampled_from(["and", '"', "图"]) | st.builds(lambda a, b: f"({a} {b})*", SLOT, SLOT)
SIDE = st.lists(PIECE, max_size=4).map(" ".join)


@settings(max_examples=300, deadline=None)
@given(SIDE, SIDE)
def test_any_instruction_plans_or_raises_under_a_caret(source: str, target: str) -> None:
    try:
        plan = build_plan(f"{source} -> {target}")
    except InstructionError as error:
        assert "^" in str(error).splitlines()[2]
        return
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    assert build_plan(plan.instruction) == plan
    assert len(plan.slots) == sum(len(segment.slots) for segment in plan.segments)
    assert any(slot.loss for slot in plan.target_slots) and not any(s.loss for p in plan.source for s in p.slots)
    assert plan.instruction in plan.table()
