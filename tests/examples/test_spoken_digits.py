"""The spoken digits: real recordings, one model that hears and says them."""

from __future__ import annotations

import json
from pathlib import Path

import soundfile
import spoken_digits


def test_it_learns_and_speaks(tmp_path: Path) -> None:
    found = spoken_digits.main(["--updates", "30", "--output", str(tmp_path)])
    for task, share in (("hear", 0.5), ("say", 0.6)):
        assert found["last_loss"][task] < share * found["first_loss"][task], task
    assert json.loads((tmp_path / "results.json").read_text()) == found
    samples, rate = soundfile.read(tmp_path / "spoken.wav")
    assert rate == 16000 and 0 < len(samples) <= 64 * 256
    assert len(found["heard"]) == 20 and {"nll", "accuracy", "wer"} <= set(found["evaluation"]["hear"])
    assert (tmp_path / "spoken.png").stat().st_size > 1000
