"""The same answers as transformers' `generate`, where both mean the same, on a small T5."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from ofakern.generate import GenerationConfig, Hypothesis, SpecialTokens, generate

transformers = pytest.importorskip("transformers")

SPECIAL = SpecialTokens(bos=0, pad=0, eos=1, unk=2)
LONGEST = 24
SAMPLES = 6


class State:
    def __init__(self, rows: Tensor) -> None:
        self.rows = rows
        self.tokens = torch.zeros(len(rows), 0, dtype=torch.int64)

    def reorder(self, index: Tensor) -> None:
        self.rows, self.tokens = self.rows[index], self.tokens[index]


class Decoder:
    """T5 as a search sees it, the whole target at every step."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def begin_decode(self, memory: Tensor, rows_per_sample: int | Sequence[int], max_length: int) -> State:
        self.memory = memory
        return State(torch.arange(len(memory)).repeat_interleave(torch.tensor(rows_per_sample)))

    def decode_step(self, state: State, tokens: Tensor) -> Tensor:
        state.tokens = torch.cat((state.tokens, tokens[:, None]), 1)
        encoded = transformers.modeling_outputs.BaseModelOutput(self.memory[state.rows])
        logits: Tensor = self.model(encoder_outputs=encoded, decoder_input_ids=state.tokens).logits[:, -1]
        return logits


@pytest.fixture(scope="module")
def model() -> Iterator[Any]:
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=40, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, tie_word_embeddings=False
    )
    made = transformers.T5ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if weight.ndim == 2 and "relative" not in name:
                torch.nn.init.normal_(weight, std=0.6 if "lm_head" in name else 0.35)

    def end_more_and_more(module: Any, args: Any, logits: Tensor) -> Tensor:
        rising = torch.zeros_like(logits)
        rising[..., SPECIAL.eos] = 0.5 * torch.arange(logits.shape[1])
        return logits + rising

    made.lm_head.register_forward_hook(end_more_and_more)
    yield made


def both(model: Any, ours: dict[str, Any], theirs: dict[str, Any]) -> tuple[list[list[Hypothesis]], Any]:
    source = torch.randint(2, 40, (SAMPLES, 7), generator=torch.Generator().manual_seed(1))
    expected = model.generate(
        source,
        max_new_tokens=LONGEST,
        return_dict_in_generate=True,
        use_cache=False,
        output_scores=True,
        decoder_start_token_id=SPECIAL.bos,
        pad_token_id=SPECIAL.pad,
        eos_token_id=SPECIAL.eos,
        **{"do_sample": False, "suppress_tokens": [0], **theirs},
    )
    with torch.inference_mode():
        memory = model.encoder(source).last_hidden_state
    config = GenerationConfig(max_new_tokens=LONGEST - 1, no_repeat_ngram_size=0).replace(**ours)
    return generate(Decoder(model), memory, SAMPLES, config, special=SPECIAL), expected


def check(model: Any, settings: dict[str, Any]) -> None:
    found, expected = both(model, settings, settings)
    answers = [answer for own in found for answer in own]
    ended = 0
    for number, (answer, tokens) in enumerate(zip(answers, expected.sequences.tolist(), strict=True)):
        body = tokens[1:]
        if 1 not in body:  # cut there, ended by force here
            assert list(answer.tokens[: LONGEST - 1]) == body[: LONGEST - 1]
            continue
        ended += 1
        assert list(answer.tokens) == body[: body.index(1) + 1]
        if "sequences_scores" in expected:
            assert answer.score == pytest.approx(float(expected.sequences_scores[number]), abs=1e-4)
    assert ended >= 3, "answers must end by themselves"


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 1},
        {"num_beams": 1, "no_repeat_ngram_size": 2},
        {"num_beams": 1, "repetition_penalty": 1.7},
        {"num_beams": 1, "min_new_tokens": 5},
        {"num_beams": 1, "suppress_tokens": [0, 5, 6, 7, 8, 9, 10]},
        {"num_beams": 1, "begin_suppress_tokens": list(range(2, 20))},
        {"num_beams": 1, "bad_words_ids": [[5], [9, 11], [20, 21]]},
    ],
)
def test_greedy(model: Any, settings: dict[str, Any]) -> None:
    check(model, settings)


@pytest.mark.parametrize("early", [False, "never"])
@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0])
def test_beams(model: Any, early: Any, penalty: float) -> None:
    """With early_stopping=True fairseq's rule, which is ours, takes other answers where too many end in one step."""
    check(model, {"num_beams": 4, "early_stopping": early, "length_penalty": penalty, "num_return_sequences": 3})
