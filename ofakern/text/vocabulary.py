"""The one vocabulary of a generalist model, in OFA's layout.

    <s> <pad> </s> <unk> | <text>_<bpe id> ... | <mask> | <code>_0 ... | <bin>_0 ... | <phone>_...

Symbols are the truth and are saved one by one: the order of the text part follows the frequency list of the original
vocabulary, and a checkpoint of another system may hold its groups in another order.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ofakern.errors import DataError, OfakernValueError

__all__ = ["BOS", "EOS", "MASK", "PAD", "UNK", "Vocabulary"]

BOS, PAD, EOS, UNK, MASK = "<s>", "<pad>", "</s>", "<unk>", "<mask>"
_SPECIALS = (BOS, PAD, EOS, UNK)
_FORMAT = "ofakern.vocabulary.v1"


class Vocabulary:
    """Symbols and their indices; each group (`text`, `code`, `bin`, `phone`) is one contiguous range.

    symbols: all symbols in index order, beginning with `<s> <pad> </s> <unk>`. Raises OfakernValueError when a symbol
    occurs twice or a group lies in two places.
    """

    bos, pad, eos, unk = 0, 1, 2, 3

    def __init__(self, symbols: Sequence[str]) -> None:
        self._symbols = tuple(symbols)
        if self._symbols[:4] != _SPECIALS:
            raise OfakernValueError(
                f"Vocabulary: symbols must begin with {' '.join(_SPECIALS)}, got {' '.join(self._symbols[:4])!r}"
            )
        self._indices = {symbol: index for index, symbol in enumerate(self._symbols)}
        if len(self._indices) != len(self._symbols):
            seen: set[str] = set()
            twice = next(s for s in self._symbols if s in seen or seen.add(s))  # type: ignore[func-returns-value]
            raise OfakernValueError(f"Vocabulary: symbols must be unique, got {twice!r} twice")
        self._ranges = _group_ranges(self._symbols)

    @classmethod
    def build(
        cls, text: Iterable[int | str], *, codes: int = 8192, bins: int = 1000, phones: Sequence[str] = ()
    ) -> Vocabulary:
        """OFA's layout. text: BPE ids in index order; codes, bins: how many; phones: phone names without specials."""
        if codes < 0 or bins < 0:
            raise OfakernValueError(
                f"Vocabulary.build: codes and bins must not be negative, got codes={codes}, bins={bins}"
            )
        symbols = [*_SPECIALS, *(f"<text>_{i}" for i in text), MASK]
        symbols += [f"<code>_{i}" for i in range(codes)]
        symbols += [f"<bin>_{i}" for i in range(bins)]
        if phones:
            symbols += [f"<phone>_{p}" for p in ("dict_begin", *phones, "unk", "dict_end")]
        return cls(symbols)

    def __len__(self) -> int:
        return len(self._symbols)

    def __contains__(self, symbol: object) -> bool:
        return symbol in self._indices

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and other._symbols == self._symbols

    def __hash__(self) -> int:
        return hash(self._symbols)

    def __repr__(self) -> str:
        groups = ", ".join(f"{name}={len(span)}" for name, span in self._ranges.items())
        return f"Vocabulary({len(self)} symbols: {groups})"

    @property
    def symbols(self) -> tuple[str, ...]:
        """All symbols in index order."""
        return self._symbols

    @property
    def mask(self) -> int:
        """The index of `<mask>`."""
        return self.index(MASK)

    @property
    def indices(self) -> Mapping[str, int]:
        """Symbol -> index."""
        return self._indices

    @property
    def groups(self) -> Mapping[str, range]:
        """Group name -> its range of indices."""
        return self._ranges

    def index(self, symbol: str) -> int:
        """The index of `symbol`. Raises OfakernValueError when the vocabulary has no such symbol."""
        try:
            return self._indices[symbol]
        except KeyError:
            raise OfakernValueError(f"Vocabulary.index: symbol must be in the vocabulary, got {symbol!r}") from None

    def symbol(self, index: int) -> str:
        """The symbol at `index`. Raises OfakernValueError outside the vocabulary."""
        if not 0 <= index < len(self._symbols):
            raise OfakernValueError(f"Vocabulary.symbol: index must be in [0, {len(self)}), got {index}")
        return self._symbols[index]

    def range(self, group: str) -> range:
        """The indices of a group: `text`, `code`, `bin`, `phone`. Empty when the vocabulary has none."""
        return self._ranges.get(group, range(0))

    def to_json(self) -> dict[str, Any]:
        return {"format": _FORMAT, "symbols": list(self._symbols)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Vocabulary:
        if data.get("format") != _FORMAT or not isinstance(data.get("symbols"), list):
            raise DataError(f"Vocabulary: file must have format {_FORMAT!r}, got {data.get('format')!r}")
        return cls(data["symbols"])

    def save(self, path: str | Path) -> None:
        """Writes the vocabulary as JSON."""
        Path(path).write_text(json.dumps(self.to_json(), ensure_ascii=False, indent=0), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Vocabulary:
        """Reads what `save` wrote. Raises DataError for a missing or damaged file."""
        try:
            return cls.from_json(json.loads(Path(path).read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            if isinstance(error, OfakernValueError):
                raise
            raise DataError(f"Vocabulary.load: path must hold a vocabulary, got {str(path)!r}: {error}") from error


def _group_ranges(symbols: Sequence[str]) -> dict[str, range]:
    ranges: dict[str, range] = {}
    for index, symbol in enumerate(symbols):
        name, separator, _ = symbol[1:].partition(">_")
        if not separator or not symbol.startswith("<"):
            continue
        known = ranges.get(name)
        if known is None:
            ranges[name] = range(index, index + 1)
        elif known.stop == index:
            ranges[name] = range(known.start, index + 1)
        else:
            raise OfakernValueError(
                f"Vocabulary: symbols of group {name!r} must be contiguous, "
                f"got {symbol!r} at {index} after [{known.start}, {known.stop})"
            )
    return ranges
