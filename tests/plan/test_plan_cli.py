"""`ofakern plan`."""

from __future__ import annotations

import json

import pytest

from ofakern.cli.main import main
from ofakern.plan import Plan, build_plan

CAPTION = "[IMAGE:img] what does the image describe? -> [TEXT:cap]"
TABLE = """\
[IMAGE:img] what does the image describe? -> [TEXT:cap]

side    segment  slot                             preprocess  adaptor       loss  generator  postprocess
------  -------  -------------------------------  ----------  ------------  ----  ---------  -----------
source  0 IMAGE  [IMAGE:img]                      image       image_resnet  -     -          -
source  1 TEXT   "what does the image describe?"  text        text          -     -          -
target  2 TEXT   [TEXT:cap]                       text        text          yes   sequence   text

criterion       label_smoothed_cross_entropy
generator       sequence
source columns  img
target columns  cap (optional at inference)
"""


def test_prints_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", CAPTION]) == 0
    assert capsys.readouterr().out == TABLE


def test_json_is_the_serialised_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", CAPTION, "--json", "--image-adaptor", "image_vit"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert Plan.from_dict(data) == build_plan(CAPTION, default_image_adaptor="image_vit")


def test_alternatives_are_a_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", f"{CAPTION} ||| {CAPTION}", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 2
    assert main(["plan", f"{CAPTION} ||| {CAPTION}"]) == 0
    assert capsys.readouterr().out == TABLE + "\n" + TABLE


def test_a_wrong_instruction_exits_2_with_the_caret_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "看图 [IMG:img] what? -> [TEXT:cap]"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    _, line, carets, meant = printed.err.splitlines()
    assert line == "  看图 [IMG:img] what? -> [TEXT:cap]"
    assert carets == " " * 8 + "^^^" and meant == "Did you mean 'IMAGE'?"
    assert "\x1b" not in printed.err


def test_an_instruction_that_begins_with_the_arrow(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "-> [TEXT:t]"]) == 0
    assert main(["plan", "--", "->[TEXT:t]"]) == 0
    assert capsys.readouterr().out.count("source columns  none") == 2
