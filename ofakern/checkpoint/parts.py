"""What reading another system's checkpoint gives, whichever system it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ofakern.checkpoint.ledger import Ledger
from ofakern.model import OFAConfig, OFAPlus
from ofakern.text import Tokenizer

__all__ = ["Account", "Foreign", "match_rows"]


@dataclass(frozen=True)
class Account:
    """What became of a checkpoint: its keys (`fates`), and what else is worth saying. `str` of it is for people."""

    ledger: Ledger
    notes: tuple[str, ...]

    @property
    def fates(self) -> Mapping[str, str]:
        return self.ledger.fates

    def __str__(self) -> str:
        return "\n".join([self.ledger.summary(), *(f"  {note}" for note in self.notes)])


@dataclass
class Foreign:
    """What a checkpoint holds. load: puts its weights into a network of `config` and accounts for every key.

    tasks: instruction by name. preprocess: fields of `PreprocessConfig`. notes: what was matched or left behind.
    """

    config: OFAConfig
    tokenizer: Tokenizer
    load: Callable[[OFAPlus], Ledger]
    tasks: dict[str, str] = field(default_factory=dict)
    preprocess: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def match_rows(
    stored: Tensor, symbols: Sequence[str], fresh: Tensor, wanted: Sequence[str], notes: list[str]
) -> Tensor:
    """Rows `[V', D]` of the wanted symbols: the stored ones, or for symbols the checkpoint lacks the fresh ones."""
    if list(symbols) == list(wanted):
        return stored
    place = {symbol: row for row, symbol in enumerate(symbols)}
    rows = fresh.detach().clone().to(stored.dtype)
    known = [(at, place[symbol]) for at, symbol in enumerate(wanted) if symbol in place]
    rows[[at for at, _ in known]] = stored[[row for _, row in known]]
    notes.append(
        f"vocabulary: {len(known)} rows matched by symbol, {len(wanted) - len(known)} new symbols keep their "
        f"initial rows, {len(symbols) - len(known)} symbols of the checkpoint are not in the vocabulary"
    )
    return rows
