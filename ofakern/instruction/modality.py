"""The modalities a slot can have. The numbers are stored in batches and checkpoints and never change."""

from __future__ import annotations

from enum import IntEnum

__all__ = ["MODALITY_ALIASES", "Modality"]


class Modality(IntEnum):
    """Kinds of data, numbered as OFASys's ``ModalityType`` numbers them (a checkpoint's modality embedding is indexed
    by these)."""

    TEXT = 1
    IMAGE = 2
    BOX = 3
    AUDIO = 4
    MOTION = 5
    PHONE = 6
    VIDEO = 7
    STRUCT = 8
    CATEGORY = 9


# What people write when they mean one of ours; used for suggestions only, never accepted.
MODALITY_ALIASES: dict[str, Modality] = {
    "STR": Modality.TEXT,
    "STRING": Modality.TEXT,
    "TXT": Modality.TEXT,
    "SENTENCE": Modality.TEXT,
    "IMG": Modality.IMAGE,
    "PICTURE": Modality.IMAGE,
    "PHOTO": Modality.IMAGE,
    "BBOX": Modality.BOX,
    "BOUNDING_BOX": Modality.BOX,
    "REGION": Modality.BOX,
    "SPEECH": Modality.AUDIO,
    "SOUND": Modality.AUDIO,
    "WAV": Modality.AUDIO,
    "BVH": Modality.MOTION,
    "POSE": Modality.MOTION,
    "PHONEME": Modality.PHONE,
    "CLIP": Modality.VIDEO,
    "MOVIE": Modality.VIDEO,
    "TABLE": Modality.STRUCT,
    "DATABASE": Modality.STRUCT,
    "LABEL": Modality.CATEGORY,
    "CLASS": Modality.CATEGORY,
}
