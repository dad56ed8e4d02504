"""The modalities there are: one static table. Importing a modality registers nothing; a new one is a line here."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from ofakern.instruction import Modality
from ofakern.modality.audio.spec import SPEC as AUDIO
from ofakern.modality.box.spec import SPEC as BOX
from ofakern.modality.category.spec import SPEC as CATEGORY
from ofakern.modality.image.spec import SPEC as IMAGE
from ofakern.modality.motion.spec import SPEC as MOTION
from ofakern.modality.phone.spec import SPEC as PHONE
from ofakern.modality.spec import ModalitySpec
from ofakern.modality.struct.spec import SPEC as STRUCT
from ofakern.modality.text.spec import SPEC as TEXT
from ofakern.modality.video.spec import SPEC as VIDEO

__all__ = ["SPECS"]

SPECS: Mapping[Modality, ModalitySpec] = MappingProxyType(
    {spec.modality: spec for spec in (TEXT, IMAGE, BOX, AUDIO, MOTION, PHONE, VIDEO, STRUCT, CATEGORY)}
)
