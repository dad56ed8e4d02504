"""Other libraries' beam search, where they are installed: a BART of the case's size with random weights.

It is another model: no position biases, no norms beyond a layer's own, tokens instead of an image. It has the case's
layers, widths, heads, vocabulary, source length, beams and steps, so that a step multiplies and reads as much as ours
does, and less where ours has biases. `transformers` runs `generate` on SDPA in the case's dtype; CTranslate2 runs what
its converter makes of the same weights, in the types that it has on CPUs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from benchmarks.core import Contender, Unavailable

BOS, PAD, EOS = 0, 1, 2
ABOUT = {
    "transformers": "another model, a BART of this size: transformers' generate, SDPA, the encoder run once before "
    "`decode`",
    "ctranslate2": "the same BART converted to CTranslate2, float32 (it has no bfloat16 on CPUs); it encodes in the "
    "same call",
    "ctranslate2_int8": "the same with int8 weights",
}
_COMPUTE_TYPES = {"ctranslate2": "float32", "ctranslate2_int8": "int8_float32"}


@dataclass
class Case:
    """What a library is given. steps: decoder steps, the end of sequence included."""

    config: dict[str, Any]
    tokens: Tensor
    beams: int
    steps: int
    dtype: torch.dtype

    @cached_property
    def model(self) -> Any:
        """float32, whatever the case's dtype: weights of a fixed seed."""
        transformers = _installed("transformers", "transformers")
        torch.manual_seed(1)
        return transformers.BartForConditionalGeneration(
            transformers.BartConfig(**self.config, attn_implementation="sdpa")
        ).eval()


def case_of(spec: Any, dtype: torch.dtype) -> Case:
    """Of a spec of `bench_generate`. Raises Unavailable for cases that are no beam search."""
    if spec.codes or spec.candidates:
        raise Unavailable("beams only")
    c = spec.config()
    config = {
        **{"vocab_size": c.vocab_size, "d_model": c.dim, "max_position_embeddings": max(1024, spec.length)},
        **{"encoder_layers": c.encoder_layers, "decoder_layers": c.decoder_layers},
        **{"encoder_attention_heads": c.heads, "decoder_attention_heads": c.heads},
        **{"encoder_ffn_dim": c.ffn_dim, "decoder_ffn_dim": c.ffn_dim, "dropout": 0.0},
        **{"bos_token_id": BOS, "pad_token_id": PAD, "eos_token_id": EOS, "decoder_start_token_id": BOS},
        "forced_eos_token_id": None,
        "normalize_before": False,  # a field of BART's published configs that CTranslate2's converter reads
    }
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(4, c.vocab_size, (spec.batch, spec.length), generator=generator)
    return Case(config, tokens, spec.beams, spec.tokens + 1, dtype)


def _installed(module: str, package: str) -> Any:
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise Unavailable(f"{package} is not installed (pip install 'ofakern[bench]')") from error


@torch.inference_mode()
def _generate(model: Any, case: Case, **inputs: Any) -> Tensor:
    made = model.generate(
        attention_mask=torch.ones_like(case.tokens),
        num_beams=case.beams,
        min_new_tokens=case.steps,
        max_new_tokens=case.steps,
        do_sample=False,
        length_penalty=0.0,
        early_stopping=True,
        return_dict_in_generate=True,
        output_scores=True,
        **inputs,
    )
    scores: Tensor = made.sequences_scores
    assert made.sequences.shape[1] == 1 + case.steps
    return scores


def transformers_peer(case: Case, whole: bool) -> Contender:
    """whole: the case has no image, so that the model's own encoder is as long as ours."""
    model = copy.deepcopy(case.model).to(case.dtype)
    outputs = import_module("transformers.modeling_outputs")
    with torch.inference_mode():
        states = model.get_encoder()(case.tokens).last_hidden_state

    def decode() -> Tensor:
        given = outputs.BaseModelOutput(last_hidden_state=states)  # generate puts its own expansion into it
        return _generate(model, case, encoder_outputs=given)

    steps = {"decode": decode} | ({"whole": lambda: _generate(model, case, input_ids=case.tokens)} if whole else {})
    return Contender("transformers", decode, exact=False, steps=steps)


def ctranslate2_peer(name: str, case: Case, whole: bool) -> Contender:
    if not whole:
        raise Unavailable("it encodes and decodes in one call, and its model has no image")
    ready = translator(name, case)

    def run() -> Tensor:
        return torch.tensor([one.scores[0] for one in translate(ready, case)])

    return Contender(name, run, exact=False, steps={"whole": run})


def translate(ready: Any, case: Case) -> list[Any]:
    """CTranslate2's results, a best hypothesis of `case.steps` tokens in each."""
    made: list[Any] = ready.translate_batch(
        [[f"t{token}" for token in row] for row in case.tokens.tolist()],
        beam_size=case.beams,
        min_decoding_length=case.steps,
        max_decoding_length=case.steps,
        max_input_length=0,
        length_penalty=0.0,
        return_scores=True,
    )
    assert all(len(one.hypotheses[0]) == case.steps for one in made)
    return made


def translator(name: str, case: Case) -> Any:
    """The case's model, converted by way of a folder that is gone afterwards."""
    ctranslate2 = _installed("ctranslate2", "ctranslate2")
    kind = _COMPUTE_TYPES[name]
    if kind not in ctranslate2.get_supported_compute_types("cpu"):
        raise Unavailable(f"CTranslate2 has no {kind} on this CPU")
    with TemporaryDirectory() as folder:
        saved, converted = Path(folder) / "bart", Path(folder) / "converted"
        case.model.save_pretrained(saved)
        _tokenizer(case.config["vocab_size"]).save_pretrained(saved)
        converter = _installed("ctranslate2.converters", "ctranslate2").TransformersConverter(str(saved))
        converter.convert(str(converted), quantization=kind)
        threads = torch.get_num_threads()
        return ctranslate2.Translator(str(converted), "cpu", compute_type=kind, intra_threads=threads)


def _tokenizer(size: int) -> Any:
    """Words `t0`, `t1`, ... for the ids: the converter wants a name for each."""
    tokenizers, transformers = import_module("tokenizers"), import_module("transformers")
    special = {BOS: "<s>", PAD: "<pad>", EOS: "</s>", 3: "<unk>"}
    words = {special.get(n, f"t{n}"): n for n in range(size)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


PEERS: dict[str, Callable[[Case, bool], Contender]] = {
    "transformers": transformers_peer,
    **{name: lambda case, whole, name=name: ctranslate2_peer(name, case, whole) for name in _COMPUTE_TYPES},
}
