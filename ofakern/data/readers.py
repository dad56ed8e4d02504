"""Rows and files: where samples come from.

`open_rows` turns a path or any collection of mappings into something with a length and rows by number; files are read
lazily through an index of line offsets. `open_files` gives the folder or archive in which the names of a row are
looked up. Both survive a fork (DataLoader workers) and pickling.
"""

from __future__ import annotations

import csv
import io
import json
import os
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from ofakern.errors import DataError

__all__ = ["Columns", "FolderFiles", "Rows", "ZipFiles", "open_files", "open_rows"]

Columns = str | Sequence[str] | Mapping[str, str] | Mapping[int, str] | None
MAX_FILE_BYTES = 512 * 1024 * 1024
_FIELD_LIMIT = 2**31 - 1


@runtime_checkable
class Rows(Protocol):
    """Rows by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


# ------------------------------------------------------------------------------------------------------------ rows


def open_rows(
    source: str | Path | Rows | Iterable[Mapping[str, Any]], *, columns: Columns = None, header: bool | None = None
) -> Rows:
    """Rows of a .jsonl, .json, .csv or .tsv file, of a Hugging Face dataset, or of any iterable of mappings.

    columns: which columns, and their names: `{"file's name": "name"}`, `{0: "uid", 2: "img"}` or OFA's
    `"0:uid,2:img"`; a list of names numbers them from 0. header: whether the first line of a .csv or .tsv names the
    columns (default: unless `columns` goes by number). An iterable that cannot be indexed is read into memory.
    Raises DataError for a missing file, an unknown suffix or wrong columns; a broken row raises when it is asked for.
    """
    chosen = _parse_columns(columns)
    if isinstance(source, (str, Path)):
        return _open_file(Path(source), chosen, header)
    if isinstance(source, Mapping):
        raise DataError(
            "open_rows: source must be rows (mappings), got one mapping\nTry: a list with one mapping per sample."
        )
    rows: Rows
    if isinstance(source, Rows):
        rows = source
    elif isinstance(source, Iterable):
        rows = list(source)
    else:
        raise DataError(f"open_rows: source must be a path or an iterable of mappings, got {type(source).__name__}")
    return _Selected(rows, _by_name(chosen, "rows")) if chosen else _Checked(rows)


def _open_file(path: Path, columns: dict[str | int, str], header: bool | None) -> Rows:
    if not path.is_file():
        raise DataError(f"open_rows: path must be an existing file, got {str(path)!r}")
    suffix = path.suffix.lower()
    if suffix in (".csv", ".tsv"):
        return _TableFile(path, columns, header)
    if suffix in (".jsonl", ".ndjson"):
        rows: Rows = _JsonLines(path)
    elif suffix == ".json":
        rows = _read_json(path)
    else:
        raise DataError(f"open_rows: path must end in .jsonl, .json, .csv or .tsv, got {str(path)!r}")
    return _Selected(rows, _by_name(columns, str(path))) if columns else rows


class _Checked:
    """Rows as they are; a row that is no mapping is a DataError."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        row = self._rows[index]
        if not isinstance(row, Mapping):
            raise DataError(f"row {index}: row must be a mapping of columns, got {type(row).__name__}")
        return row


class _Selected(_Checked):
    """Some columns of rows, under new names."""

    def __init__(self, rows: Rows, columns: Mapping[str, str]) -> None:
        super().__init__(rows)
        self._columns = columns

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        row = super().__getitem__(index)
        missing = [name for name in self._columns if name not in row]
        if missing:
            raise DataError(f"row {index}: columns must hold {missing[0]!r}, got {sorted(map(str, row))}")
        return {alias: row[name] for name, alias in self._columns.items()}


