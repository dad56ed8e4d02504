"""The tensors of an automaton that a search's step takes."""

from ofakern.ops.beam_step import AutomatonTables

__all__ = ["AutomatonTables"]
