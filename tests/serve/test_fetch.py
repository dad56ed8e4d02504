"""URLs: public addresses only, redirects through the same checks, limits on bytes and time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from ofakern.serve import fetch as module
from ofakern.serve.errors import RequestError
from ofakern.serve.fetch import fetch

PLACES = {
    "/ok": (200, b"content", None),
    "/moved": (302, b"", "/ok"),
    "/ring": (302, b"", "/ring"),
    "/inside": (302, b"", "http://10.0.0.1/secret"),
    "/script": (302, b"", "file:///etc/passwd"),
    "/missing": (404, b"", None),
    "/large": (200, b"x" * 5000, None),
}


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/slow":
            self.server.slow.wait(5)  # type: ignore[attr-defined]
            return
        status, content, location = PLACES[self.path]
        self.send_response(status)
        if location:
            self.send_header("Location", location)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A server on this machine that counts as public; every other address is judged as always."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.slow = threading.Event()  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    judge = module._public_address
    monkeypatch.setattr(module, "_public_address", lambda h, p, w: h if h == "127.0.0.1" else judge(h, p, w))
    yield f"http://127.0.0.1:{server.server_port}"
    server.slow.set()  # type: ignore[attr-defined]
    server.shutdown()
    server.server_close()


def code(address: str, most: int = 1000, seconds: float = 5.0) -> int:
    with pytest.raises(RequestError) as caught:
        fetch(address, "request: column 'img'", most=most, seconds=seconds)
    return caught.value.status


def test_content_comes_and_redirects_are_followed(site: str) -> None:
    assert fetch(f"{site}/ok", "x", most=100, seconds=5) == b"content"
    assert fetch(f"{site}/moved", "x", most=100, seconds=5) == b"content"


@pytest.mark.parametrize(
    ("place", "status"), [("/ring", 422), ("/inside", 422), ("/script", 422), ("/missing", 422), ("/large", 413)]
)
def test_what_is_refused_on_the_way(site: str, place: str, status: int) -> None:
    assert code(site + place) == status


def test_time_is_bounded(site: str) -> None:
    assert code(f"{site}/slow", seconds=0.2) == 422


@pytest.mark.parametrize(
    "address",
    [
        "http://127.0.0.1/",
        "http://localhost/",
        "http://10.1.2.3/",
        "http://192.168.0.1/",
        "http://169.254.169.254/latest/meta-data",
        "http://[::1]/",
        "http://[::ffff:127.0.0.1]/",
        "http://0.0.0.0/",
        "http://224.0.0.1/",
        "http://2130706433/",
        "ftp://example.com/",
        "file:///etc/passwd",
        "http://",
        "http://user:pw@example.com/",
        "http://example.com:99999/",
        "http://example.com/a b",
        "http://example.com/\r\nHost: x",
        "http://[::1",
        "http://" + "a" * 3000,
    ],
)
def test_private_addresses_and_other_schemes_are_refused(address: str) -> None:
    assert code(address) == 422
