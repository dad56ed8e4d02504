"""Byte-level BPE (the GPT-2 scheme) over the vocabulary.

Text is always encoded as `BPE(" " + text.strip())`, so a word has the same tokens at the start of a slot as inside it.
"""

from __future__ import annotations

import json
import os
import re
import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from ofakern.errors import DataError, OfakernTypeError, OfakernValueError
from ofakern.text.vocabulary import Vocabulary

__all__ = ["Tokenizer", "normalise_text"]

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_SPACES = re.compile(r"\s+")
_BYTES = 256


def normalise_text(text: str, *, uncased: bool = False, no_punctuation: bool = False) -> str:
    """Lower-cases, then strips ASCII punctuation and squeezes white space, as the attributes of a text slot ask."""
    if uncased:
        text = text.lower()
    if no_punctuation:
        text = _SPACES.sub(" ", text.translate(_PUNCTUATION))
    return text.strip()


class Tokenizer:
    """Text to vocabulary indices and back.

    bpe: a byte-level BPE of the `tokenizers` library; vocabulary: must hold `<text>_<id>` for every id of the BPE.
    """

    def __init__(self, bpe: tokenizers.Tokenizer, vocabulary: Vocabulary) -> None:
        self.bpe = bpe
        self.vocabulary = vocabulary
        ids = sorted(bpe.get_vocab().values())
        missing = [i for i in ids if f"<text>_{i}" not in vocabulary]
        if missing:
            raise OfakernValueError(
                f"Tokenizer: vocabulary must hold <text>_<id> for all {len(ids)} ids of the BPE, "
                f"got none for {missing[:5]}{' ...' if len(missing) > 5 else ''}"
            )
        self._index = {i: vocabulary.index(f"<text>_{i}") for i in ids}
        self._bpe_id = {index: i for i, index in self._index.items()}

    # ---------------------------------------------------------------------------------------------- construction

    @classmethod
    def from_files(
        cls,
        encoder_json: str | Path,
        vocab_bpe: str | Path,
        dict_txt: str | Path | None = None,
        *,
        vocabulary: Vocabulary | None = None,
        codes: int = 8192,
        bins: int = 1000,
        phones: Sequence[str] = (),
    ) -> Tokenizer:
        """From GPT-2's `encoder.json` and `vocab.bpe`; `dict.txt` (id and count per line) gives the order of the
        indices.

        vocabulary: use this one instead of building it from dict_txt, codes, bins and phones.
        Raises DataError for a missing or damaged file.
        """
        vocab = _read_json(encoder_json)
        merges = [
            _merge(line, vocab_bpe, number)
            for number, line in enumerate(_read_lines(vocab_bpe), 1)
            if line and not (number == 1 and line.startswith("#version"))
        ]
        bpe = _byte_level(models.BPE(vocab=vocab, merges=merges))
        if vocabulary is None:
            order: list[int | str] = sorted(vocab.values())
            if dict_txt is not None:
                order = [line.rsplit(" ", 1)[0] for line in _read_lines(dict_txt) if line]
            vocabulary = Vocabulary.build(order, codes=codes, bins=bins, phones=phones)
        return cls(bpe, vocabulary)

    @classmethod
    def from_bpe(cls, vocab: Mapping[str, int], merges: Sequence[tuple[str, str]], vocabulary: Vocabulary) -> Tokenizer:
        """From a byte-level BPE in memory: ids by token, merges in order. Raises as the class does."""
        return cls(_byte_level(models.BPE(vocab=dict(vocab), merges=list(merges))), vocabulary)

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int = 8192,
        *,
        codes: int = 0,
        bins: int = 1000,
        phones: Sequence[str] = (),
        min_frequency: int = 2,
    ) -> Tokenizer:
        """Trains the BPE on `texts`; the same texts give the same tokenizer.

        vocab_size: at most so many text ids, at least the 256 bytes. Raises OfakernValueError when it is below 256,
        DataError when there is no text.
        """
        if vocab_size < _BYTES:
            raise OfakernValueError(f"Tokenizer.train: vocab_size must be at least {_BYTES}, got {vocab_size}")
        bpe = _byte_level(models.BPE())
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=min_frequency,
            show_progress=False,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            special_tokens=[],
        )
        counted = _Counted(" " + _valid(text).strip() for text in texts)
        with _single_threaded():
            bpe.train_from_iterator(counted, trainer)
        if counted.count == 0:
            raise DataError("Tokenizer.train: texts must hold at least one text, got 0")
        order = sorted(bpe.get_vocab().values())
        return cls(bpe, Vocabulary.build(order, codes=codes, bins=bins, phones=phones))

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes `tokenizer.json` and `vocabulary.json` into `directory`."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_text(self.bpe.to_str(), encoding="utf-8")
        self.vocabulary.save(folder / "vocabulary.json")

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> Tokenizer:
        """Reads what `save_pretrained` wrote. Raises DataError for a missing or damaged file."""
        folder = Path(directory)
        return cls.from_tokenizer_json(folder / "tokenizer.json", Vocabulary.load(folder / "vocabulary.json"))

    @classmethod
    def from_tokenizer_json(
        cls, path: str | Path, vocabulary: Vocabulary | None = None, *, codes: int = 8192, bins: int = 1000
    ) -> Tokenizer:
        """From a `tokenizer.json` of the `tokenizers` library (byte-level BPE). Raises DataError for a damaged file."""
        text = _read_text(path)
        try:
            bpe = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exception for every malformed file
            raise DataError(f"Tokenizer: {str(path)!r} must be a tokenizer.json, got: {error}") from error
        if not isinstance(bpe.model, models.BPE):
            raise DataError(f"Tokenizer: {str(path)!r} must hold a byte-level BPE, got {type(bpe.model).__name__}")
        bpe.post_processor = None  # begin and end tokens belong to a merged group of slots, not to a text
        if vocabulary is None:
            vocabulary = Vocabulary.build(sorted(bpe.get_vocab().values()), codes=codes, bins=bins)
        return cls(bpe, vocabulary)

    # ------------------------------------------------------------------------------------------------------- use

    def encode(
        self, text: str, *, uncased: bool = False, no_punctuation: bool = False, max_length: int | None = None
    ) -> list[int]:
        """Vocabulary indices of one text, without begin and end tokens; max_length keeps the first so many tokens."""
        if not isinstance(text, str):
            raise OfakernTypeError(f"Tokenizer.encode: text must be str, got {type(text).__name__}")
        text = normalise_text(text, uncased=uncased, no_punctuation=no_punctuation)
        ids = self.bpe.encode(" " + text, add_special_tokens=False).ids
        return [self._index[i] for i in ids[:max_length]]

    def decode(self, indices: Iterable[int]) -> str:
        """The text of vocabulary indices: specials are dropped, symbols of other groups stand as they are written."""
        pieces: list[str] = []
        run: list[int] = []
        for index in indices:
            bpe_id = self._bpe_id.get(int(index))
            if bpe_id is not None:
                run.append(bpe_id)
            elif int(index) > self.vocabulary.unk:
                pieces += [self._decode_run(run), self.vocabulary.symbol(int(index))]
                run = []
        pieces.append(self._decode_run(run))
        return "".join(pieces).strip()

    def _decode_run(self, run: list[int]) -> str:
        return str(self.bpe.decode(run, skip_special_tokens=False)) if run else ""

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Tokenizer)
            and other.vocabulary == self.vocabulary
            and other.bpe.to_str() == self.bpe.to_str()
        )

    def __hash__(self) -> int:
        return hash(self.vocabulary)


