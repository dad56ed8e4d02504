"""`OFAKERN_LOG=1`: one line per op and distinct signature (shapes, dtype, backend) through the logger `ofakern.ops`."""

from __future__ import annotations

import logging
import os

ENABLED = os.environ.get("OFAKERN_LOG", "0") not in ("", "0")

_seen: set[str] = set()

if ENABLED:
    _logger = logging.getLogger("ofakern.ops")
    _logger.setLevel(logging.INFO)
    if not _logger.hasHandlers():  # asked for by the environment: must show without any logging set-up
        _handler = logging.StreamHandler()
        _handler.setFormatter(logging.Formatter("ofakern: %(message)s"))
        _logger.addHandler(_handler)


def once(logger: logging.Logger, line: str) -> None:
    """Logs a line the first time it comes."""
    if line not in _seen:
        _seen.add(line)
        logger.info(line)
