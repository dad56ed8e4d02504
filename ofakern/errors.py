"""The errors of ofakern. Each is also the builtin a caller would expect.

Messages read ``<where>: <argument> must <rule>, got <value>``, with a second line ``Try: ...`` where there is a remedy.
"""

from __future__ import annotations

__all__ = [
    "BackendError",
    "CheckpointError",
    "DataError",
    "InstructionError",
    "OfakernError",
    "OfakernRuntimeError",
    "OfakernTypeError",
    "OfakernValueError",
    "OfakernWarning",
]


class OfakernError(Exception):
    """Anything that ofakern itself raises."""


class OfakernValueError(OfakernError, ValueError):
    """An argument has the right type and a wrong value: a shape, a range, a length."""


class OfakernTypeError(OfakernError, TypeError):
    """An argument has the wrong type or dtype."""


class OfakernRuntimeError(OfakernError, RuntimeError):
    """The call is right and still cannot be done here."""


class InstructionError(OfakernValueError):
    """An instruction that cannot be read; the message shows the place with a caret."""


class DataError(OfakernValueError):
    """A sample or a file that does not fit what the plan expects."""


class CheckpointError(OfakernValueError):
    """A checkpoint with missing, unexpected or misshapen content."""


class BackendError(OfakernRuntimeError):
    """The backend that was asked for cannot run this call; the message gives each backend's reason."""


class OfakernWarning(UserWarning):
    """The call is done, and slower than its caller may expect."""
