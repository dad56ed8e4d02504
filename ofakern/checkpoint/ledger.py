"""Accounts for every key of a foreign checkpoint: what it became, or why it is not needed. Nothing is left over."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ofakern.errors import CheckpointError

__all__ = ["Ledger", "listed"]

_SHOWN = 5


class Ledger:
    """The keys of one state dict.

    stored: its tensors by key. where: names the file in errors. fates: key -> what became of it, for every key read.
    """

    def __init__(self, stored: Mapping[str, Tensor], where: str) -> None:
        self.stored = stored
        self.where = where
        self.fates: dict[str, str] = {}

    def take(self, key: str, target: str = "") -> Tensor:
        """The tensor of `key`, which becomes `target` (default: the same name). CheckpointError when it is missing."""
        if key not in self.stored:
            raise CheckpointError(f"{self.where}: keys must all be there, got none for {key!r}")
        self.fates[key] = f"-> {target}" if target and target != key else "loaded"
        return self.stored[key]

    def drop(self, keys: Iterable[str], reason: str) -> None:
        """These keys are recognised and not needed."""
        self.fates.update(dict.fromkeys(keys, reason))

    def tied(self, key: str, owner: str) -> None:
        """`key`, where it is stored, must be the same tensor as `owner`. CheckpointError when they differ."""
        if key not in self.stored:
            return
        if not torch.equal(self.stored[key], self.stored[owner]):
            raise CheckpointError(f"{self.where}: {key} must equal {owner} (they are tied), got different values")
        self.fates[key] = f"tied to {owner}"

    def left(self) -> list[str]:
        """Keys that nothing has accounted for."""
        return sorted(set(self.stored) - set(self.fates))

    def finish(self, own: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
        """CheckpointError unless `found` has every tensor of `own`, of its shape, and no stored key is left over."""
        problems = []
        absent = set(own) - set(found)
        if absent:
            problems.append(f"{len(absent)} missing: {listed(absent)}")
        left = set(self.left()) | (set(found) - set(own))
        if left:
            problems.append(f"{len(left)} unknown: {listed(left)}")
        shapes = {
            f"{k} {list(found[k].shape)} instead of {list(own[k].shape)}"
            for k in set(own) & set(found)
            if own[k].shape != found[k].shape
        }
        if shapes:
            problems.append(f"{len(shapes)} of another shape: {listed(shapes)}")
        if problems:
            raise CheckpointError(f"{self.where}: keys must fit the model, got {'; '.join(problems)}")

    def summary(self) -> str:
        """One line per fate: how many keys, and the first of them."""
        groups: dict[str, list[str]] = {}
        for key, fate in sorted(self.fates.items()):
            kind = "renamed" if fate.startswith("-> ") else "tied" if fate.startswith("tied") else fate
            groups.setdefault(kind, []).append(key)
        lines = [f"{len(self.fates)} keys, {len(self.left())} left over"]
        lines += [f"  {len(keys):5} {kind}, e.g. {keys[0]}" for kind, keys in groups.items()]
        return "\n".join(lines)


def listed(names: Iterable[str]) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:_SHOWN]) + (" ..." if len(ordered) > _SHOWN else "")
