"""Answers as JSON: text and boxes as they are, what was made (pictures, speech, motions) as base64 or a file's text."""

from __future__ import annotations

import base64
import io
import math
import wave
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from ofakern.modality.audio.postprocess import Speech
from ofakern.modality.motion.skeleton import Motion
from ofakern.modality.output import Output

__all__ = ["answer_of", "plain"]


def answer_of(found: Output | Sequence[Output]) -> list[dict[str, Any]]:
    """The answers, best first: text, box, boxes, values by slot, score, tokens."""
    outputs = [found] if isinstance(found, Output) else list(found)
    return [
        {
            "text": output.text,
            "box": plain(output.box),
            "boxes": plain(output.boxes),
            "values": plain(output.values),
            "score": plain(output.score),
            "tokens": len(output.tokens),
        }
        for output in outputs
    ]


def plain(value: Any) -> Any:
    """A value as JSON has it; numbers that are none (NaN, infinity) become null."""
    if isinstance(value, Image.Image):
        return {"kind": "picture", "width": value.width, "height": value.height, "png": _png(value)}
    if isinstance(value, Speech):
        return {"kind": "speech", **value.summary(), "wav": _wav(value)}
    if isinstance(value, Motion):
        return {"kind": "motion", "frames": len(value), "frame_time": value.frame_time, "bvh": value.to_text()}
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _png(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode()


def _wav(speech: Speech) -> str:
    """16 bit, mono."""
    samples = (speech.waveform().clamp(-1.0, 1.0) * 32767).round().short().cpu().numpy()
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(2)
        writer.setframerate(speech.rate)
        writer.writeframes(samples.astype("<i2").tobytes())
    return base64.b64encode(file.getvalue()).decode()
