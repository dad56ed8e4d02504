"""What a server says beside the library's own errors, and the HTTP status of each."""

from __future__ import annotations

from ofakern.errors import OfakernError, OfakernRuntimeError, OfakernValueError

__all__ = ["Overloaded", "RequestError", "Stopped", "status_of"]


class Overloaded(OfakernRuntimeError):
    """The queue is full; the request may be tried again later."""


class Stopped(OfakernRuntimeError):
    """The engine takes no more requests, or was stopped before this one was answered."""


class RequestError(OfakernValueError):
    """A request that is wrong before any model looks at it; `status` is its HTTP status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def status_of(error: BaseException) -> int:
    """The HTTP status of an error; 500 for what is no error of ofakern."""
    if isinstance(error, RequestError):
        return error.status
    if isinstance(error, Overloaded):
        return 429
    if isinstance(error, Stopped):
        return 503
    return 422 if isinstance(error, OfakernError) else 500
