"""Byte-level BPE against golden cases; training, saving, errors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ofakern.errors import DataError, OfakernTypeError, OfakernValueError
from ofakern.text import Tokenizer, Vocabulary

GOLDEN = Path(__file__).parents[1] / "golden"
RESOURCES = GOLDEN / "ofasys/main/resources"
PHONES = [line.split(" ")[0] for line in (RESOURCES / "tasks_tts_vocab.txt").read_text().splitlines()]
TEXTS = ["a red ball on the grass", "a red cat and a blue ball", "the cat sat on the red grass"] * 3


@pytest.fixture(scope="module")
def golden() -> Tokenizer:
    return Tokenizer.from_files(
        RESOURCES / "bpe_encoder.json",
        RESOURCES / "bpe_vocab.bpe",
        RESOURCES / "bpe_dict.txt",
        codes=64,
        bins=32,
        phones=PHONES,
    )


def test_vocabulary_equals_golden_dictionary(golden: Tokenizer) -> None:
    dictionary = json.loads((GOLDEN / "ofasys/main/dictionary.json").read_text())
    assert list(golden.vocabulary.symbols) == dictionary["symbols"]
    for group in ("text", "code", "bin", "phone"):
        span = golden.vocabulary.range(group)
        assert [span.start, span.stop] == dictionary["ranges"][f"<{group}>"]
    assert golden.vocabulary.mask == dictionary["ranges"]["<mask>"][0]


def test_golden_bpe_cases(golden: Tokenizer) -> None:
    for case in json.loads((GOLDEN / "data/text_cases.json").read_text())["bpe"]:
        assert golden.encode(case["text"]) == case["ids"]
        assert golden.decode(case["ids"]) == case["decoded"]


def test_golden_decoding_of_generated_tokens(golden: Tokenizer) -> None:
    decoded = [
        d for c in json.loads((GOLDEN / "data/preprocess_cases.json").read_text()).values() for d in c["decoded"]
    ]
    assert len(decoded) > 50
    for tokens, text in decoded:
        assert golden.decode(tokens) == text


def test_original_layout_has_59457_symbols() -> None:
    vocabulary = Vocabulary.build(range(50260))
    assert len(vocabulary) == 59457
    assert vocabulary.mask == 50264
    assert vocabulary.range("code") == range(50265, 58457)
    assert vocabulary.range("bin") == range(58457, 59457)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=40))
def test_any_text_survives_a_round_trip(text: str) -> None:
    tokenizer = _trained()
    assert tokenizer.decode(tokenizer.encode(text)) == text.strip()


def test_text_attributes(golden: Tokenizer) -> None:
    plain = golden.encode("the red ball")
    assert golden.encode(" The RED, ball! ", uncased=True, no_punctuation=True) == plain
    assert golden.encode("the red ball", max_length=2) == plain[:2]


def test_training_is_deterministic_across_processes() -> None:
    code = f"from ofakern.text import Tokenizer\nt = Tokenizer.train({TEXTS!r}, 300)\nprint(t.bpe.to_str())"
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(2)]
    assert runs[0].stdout == runs[1].stdout == _trained().bpe.to_str() + "\n"


def test_save_and_load(tmp_path: Path, golden: Tokenizer) -> None:
    for number, tokenizer in enumerate((golden, _trained())):
        tokenizer.save_pretrained(tmp_path / str(number))
        again = Tokenizer.from_pretrained(tmp_path / str(number))
        assert again == tokenizer
        assert again.encode("a red ball, 3 caf\u00e9s") == tokenizer.encode("a red ball, 3 caf\u00e9s")


def test_vocabulary_sizes_of_a_trained_tokenizer() -> None:
    tokenizer = _trained()
    assert 256 < len(tokenizer.vocabulary.range("text")) <= 300
    assert len(tokenizer.vocabulary.range("bin")) == 1000
    assert len(tokenizer.vocabulary.range("code")) == 0


def test_errors(tmp_path: Path, golden: Tokenizer) -> None:
    with pytest.raises(OfakernTypeError, match="text must be str, got int"):
        golden.encode(3)  # type: ignore[arg-type]
    with pytest.raises(OfakernValueError, match="vocab_size must be at least 256"):
        Tokenizer.train(TEXTS, 100)
    with pytest.raises(OfakernTypeError, match="texts must be str, got int"):
        Tokenizer.train([1], 300)  # type: ignore[list-item]
    assert Tokenizer.train(["a \ud800 b"], 256).encode("a b")
    with pytest.raises(DataError, match="at least one text"):
        Tokenizer.train([], 300)
    with pytest.raises(DataError, match="must be a readable"):
        Tokenizer.from_files(tmp_path / "none.json", RESOURCES / "bpe_vocab.bpe")
    with pytest.raises(DataError, match="must be JSON"):
        Tokenizer.from_files(RESOURCES / "bpe_vocab.bpe", RESOURCES / "bpe_vocab.bpe")
    with pytest.raises(OfakernValueError, match="must hold <text>_<id>"):
        Tokenizer(golden.bpe, Vocabulary.build(range(10)))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="must be a tokenizer.json"):
        Tokenizer.from_tokenizer_json(tmp_path / "tokenizer.json")
    with pytest.raises(DataError, match="must hold a vocabulary"):
        Vocabulary.load(tmp_path / "vocabulary.json")


def test_vocabulary_errors() -> None:
    with pytest.raises(OfakernValueError, match="must begin with"):
        Vocabulary(["a"])
    with pytest.raises(OfakernValueError, match="must be unique"):
        Vocabulary(["<s>", "<pad>", "</s>", "<unk>", "<text>_0", "<text>_0"])
    with pytest.raises(OfakernValueError, match="must be contiguous"):
        Vocabulary(["<s>", "<pad>", "</s>", "<unk>", "<text>_0", "<mask>", "<text>_1"])
    vocabulary = Vocabulary.build(range(3), codes=0, bins=2)
    with pytest.raises(OfakernValueError, match="must be in the vocabulary"):
        vocabulary.index("<bin>_2")
    with pytest.raises(OfakernValueError, match="must be in"):
        vocabulary.symbol(-1)


_cache: list[Tokenizer] = []


def _trained() -> Tokenizer:
    if not _cache:
        _cache.append(Tokenizer.train(TEXTS, 300))
    return _cache[0]
