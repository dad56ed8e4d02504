"""The page at `/`: whole by itself, well formed; where node is there its script runs on a stand-in for a browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from scripted import ScriptedModel
from starlette.testclient import TestClient

from ofakern.plan import build_plan
from ofakern.serve import Engine
from ofakern.serve.app import create_app

PAGE = files("ofakern.serve").joinpath("page.html").read_text(encoding="utf-8")
SCRIPT = PAGE.partition("<script>")[2].partition("</script>")[0]
VOID = {"meta", "link", "input", "br", "img"}
needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")

# As much of a browser as the page uses; every element is made when it is asked for, as the page's own HTML has them.
BROWSER = """
const byId = new Map();
class Node_ {
  constructor(tag) { Object.assign(this, { tag, value: "", checked: false, disabled: false, textContent: "", files: [],
    children: [], dataset: {}, className: "", width: 0, height: 0, type: "", drawn: [], listeners: {} }); }
  set id(name) { this._id = name; byId.set(name, this); }
  get id() { return this._id; }
  append(...nodes) { this.children.push(...nodes); }
  replaceChildren(...nodes) { this.children = nodes; }
  addEventListener(name, call) { this.listeners[name] = call; }
  scrollIntoView() {}
  querySelectorAll() { return this.children.filter((one) => one.dataset.column !== undefined); }
  getContext() { const drawn = this.drawn; return { drawImage() { drawn.length = 0; },
    strokeRect(...box) { drawn.push(box); } }; }
}
for (const id of IDS) { const node = new Node_("div"); node.id = id; }
byId.get("stream").checked = true;
globalThis.document = { getElementById: (id) => byId.get(id) || null, createElement: (tag) => new Node_(tag) };
globalThis.Option = class extends Node_ { constructor(text, value) { super("option"); this.value = value; } };
globalThis.Image = class extends Node_ {
  set src(x) { this.naturalWidth = 40; this.naturalHeight = 32; this.onload(); } };
