"""Fetching a URL for a stranger: only http and https, only public addresses, few redirects, a limit on bytes and time.

Every host name is resolved here and the connection is made to the very address that was checked, so a name that
resolves to something else a moment later changes nothing. Redirects go through the same checks.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import time
from urllib.parse import SplitResult, urljoin, urlsplit

from ofakern.serve.errors import RequestError

__all__ = ["fetch"]

_REDIRECTS = 3
_CHUNK = 65536


def fetch(address: str, where: str, *, most: int, seconds: float) -> bytes:
    """The content of a URL, at most `most` bytes in at most `seconds` s. Raises RequestError (422, 413)."""
    end = time.monotonic() + seconds
    for _ in range(_REDIRECTS + 1):
        parts = _checked(address, where)
        try:
            found = _get(parts, where, most, end)
        except (OSError, http.client.HTTPException, ValueError) as error:
            if isinstance(error, RequestError):
                raise
            raise RequestError(422, f"{where} must be a URL that answers, got {type(error).__name__}") from error
        if isinstance(found, bytes):
            return found
        address = urljoin(address, found)
    raise RequestError(422, f"{where} must be a URL with at most {_REDIRECTS} redirects, got more")


def _checked(address: str, where: str) -> SplitResult:
    try:
        parts = urlsplit(address)
        parts.port  # noqa: B018  (it is parsed when it is read)
    except ValueError as error:
        raise RequestError(422, f"{where} must be a URL, got {address[:80]!r}") from error
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or len(address) > 2048:
        raise RequestError(422, f"{where} must be an http or https URL, got {address[:80]!r}")
    if any(ord(letter) <= 32 or ord(letter) > 126 for letter in address):
        raise RequestError(422, f"{where} must be a URL without blanks, got {address[:80]!r}")
    return parts


def _get(parts: SplitResult, where: str, most: int, end: float) -> bytes | str:
    """The content, or where a redirect leads."""
    host, secure = parts.hostname or "", parts.scheme == "https"
    port = parts.port or (443 if secure else 80)
    connection = _connect(host, port, secure, where, end)
    try:
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request("GET", path, headers={"User-Agent": "ofakern", "Accept-Encoding": "identity"})
        response = connection.getresponse()
        if response.status in (301, 302, 303, 307, 308):
            return response.getheader("Location") or ""
        if response.status != 200:
            raise RequestError(422, f"{where} must be a URL that answers, got status {response.status}")
        return _content(response, connection, where, most, end)
    finally:
        connection.close()


def _content(
    response: http.client.HTTPResponse, connection: http.client.HTTPConnection, where: str, most: int, end: float
) -> bytes:
    content = bytearray()
    while chunk := response.read1(_CHUNK):
        content += chunk
        if len(content) > most:
            raise RequestError(413, f"{where} must have at most {most} bytes, got more")
        if connection.sock is not None:
            connection.sock.settimeout(_left(end))
    return bytes(content)


def _connect(host: str, port: int, secure: bool, where: str, end: float) -> http.client.HTTPConnection:
    raw = socket.create_connection((_public_address(host, port, where), port), timeout=_left(end))
    try:
        raw.settimeout(_left(end))
        tls = ssl.create_default_context().wrap_socket(raw, server_hostname=host) if secure else raw
    except BaseException:
        raw.close()
        raise
    connection = http.client.HTTPConnection(host, port)
    connection.sock = tls  # the address was chosen above: nothing is resolved a second time
    return connection


def _public_address(host: str, port: int, where: str) -> str:
    """One of the host's addresses; RequestError unless all of them are public."""
    found = {str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    for text in found:
        address = ipaddress.ip_address(text.partition("%")[0])
        inner = getattr(address, "ipv4_mapped", None) or address
        if not inner.is_global or inner.is_multicast:
            raise RequestError(422, f"{where} must be a URL of a public address, got {host[:80]!r}")
    return sorted(found)[0]


def _left(end: float) -> float:
    left = end - time.monotonic()
    if left <= 0:
        raise TimeoutError("the time for this URL is over")
    return left
