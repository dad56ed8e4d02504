"""Serving: `Engine` answers many requests with one model at a time; `ofakern serve` puts HTTP around it."""

from ofakern.serve.contract import Progress
from ofakern.serve.engine import Engine
from ofakern.serve.errors import Overloaded, Stopped

__all__ = ["Engine", "Overloaded", "Progress", "Stopped"]
