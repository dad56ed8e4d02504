"""Tables written out as text, as OFASys writes them: `cat : color : red | dog : age : 3`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ofakern.errors import DataError

__all__ = ["check_column_kinds", "table_text"]

_CELL, _ROW = " : ", " | "
_DROPPED = str.maketrans({"(": None, ")": None, '"': None, ",": " ", "_": " "})
_PARENTHESES = str.maketrans({"(": None, ")": None})
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")


def table_text(value: Any, column_kinds: str = "", *, where: str = "table") -> str:
    """A table as one line of lower-case text.

    value: rows of cells, `[["cat", "color", "red"], ...]`; or a mapping with table_name (text), table_head (cells) and
    table_content (rows), which gets marks before its parts. A cell is text or a number. column_kinds: "c:k:c", a kind
    per column: c, a cell (the default): without brackets and quotes, commas and underscores as blanks; k, a relation:
    split at underscores and capitals.

    Raises DataError, naming `where`, for anything else, an empty table, or more columns than kinds.
    """
    kinds = column_kinds.split(":") if column_kinds else []
    if not isinstance(value, Mapping):
        return _rows(value, kinds, where).lower()
    missing = [name for name in ("table_name", "table_head", "table_content") if name not in value]
    if missing:
        raise DataError(f"{where}: table must have table_name, table_head and table_content, got no {missing[0]}")
    parts = (
        f"[table name] {_cell(value['table_name'], 'c', where)}",
        f"[table head] {_row(value['table_head'], kinds, where)}",
        f"[table content] {_rows(value['table_content'], kinds, where)}",
    )
    return " ".join(parts).lower()


def check_column_kinds(kinds: str) -> bool:
    """Whether `kinds` is a list of c and k, separated by colons."""
    return re.fullmatch(r"[ck](:[ck])*", kinds) is not None


def _rows(value: Any, kinds: Sequence[str], where: str) -> str:
    if not isinstance(value, (list, tuple)) or not value:
        raise DataError(f"{where}: table must be a list of rows with at least one, got {value!r:.60}")
    return _ROW.join(_row(row, kinds, where) for row in value)


def _row(row: Any, kinds: Sequence[str], where: str) -> str:
    if not isinstance(row, (list, tuple)):
        raise DataError(f"{where}: row of a table must be a list of cells, got {row!r:.60}")
    if kinds and len(row) > len(kinds):
        raise DataError(f"{where}: row of a table must have at most {len(kinds)} cells (col_type), got {len(row)}")
    return _CELL.join(_cell(cell, kinds[place] if kinds else "c", where) for place, cell in enumerate(row))


def _cell(cell: Any, kind: str, where: str) -> str:
    if isinstance(cell, bool) or not isinstance(cell, (str, int, float)):
        raise DataError(f"{where}: cell of a table must be text or a number, got {type(cell).__name__}")
    text = str(cell)
    if kind == "k":
        return " ".join(_CAMEL.sub(" ", text.translate(_PARENTHESES).replace("_", " ")).split())
    return text.translate(_DROPPED).strip()