class _Lines:
    """Records of a text file by number.

    Reads with pread, so processes that share the descriptor do not disturb another.
    """

    def __init__(self, path: Path, quoted: bool) -> None:
        self.path = path
        self.spans = _record_spans(path, quoted)
        self._fd: int | None = None

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(index)
        if self._fd is None:
            self._fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        begin, end = self.spans[index].tolist()
        raw = os.pread(self._fd, end - begin, begin)
        try:
            return raw.decode("utf-8-sig" if begin == 0 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise DataError(f"{self.path}: record {index} must be UTF-8, got {error}") from error

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_fd": None}

    def __del__(self) -> None:
        if getattr(self, "_fd", None) is not None:
            os.close(self._fd)  # type: ignore[arg-type]


def _record_spans(path: Path, quoted: bool) -> np.ndarray[Any, Any]:
    """int64 `[records, 2]`: begin and end of every record in bytes; empty lines between records are none.

    quoted: a line end inside an open quote does not end a record.
    """
    spans: list[tuple[int, int]] = []
    begin, position, inside = 0, 0, False
    with path.open("rb") as file:
        for line in file:
            if not inside:
                begin = position
            position += len(line)
            if quoted and line.count(b'"') % 2:
                inside = not inside
            if not inside and (begin < position - len(line) or line.strip(b"\r\n ")):
                spans.append((begin, position))
    if inside:
        spans.append((begin, position))
    return np.asarray(spans, dtype=np.int64).reshape(-1, 2)


class _JsonLines:
    def __init__(self, path: Path) -> None:
        self._lines = _Lines(path, quoted=False)

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        try:
            row = json.loads(self._lines[index])
        except json.JSONDecodeError as error:
            raise DataError(f"{self._lines.path}: record {index} must be JSON, got: {error}") from error
        if not isinstance(row, dict):
            raise DataError(f"{self._lines.path}: record {index} must be a JSON object, got {type(row).__name__}")
        return row


def _read_json(path: Path) -> Rows:
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise DataError(f"{path}: file must be JSON, got: {error}") from error
    if not isinstance(data, list):
        raise DataError(f"{path}: file must be a JSON list of objects, got {type(data).__name__}")
    return _Checked(data)


class _TableFile:
    """A .csv (quoted) or .tsv (never quoted, as OFA writes them) file."""

    def __init__(self, path: Path, columns: dict[str | int, str], header: bool | None) -> None:
        self._quoted = path.suffix.lower() == ".csv"
        self._lines = _Lines(path, self._quoted)
        by_number = bool(columns) and all(isinstance(key, int) for key in columns)
        self._first = int(not by_number if header is None else header)
        if self._first and len(self._lines) == 0:
            raise DataError(f"{path}: file must have a header line, got an empty file")
        names = self._cells(0) if self._first else []
        self._width = len(names) or None
        self._columns = _positions(columns, names, path)

    def __len__(self) -> int:
        return len(self._lines) - self._first

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        cells = self._cells(index + self._first)
        if self._width not in (None, len(cells)):
            raise DataError(f"{self._lines.path}: row {index} must have {self._width} columns, got {len(cells)}")
        if self._columns and max(self._columns) >= len(cells):
            raise DataError(
                f"{self._lines.path}: row {index} must have column {max(self._columns)}, got {len(cells)} columns"
            )
        return {name: cells[position] for position, name in self._columns.items()}

    def _cells(self, record: int) -> list[str]:
        text = self._lines[record]
        if not self._quoted:
            return text.split("\t")
        before = csv.field_size_limit(_FIELD_LIMIT)  # base64 images are far above the module's default
        try:
            return next(csv.reader(io.StringIO(text, newline=""), strict=True))
        except csv.Error as error:
            raise DataError(f"{self._lines.path}: record {record} must be CSV, got: {error}") from error
        finally:
            csv.field_size_limit(before)


def _positions(columns: dict[str | int, str], names: list[str], path: Path) -> dict[int, str]:
    if not columns:
        if not names:
            raise DataError(f"{path}: columns must be given for a file without a header, got none")
        return dict(enumerate(names))
    positions: dict[int, str] = {}
    for key, alias in columns.items():
        if isinstance(key, str):
            if key not in names:
                raise DataError(f"{path}: columns must be among {names}, got {key!r}")
            key = names.index(key)
        elif names and key >= len(names):
            raise DataError(f"{path}: column numbers must be below {len(names)}, got {key}")
        positions[key] = alias
    return positions


def _parse_columns(columns: Columns) -> dict[str | int, str]:
    if columns is None:
        return {}
    if isinstance(columns, str):
        parsed: dict[str | int, str] = {}
        for item in filter(None, (part.strip() for part in columns.split(","))):
            key, separator, alias = item.partition(":")
            parsed[int(key) if key.isdecimal() else key] = alias if separator else key
    elif isinstance(columns, Mapping):
        parsed = {key: alias for key, alias in columns.items()}
    else:
        parsed = dict(enumerate(columns))
    aliases = list(parsed.values())
    if not aliases or len(set(aliases)) != len(aliases) or not all(isinstance(a, str) and a for a in aliases):
        raise DataError(f"open_rows: columns must give each column a name of its own, got {columns!r}")
    return parsed


def _by_name(columns: dict[str | int, str], where: str) -> dict[str, str]:
    numbers = [key for key in columns if isinstance(key, int)]
    if numbers:
        raise DataError(f"open_rows: columns of {where} must be names, got number {numbers[0]}")
    return {str(key): alias for key, alias in columns.items()}


# ----------------------------------------------------------------------------------------------------------- files


def open_files(path: str | Path | None) -> FolderFiles | ZipFiles | None:
    """The folder or .zip archive in which file names of rows are looked up. Raises DataError when there is none."""
    if path is None:
        return None
    place = Path(path)
    if place.is_dir():
        return FolderFiles(place)
    if zipfile.is_zipfile(place):
        return ZipFiles(place)
    raise DataError(f"open_files: path must be a folder or a .zip archive, got {str(path)!r}")


class FolderFiles:
    """Files below one folder; names that lead out of it are not found."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder.resolve()

    def __contains__(self, name: str) -> bool:
        return self._path(name) is not None

    def read(self, name: str) -> bytes:
        """The file's content. Raises DataError when it is missing or cannot be read."""
        path = self._path(name)
        if path is None:
            raise DataError(f"{self}: file must exist, got {name!r}")
        try:
            return path.read_bytes()
        except OSError as error:
            raise DataError(f"{self}: file must be readable, got {name!r}: {error.strerror}") from error

    def _path(self, name: str) -> Path | None:
        path = (self._folder / name).resolve()
        return path if path.is_relative_to(self._folder) and path.is_file() else None

    def __str__(self) -> str:
        return str(self._folder)


class ZipFiles:
    """Members of a .zip archive, by their whole name or without the archive's one top folder."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._open: tuple[int, zipfile.ZipFile] | None = None
        self._names = dict(_member_names(self._archive().namelist()))

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def read(self, name: str) -> bytes:
        """The member's content. Raises DataError when it is missing, damaged or above 512 MiB."""
        if name not in self._names:
            raise DataError(f"{self}: file must exist, got {name!r}")
        try:
            info = self._archive().getinfo(self._names[name])
            if info.file_size > MAX_FILE_BYTES:
                raise DataError(f"{self}: {name!r} must be at most {MAX_FILE_BYTES} bytes, got {info.file_size}")
            return self._archive().read(info)
        except (zipfile.BadZipFile, OSError, EOFError, RuntimeError, NotImplementedError) as error:
            raise DataError(f"{self}: file must be readable, got {name!r}: {error}") from error

    def _archive(self) -> zipfile.ZipFile:
        # a forked child shares the parent's file position, so each process opens the archive for itself
        if self._open is None or self._open[0] != os.getpid():
            try:
                self._open = os.getpid(), zipfile.ZipFile(self._path)
            except (zipfile.BadZipFile, OSError) as error:
                raise DataError(f"{self}: file must be a .zip archive, got: {error}") from error
        return self._open[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": None}

    def __str__(self) -> str:
        return str(self._path)


def _member_names(members: list[str]) -> Iterator[tuple[str, str]]:
    files = [name for name in members if not name.endswith("/")]
    tops = {name.partition("/")[0] for name in files if "/" in name}
    if len(tops) == 1 and all("/" in name for name in files):
        for name in files:
            yield name.partition("/")[2], name
    for name in files:
        yield name, name