globalThis.URL.createObjectURL = () => "blob:x";
globalThis.FormData = class { constructor() { this.parts = []; } append(...part) { this.parts.push(part); } };
globalThis.fetch = async (address, options) => {
  if (address === "v1/tasks") return { json: async () => TASKS };
  sent = options.body.parts;
  if (REPLY === null) return { ok: false, json: async () => ({ error: { message: "it was refused" } }) };
  return new Response(REPLY);
};
let sent;
"""
DRIVE = """
(async () => {
  await new Promise((go) => setTimeout(go, 20));
  const field = (name) => byId.get("column-" + name);
  if (field("img")) { field("img").files = [{ name: "a.png" }]; field("img").listeners.change(); }
  if (field("q")) field("q").value = "which?";
  byId.get("answers").value = "red, green";
  await byId.get("form").listeners.submit({ preventDefault() {} });
  const canvas = byId.get("picture-img");
  process.stdout.write(JSON.stringify({ columns: byId.get("columns").children.map((one) => one.dataset.key || ""),
    request: JSON.parse(sent[0][1]), files: sent.slice(1).map((part) => part[0]), text: byId.get("text").textContent,
    error: byId.get("error").textContent, boxes: canvas ? canvas.drawn : [], asking: byId.get("ask").disabled }));
})();
"""


class Ids(HTMLParser):
    """Checks that elements close in order, and keeps their ids and addresses."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.ids += [str(value) for name, value in attrs if name == "id"]
        self.addresses += [str(value) for name, value in attrs if name in ("src", "href", "action")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def parsed() -> Ids:
    reader = Ids()
    reader.feed(PAGE)
    assert reader.open == []
    return reader


def test_the_page_is_whole_and_well_formed() -> None:
    reader = parsed()
    assert reader.addresses == ["data:,"]  # the icon: nothing is loaded from anywhere
    assert len(set(reader.ids)) == len(reader.ids)
    assert set(re.findall(r'\$\("([a-z]+)"\)', SCRIPT)) <= set(reader.ids)
    assert "http://" not in PAGE and "https://" not in PAGE and "innerHTML" not in SCRIPT


def test_it_is_served_with_a_policy_that_loads_nothing() -> None:
    with Engine(ScriptedModel()) as engine, TestClient(create_app(engine)) as client:
        response = client.get("/")
        assert response.text == PAGE and response.headers["content-type"].startswith("text/html")
        assert "default-src 'none'" in response.headers["content-security-policy"]


def drive(tmp_path: Path, task: dict[str, Any], reply: str | None) -> dict[str, Any]:
    """Opens the page, fills its fields, asks; what was sent and what is shown."""
    values = {"IDS": parsed().ids, "TASKS": {"tasks": [task]}, "REPLY": reply}
    head = "".join(f"const {name} = {json.dumps(value)};\n" for name, value in values.items())
    path = tmp_path / "page.js"
    path.write_text(head + BROWSER + SCRIPT.replace('"use strict";', "") + DRIVE, encoding="utf-8")
    result = subprocess.run(["node", str(path)], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


TASK = {
    "name": "grounding",
    "instruction": "[IMAGE:img] which region does [TEXT:q] describe? -> [BOX:box]",
    "inputs": [{"name": "img", "modality": "IMAGE"}, {"name": "q", "modality": "TEXT"}],
}
OUTPUT = {"text": None, "box": [1, 2, 30, 20], "boxes": [[1, 2, 30, 20]], "values": {"box": [1, 2, 30, 20]}}


@needs_node
def test_a_task_is_asked_and_its_box_drawn(tmp_path: Path) -> None:
    events = [{"event": "token", "text": "..", "tokens": 1, "answer": 0}, {"event": "done", "outputs": [OUTPUT]}]
    found = drive(tmp_path, TASK, "".join(json.dumps(one) + "\n" for one in events))
    assert [key for key in found["columns"] if key] == ["IMAGE:img", "TEXT:q"]
    assert found["request"] == {
        "instruction": TASK["instruction"],
        "generation": {},
        "stream": True,
        "closed_set": ["red", "green"],
        "data": {"q": "which?"},
    }
    assert found["files"] == ["img"] and found["boxes"] == [[1, 2, 29, 18]]
    assert found["text"] == "1.0, 2.0, 30.0, 20.0" and found["error"] == "" and not found["asking"]


@needs_node
def test_errors_are_shown(tmp_path: Path) -> None:
    found = drive(tmp_path, TASK, None)
    assert found["error"] == "it was refused" and found["text"] == "" and not found["asking"]
    token = json.dumps({"event": "token", "text": "the first", "tokens": 2, "answer": 0}) + "\n"
    event = {"event": "error", "error": {"message": "it failed on the way"}}
    assert drive(tmp_path, TASK, token + json.dumps(event) + "\n")["error"] == "it failed on the way"
    broken = drive(tmp_path, TASK, token)
    assert broken["text"] == "the first" and broken["error"] == "the answer broke off: the connection was lost"


@needs_node
@pytest.mark.parametrize(
    "instruction",
    [
        "[IMAGE:img] what does the image describe? -> [TEXT:cap]",
        "[IMAGE:img,adaptor=image_vit] [TEXT:q] -> [TEXT:head,no_loss] [TEXT:a,closed_set]",
        "[IMAGE:img] where are they? -> ([BOX:b] [TEXT:t])*",
        "[TEXT:a] -> [TEXT:b] ||| [TEXT:c] -> [TEXT:b]",
    ],
)
def test_the_page_finds_the_columns_that_the_plan_needs(tmp_path: Path, instruction: str) -> None:
    call = f"process.stdout.write(JSON.stringify(columnsOf({json.dumps(instruction)}).map((one) => one.name)));"
    names = SCRIPT.partition("function columnsOf")[2].partition("\nfunction ")[0]
    path = tmp_path / "columns.js"
    path.write_text(f"function columnsOf{names}\n{call}", encoding="utf-8")
    result = subprocess.run(["node", str(path)], capture_output=True, text=True, timeout=60, check=True)
    assert set(json.loads(result.stdout)) == set(
        build_plan(instruction.partition("|||")[0]).required_columns(training=False)
    )
