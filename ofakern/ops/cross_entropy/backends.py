"""Which backend runs a call of `cross_entropy`."""

from __future__ import annotations

from ofakern.ops.selection import Backends

BACKENDS = Backends("cross_entropy", "cross_entropy_forward", triton=True)
