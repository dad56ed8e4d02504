"""The page in a real browser: asked, watched as it streams, stopped, refused; by mouse and keyboard, small and dark."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import browser
import pytest
from browser import ENTER, SHIFT, SPACE, TAB, Browser
from site_model import ROWS, png, served

from ofakern.checkpoint import GeneralistModel
from ofakern.serve import Engine
from ofakern.serve.app import create_app

pytestmark = pytest.mark.skipif(browser.missing() is not None, reason=str(browser.missing()))
CONTROL = "\ue009"

# The least contrast of the page's words with what is behind them, by WCAG's formula; opacity included.
CONTRAST = """
const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
const light = (rgb) => { const [r, g, b] = rgb.map((x) => x / 255)
  .map((x) => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
const behind = (node) => { for (; node; node = node.parentElement) {
  const [r, g, b, a = 1] = numbers(getComputedStyle(node).backgroundColor); if (a > 0) return [r, g, b]; } };
const found = {};
for (const node of document.querySelectorAll(
    "h1, label, select, input, textarea, button:enabled, #error, #text, #time")) {
  let share = 1;
  for (let at = node; at; at = at.parentElement) share *= Number(getComputedStyle(at).opacity);
  const ground = behind(node), ink = numbers(getComputedStyle(node).color).slice(0, 3);
  const [a, b] = [light(ink.map((x, n) => share * x + (1 - share) * ground[n])), light(ground)];
  found[node.id || node.textContent] = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
}
return found;
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser.browser(tmp_path_factory.mktemp("browser")) as session:
        yield session


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("pictures") / "scene.png"
    path.write_bytes(png(ROWS[0]["img"]))
    return str(path)


class Gate:
    """Once shut, every step of a search waits for its `release`."""

    def __init__(self) -> None:
        self._steps, self.is_open = threading.Semaphore(0), threading.Event()
        self.is_open.set()

    def release(self) -> None:
        self._steps.release()

    def wait(self) -> None:
        end = time.monotonic() + 120
        while not self.is_open.is_set() and not self._steps.acquire(timeout=0.02):
            assert time.monotonic() < end, "nobody has released this step"


class GatedSession:
    def __init__(self, session: Any, gate: Gate) -> None:
        self._session, self._gate = session, gate

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def step(self) -> Any:
        self._gate.wait()
        return self._session.step()


@pytest.fixture
def gate(model: GeneralistModel, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """Of the model's searches; it is opened before the engine is asked to stop."""
    gate, session = Gate(), model.search_session
    monkeypatch.setattr(model, "search_session", lambda: GatedSession(session(), gate))
    yield gate
    gate.is_open.set()


@pytest.fixture
def engine(model: GeneralistModel) -> Iterator[Engine]:
    with Engine(model) as engine:
        yield engine


@pytest.fixture
def opened(page: Browser, engine: Engine) -> Iterator[Browser]:
    with served(create_app(engine)) as port:
        page.view(1100, 900)
        page.open(f"http://127.0.0.1:{port}/")
        page.until(lambda: page.run("return document.querySelectorAll('#columns input').length"))
        yield page
        page.open("about:blank")


def choose(page: Browser, task: str) -> None:
    page.click(f"#task option[value={task}]")


def ended(page: Browser) -> str:
    """Waits for the answer; its words."""
    page.until(lambda: page.run("return !document.getElementById('ask').disabled"))
    return page.text("#text")


def moved_on(page: Browser, before: str) -> bool:
    return bool(page.text("#text") != before or page.run("return document.getElementById('stop').disabled"))


def test_an_answer_comes_token_by_token(opened: Browser, gate: Gate, picture: str, model: GeneralistModel) -> None:
    wanted = model.inference("caption", {"img": ROWS[0]["img"]}, num_beams=1).text
    choose(opened, "caption")
    opened.type("#column-img", picture)
    opened.type("#beams", "1")
    gate.is_open.clear()
    opened.click("#ask")
    assert opened.focused() == "stop" and opened.text("#time").startswith("working, ")
    seen = {""}
    while not opened.run("return document.getElementById('stop').disabled"):
        gate.release()
        opened.until(partial(moved_on, opened, max(seen, key=len)))
        seen.add(opened.text("#text"))
    assert len(seen) > 3 and all(wanted.startswith(part) for part in seen)
    assert ended(opened) == wanted and opened.focused() == "ask"
    assert wanted in opened.text("#json") and not opened.run("return document.getElementById('whole').hidden")
    assert opened.text("#error") == "" and opened.complaints() == []


def test_a_box_is_drawn_on_the_picture(opened: Browser, picture: str, model: GeneralistModel) -> None:
    choose(opened, "grounding")
    opened.type("#column-img", picture)
    opened.type("#column-name", ROWS[0]["name"] + ENTER)
    words = ended(opened)
    wanted = model.inference("grounding", {name: ROWS[0][name] for name in ("img", "name")}).box
    assert [float(x) for x in words.split(", ")] == pytest.approx(wanted, abs=0.051)
    marked = """
        const canvas = document.querySelector("canvas"), {width, height} = canvas;
        const data = canvas.getContext("2d").getImageData(0, 0, width, height).data, rows = new Set();
        for (let n = 0; n < width * height; n++)
          if ([0xe6, 0x19, 0x4b].every((x, c) => data[4 * n + c] === x)) rows.add(Math.floor(n / width));
        return [width, height, rows.size];"""
    width, height, rows = opened.run(marked)
    assert (width, height) == ROWS[0]["img"].size and rows >= 10


def test_stop_ends_the_search(opened: Browser, gate: Gate, picture: str, engine: Engine) -> None:
    opened.type("#column-img", picture)
    gate.is_open.clear()
    opened.click("#ask")
    opened.until(lambda: engine.running)
    opened.press(SPACE)  # the focus is on Stop
    assert ended(opened) == "" and opened.text("#time").startswith("stopped after ")
    gate.is_open.set()
    opened.until(lambda: not engine.running)
    assert opened.focused() == "ask" and opened.text("#error") == ""


def test_a_mistake_is_shown_and_what_was_typed_stays(opened: Browser) -> None:
    opened.clear("#instruction")
    opened.type("#instruction", "[IMAGE:img] what -> [TEXT:")
    assert opened.run("return document.getElementById('task').value") == ""
    opened.press(CONTROL + ENTER)
    error = opened.until(lambda: opened.text("#error"))
    assert "must be closed by `]`" in error and "^" in error
    assert opened.run("return document.getElementById('error').role") == "alert"
    assert opened.focused() == "instruction" and opened.text("#text") == ""
    opened.complaints()  # the 422


def test_a_server_that_is_gone_is_told(page: Browser, model: GeneralistModel, picture: str) -> None:
    with Engine(model) as engine, served(create_app(engine)) as port:
        page.open(f"http://127.0.0.1:{port}/")
        page.until(lambda: page.run("return document.querySelectorAll('#columns input').length"))
    page.type("#column-img", picture)
    page.click("#ask")
    assert page.until(lambda: page.text("#error")) == "the server cannot be reached"
    page.complaints()


def test_the_keyboard_reaches_everything_in_order(opened: Browser) -> None:
    opened.run("document.getElementById('task').focus()")
    order = []
    for _ in range(7):
        opened.press(TAB)
        order.append(opened.focused())
    assert order == ["instruction", "column-img", "beams", "longest", "answers", "stream", "ask"]
    opened.press(SHIFT + TAB)
    assert opened.focused() == "stream"
    assert opened.run("return getComputedStyle(document.activeElement).outlineStyle") != "none"


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [320, 1100])
def test_all_fits_and_can_be_read(opened: Browser, width: int, dark: bool, picture: str, tmp_path: Path) -> None:
    opened.view(width, 700, dark)
    choose(opened, "grounding")
    opened.type("#column-img", picture)
    opened.run("for (const id of ['error', 'text', 'time']) document.getElementById(id).textContent = 'x'.repeat(200)")
    assert opened.run("return document.documentElement.scrollWidth <= innerWidth")
    field = opened.run("const {clientHeight, scrollHeight} = instruction; return [clientHeight, scrollHeight]")
    assert field[0] >= field[1]  # all of the instruction shows
    contrast = opened.run(CONTRAST)
    assert len(contrast) > 12 and min(contrast.values()) >= 4.5, contrast
    opened.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 1000