class _Counted:
    """An iterator that counts, so that an empty corpus is an error instead of a byte-only tokenizer."""

    def __init__(self, texts: Iterator[str]) -> None:
        self._texts = texts
        self.count = 0

    def __iter__(self) -> Iterator[str]:
        for text in self._texts:
            self.count += 1
            yield text


def _valid(text: str) -> str:
    """Lone surrogates out: the library refuses them, and one damaged row must not stop the training of a vocabulary."""
    if not isinstance(text, str):
        raise OfakernTypeError(f"Tokenizer.train: texts must be str, got {type(text).__name__}")
    return text.encode("utf-8", "replace").decode("utf-8")


@contextmanager
def _single_threaded() -> Iterator[None]:
    """Training without the library's thread pool: a fork after it (DataLoader workers) would warn and disable it."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _byte_level(model: models.BPE) -> tokenizers.Tokenizer:
    bpe = tokenizers.Tokenizer(model)
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    bpe.decoder = decoders.ByteLevel()
    return bpe


def _merge(line: str, path: str | Path, number: int) -> tuple[str, str]:
    parts = line.split(" ")
    if len(parts) != 2:
        raise DataError(f"Tokenizer: {str(path)!r} line {number} must be two symbols, got {line!r}")
    return parts[0], parts[1]


def _read_text(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"Tokenizer: {str(path)!r} must be a readable UTF-8 file, got: {error}") from error


def _read_lines(path: str | Path) -> list[str]:
    # only "\n" ends a line: merges may hold other characters that str.splitlines would cut at
    return [line.rstrip("\r") for line in _read_text(path).split("\n")]


def _read_json(path: str | Path) -> dict[str, int]:
    try:
        data = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise DataError(f"Tokenizer: {str(path)!r} must be JSON, got: {error}") from error
    if not isinstance(data, dict) or not all(isinstance(i, int) for i in data.values()):
        raise DataError(f"Tokenizer: {str(path)!r} must map symbols to ids, got {type(data).__name__}")
    return data
