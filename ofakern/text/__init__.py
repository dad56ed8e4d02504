"""Text: the vocabulary shared by all modalities, the byte-level BPE tokenizer, closed answer sets."""

from ofakern.text.closed_set import ClosedSet
from ofakern.text.tokenizer import Tokenizer
from ofakern.text.vocabulary import Vocabulary

__all__ = ["ClosedSet", "Tokenizer", "Vocabulary"]
