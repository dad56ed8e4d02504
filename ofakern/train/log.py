"""What a run reports: a progress bar, one JSON object per line, TensorBoard events."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

LOG_NAME = "log.jsonl"


class RunLog:
    """Writes `log.jsonl` (and TensorBoard events) in `folder` and moves the bar; silent where there is no folder.

    A resumed run drops the lines after the update it resumes from, so the file reads as one run.
    """

    def __init__(
        self, folder: Path | None, *, total: int, start: int, progress: bool, tensorboard: bool | None
    ) -> None:
        self._file = None
        self._events: Any = None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / LOG_NAME
            kept = [line for line in _lines(path) if json.loads(line).get("update", 0) <= start] if start else []
            self._file = path.open("w", encoding="utf-8")
            self._file.writelines(f"{line}\n" for line in kept)
            if tensorboard or (tensorboard is None and find_spec("tensorboard") is not None):
                from torch.utils.tensorboard import SummaryWriter  # seconds to import, so only where it is used

                self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=start or None)
        self._bar = tqdm(total=total, initial=start, disable=not progress, unit="update", dynamic_ncols=True)

    def advance(self, shown: Mapping[str, str]) -> None:
        """One update more, with what to show beside the bar."""
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update()

    def write(self, record: Mapping[str, Any]) -> None:
        """One line of the log; numbers of nested mappings become TensorBoard scalars `outer/inner`."""
        if self._file is not None:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        if self._events is not None:
            for name, value in _scalars(record):
                self._events.add_scalar(name, value, record["update"])

    def say(self, text: str) -> None:
        """A line above the bar."""
        if not self._bar.disable:
            self._bar.write(text)

    def close(self) -> None:
        """Finish the bar and the files."""
        self._bar.close()
        if self._file is not None:
            self._file.close()
        if self._events is not None:
            self._events.close()


def read_log(folder: str | Path) -> list[dict[str, Any]]:
    """The records of a run's log, in order."""
    return [json.loads(line) for line in _lines(Path(folder) / LOG_NAME)]


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []


def _scalars(record: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for name, value in record.items():
        if isinstance(value, Mapping):
            found += _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and name != "update":
            found.append((prefix + name, float(value)))
    return found
