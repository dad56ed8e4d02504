"""A real browser for the page: Chromium without a window, driven by chromedriver over the WebDriver protocol.

WebDriver is JSON over HTTP; what the tests need of it stands here, so that no library is installed for them.
"""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
_SWITCHES = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
)
_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the protocol's key of an element

TAB, SHIFT, ENTER, SPACE = "\ue004", "\ue008", "\ue007", "\ue00d"


def missing() -> str | None:
    """Why there is no browser to test with."""
    if not any(map(shutil.which, _NAMES)):
        return "no Chromium is installed (Debian: apt install chromium chromium-driver)"
    if shutil.which("chromedriver") is None:
        return "chromedriver is not installed (Debian: apt install chromium-driver)"
    return None


class Browser:
    """One session of chromedriver."""

    def __init__(self, port: int, profile: Path) -> None:
        self._port, self._path = port, ""
        switches = [*_SWITCHES, f"--user-data-dir={profile}"]
        binary = next(path for path in map(shutil.which, _NAMES) if path is not None)
        options = {
            "goog:chromeOptions": {"args": switches, "binary": binary},
            "goog:loggingPrefs": {"browser": "ALL"},
        }
        made = self._call("POST", "/session", {"capabilities": {"alwaysMatch": options}})
        self._path = f"/session/{made['sessionId']}"

    def _call(self, method: str, path: str, body: Any = None) -> Any:
        connection = HTTPConnection("127.0.0.1", self._port, timeout=120)
        try:
            connection.request(method, self._path + path, None if body is None else json.dumps(body))
            response = connection.getresponse()
            value = json.loads(response.read())["value"]
        finally:
            connection.close()
        assert response.status == 200, f"{path}: {value['error']}: {value['message']}"
        return value

    def open(self, address: str) -> None:
        self._call("POST", "/url", {"url": address})

    def run(self, script: str, *arguments: Any) -> Any:
        """What the script returns, a promise's value too."""
        return self._call("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def find(self, selector: str) -> dict[str, str]:
        element: dict[str, str] = self._call("POST", "/element", {"using": "css selector", "value": selector})
        return element

    def click(self, selector: str) -> None:
        self._call("POST", f"/element/{self.find(selector)[_ELEMENT]}/click", {})

    def type(self, selector: str, text: str) -> None:
        """Types into a field; a path chooses a file."""
        self._call("POST", f"/element/{self.find(selector)[_ELEMENT]}/value", {"text": text})

    def clear(self, selector: str) -> None:
        self._call("POST", f"/element/{self.find(selector)[_ELEMENT]}/clear", {})

    def press(self, *keys: str) -> None:
        """Keys one after the other, wherever the focus is; a pair is a chord."""
        actions = []
        for key in keys:
            actions += [{"type": "keyDown", "value": one} for one in key]
            actions += [{"type": "keyUp", "value": one} for one in reversed(key)]
        self._call("POST", "/actions", {"actions": [{"type": "key", "id": "keys", "actions": actions}]})

    def text(self, selector: str) -> str:
        found: str = self.run("return document.querySelector(arguments[0]).textContent", selector)
        return found

    def focused(self) -> str:
        """The id of the element that has the focus."""
        found: str = self.run("return document.activeElement.id")
        return found

    def until(self, condition: Callable[[], Any], seconds: float = 60.0) -> Any:
        """The condition's first true value."""
        end = time.monotonic() + seconds
        while not (value := condition()):
            assert time.monotonic() < end, "it did not come true"
            time.sleep(0.02)
        return value

    def view(self, width: int, height: int, dark: bool = False) -> None:
        """The page's size in pixels, and what the reader prefers."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self._devtools("Emulation.setDeviceMetricsOverride", size)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self._devtools("Emulation.setEmulatedMedia", {"features": scheme})

    def _devtools(self, command: str, parameters: dict[str, Any]) -> Any:
        return self._call("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def complaints(self) -> list[str]:
        """What the page has written to the console since the last time."""
        return [entry["message"] for entry in self._call("POST", "/se/log", {"type": "browser"})]

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._call("GET", "/screenshot")))

    def close(self) -> None:
        self._call("DELETE", "")


@contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """A browser with a profile of its own in `folder`; it and its driver are gone afterwards."""
    command = ["chromedriver", "--port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as driver:
        try:
            assert driver.stdout is not None
            port = next(int(line.split()[-1].rstrip(".")) for line in driver.stdout if "successfully on port" in line)
            session = Browser(port, folder / "profile")
            try:
                yield session
            finally:
                session.close()
        finally:
            driver.terminate()
