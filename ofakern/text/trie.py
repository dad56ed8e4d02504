"""Many token sequences as one sorted trie in a few arrays: a million of them take seconds and tens of megabytes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from ofakern.errors import OfakernValueError

__all__ = ["TokenSequences", "TokenTrie"]

Ids = npt.NDArray[np.int32]
Places = npt.NDArray[np.int64]


class TokenSequences(Sequence[tuple[int, ...]]):
    """Token sequences end to end: `tokens` int32 `[N]`, `offsets` int64 `[n+1]`. Reads as a sequence of tuples."""

    def __init__(self, tokens: Ids, offsets: Places) -> None:
        self.tokens, self.offsets = tokens, offsets

    @classmethod
    def of(cls, sequences: Iterable[Sequence[int]]) -> TokenSequences:
        """The same sequences in this form. Raises OfakernValueError for ids that are none (negative, 2**31 or more)."""
        if isinstance(sequences, cls):
            return sequences
        given = list(sequences)
        lengths = np.fromiter(map(len, given), np.int64, len(given))
        offsets = np.concatenate(([0], lengths.cumsum()))
        tokens = np.fromiter(chain.from_iterable(given), np.int64, int(offsets[-1]))
        if len(tokens) and (tokens.min() < 0 or tokens.max() >= 2**31):
            raise OfakernValueError(
                f"TokenSequences: tokens must be in [0, 2**31), got {tokens.min()} .. {tokens.max()}"
            )
        return cls(tokens.astype(np.int32), offsets)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence; 0 where there is none."""
        return int(np.diff(self.offsets).max(initial=0))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, index: int) -> tuple[int, ...]: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[tuple[int, ...], ...]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        place = index % len(self)
        return tuple(self.tokens[self.offsets[place] : self.offsets[place + 1]].tolist())

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        return (self[i] for i in range(len(self)))


class TokenTrie:
    """The sorted trie of token sequences. Nodes are numbered by levels; the root is 0 and edge e leads to node e + 1.

    Attributes:
        first: int64 `[nodes+1]`; the edges of node n are first[n] .. first[n+1], their tokens ascending.
        tokens: int32 `[edges]`.
        sequence_at: int64 `[nodes]`; the first of the sequences that end in this node, -1 where none does.
    """

    def __init__(self, sequences: TokenSequences) -> None:
        tokens, begins = sequences.tokens, sequences.offsets[:-1]
        lengths = np.diff(sequences.offsets)
        base = int(tokens.max(initial=0)) + 1
        node = np.zeros(len(sequences), np.int64)  # where each sequence is
        parents, labels, nodes = [np.empty(0, np.int64)], [np.empty(0, np.int32)], 1
        going, depth = np.flatnonzero(lengths > 0), 0
        while len(going):
            # Distinct (parent, token) pairs in their order are the next level's edges, and so its nodes.
            pairs, place = np.unique(node[going] * base + tokens[begins[going] + depth], return_inverse=True)
            parents.append(pairs // base)
            labels.append((pairs % base).astype(np.int32))
            node[going] = nodes + place
            nodes += len(pairs)
            depth += 1
            going = going[lengths[going] > depth]
        degree = np.bincount(np.concatenate(parents), minlength=nodes)
        self.first: Places = np.concatenate(([0], degree.cumsum()))
        self.tokens: Ids = np.concatenate(labels)
        self.sequence_at: Places = np.full(nodes, -1, np.int64)
        self.sequence_at[node[::-1]] = np.arange(len(sequences))[::-1]  # of equal ones the first stays

    def __len__(self) -> int:
        return len(self.first) - 1

    def children(self, node: int) -> Ids:
        """The tokens that may follow at `node`, ascending."""
        return self.tokens[self.first[node] : self.first[node + 1]]

    def child(self, node: int, token: int) -> int:
        """The node after `token`, or -1."""
        tokens = self.children(node)
        place = int(tokens.searchsorted(token))
        found = place < len(tokens) and int(tokens[place]) == token
        return int(self.first[node]) + place + 1 if found else -1

    def find(self, tokens: Iterable[int]) -> int:
        """The number of the sequence that consists of these tokens, or -1."""
        node = 0
        for token in tokens:
            node = self.child(node, token)
            if node < 0:
                return -1
        return int(self.sequence_at[node])
