"""`ofakern.patch(model)`: drop-in layers in place of the attention of models that people already have."""

from ofakern.patching.report import LeftAlone, PatchReport, Replaced
from ofakern.patching.walk import patch

__all__ = ["LeftAlone", "PatchReport", "Replaced", "patch"]
