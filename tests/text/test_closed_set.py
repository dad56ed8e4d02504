"""The trie of a closed set."""

from __future__ import annotations

import pytest

from ofakern.errors import DataError
from ofakern.text import ClosedSet, Tokenizer

END = 2


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["yes", "no", "maybe", "maybe so"] * 3, 270)


def test_allowed_along_equals_brute_force(tokenizer: Tokenizer) -> None:
    answers = ["yes", "no", "maybe so", "maybe", "yes and no", "nothing"]
    closed = ClosedSet(answers, tokenizer)
    whole = [[*ids, END] for ids in closed.sequences]
    for sequence in whole:
        rows = closed.allowed_along(sequence[:-1], END)
        assert len(rows) == len(sequence)
        for place, row in enumerate(rows):
            expected = {w[place] for w in whole if w[:place] == sequence[:place] and len(w) > place}
            assert row.tolist() == sorted(expected)
            assert sequence[place] in row.tolist()


def test_unknown_prefix_allows_only_the_end(tokenizer: Tokenizer) -> None:
    closed = ClosedSet(["yes", "no"], tokenizer)
    rows = closed.allowed_along(tokenizer.encode("blue sky"), END)
    assert [row.tolist() for row in rows[2:]] == [[END]] * (len(rows) - 2)


def test_answer_of_tokens(tokenizer: Tokenizer) -> None:
    closed = ClosedSet({"maybe": 0, "maybe so": 1}, tokenizer)
    assert len(closed) == 2
    for answer in closed.answers:
        assert closed.answer(tokenizer.encode(answer)) == answer
        assert tokenizer.encode(answer) in closed
    assert closed.answer(tokenizer.encode("maybe s")) is None
    assert closed.answer([]) is None


def test_errors(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="at least one answer"):
        ClosedSet([], tokenizer)
    with pytest.raises(DataError, match="not blank"):
        ClosedSet(["yes", " "], tokenizer)
