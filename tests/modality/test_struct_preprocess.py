"""Tables as text."""

from __future__ import annotations

from typing import Any

import pytest

from ofakern.errors import DataError
from ofakern.modality.struct.preprocess import check_column_kinds, table_text


@pytest.mark.parametrize(
    ("value", "kinds", "text"),
    [
        ([["cat", "color", "red"], ["dog", "age", 3]], "", "cat : color : red | dog : age : 3"),
        ([['The "Big" Cat (old)', "a,b_c"]], "", "the big cat old : a b c"),
        ([["Ada", "birthPlace(city)", "London"]], "c:k:c", "ada : birth placecity : london"),
        ([["x", "HTTPServer_name"]], "c:k", "x : http server name"),
        ((("a",),), "", "a"),
        (
            {"table_name": "Pets", "table_head": ["name", "age"], "table_content": [["Tom", 3], ["Rex", 4.5]]},
            "",
            "[table name] pets [table head] name : age [table content] tom : 3 | rex : 4.5",
        ),
    ],
)
def test_tables(value: Any, kinds: str, text: str) -> None:
    before = repr(value)
    assert table_text(value, kinds) == text
    assert repr(value) == before  # the caller's rows are not touched


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("a | b", "must be a list of rows with at least one"),
        ([], "must be a list of rows with at least one"),
        (["a", "b"], "row of a table must be a list of cells, got 'a'"),
        ([["a", None]], "cell of a table must be text or a number, got NoneType"),
        ([["a", "b", "c"]], r"at most 2 cells \(col_type\), got 3"),
        ({"table_name": "x", "table_head": ["a"]}, "got no table_content"),
    ],
)
def test_what_is_no_table(value: Any, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        table_text(value, "c:k", where="row 2, column 'db'")
    assert str(caught.value).startswith("row 2, column 'db': ")


def test_kinds_of_columns() -> None:
    assert check_column_kinds("c:k:c") and check_column_kinds("k")
    assert not any(check_column_kinds(kinds) for kinds in ("", "c:", "c:x", "ck", "c k"))
