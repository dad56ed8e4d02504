"""Recorded cases of OFA's Hugging Face port (the same numbers hold for its fairseq and ModelScope versions).

Layout: `config.json`, `model.fp16.safetensors`, `summary.json` (losses, gradient norms), `generate.json` (answers) and
per case `case_<name>.safetensors` with its inputs `in.*`, states, logits, biases and gradients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from ofakern.checkpoint.golden import read_json
from ofakern.checkpoint.golden_answers import EOS, SPECIALS, Cut, id_range
from ofakern.checkpoint.ledger import Ledger
from ofakern.checkpoint.ofa_hf import config_from_hf, fairseq_changes, hf_key, load_hf_weights
from ofakern.checkpoint.ofasys import PAD
from ofakern.checkpoint.parity import CaseResult, Check, RelativeBias, compare, gradient_check, traced
from ofakern.data.batch import IGNORE_LABEL, Allowed, Example, PackedBatch, Segment
from ofakern.errors import DataError
from ofakern.generate import (
    ChoiceTokens,
    GenerationConfig,
    Hypothesis,
    RangeTokens,
    TokenAutomaton,
    compile_target,
    generate,
)
from ofakern.instruction.modality import Modality
from ofakern.model import OFAPlus
from ofakern.model.stacks import Memory
from ofakern.nn.loss import LossSums, label_smoothed_cross_entropy

WEIGHTS = "model.fp16.safetensors"
TRAINED = "trainmode_"
VARIANTS = "fairseq_variants"
VARIANT_INPUTS = "imgtext_b2_mask01.canonical"
_CANONICAL = ".canonical"
_STRIDE = 16


def is_hf(directory: Path) -> bool:
    return (directory / WEIGHTS).is_file()


def case_names(directory: Path) -> list[str]:
    """The cases, and the recorded searches as `generate:<name>`."""
    cases = sorted(p.stem.removeprefix("case_") for p in directory.glob("case_*.safetensors"))
    searches = read_json(directory / "generate.json") if (directory / "generate.json").is_file() else {}
    variants = read_json(directory / f"{VARIANTS}.json") if (directory / f"{VARIANTS}.json").is_file() else {}
    names = [n for n in cases if n != VARIANTS]
    return names + [f"fairseq:{n}" for n in variants] + [f"generate:{n}" for n in searches]


def load_hf_model(
    directory: Path, backend: str = "auto", extra: Mapping[str, Tensor] | None = None, **changes: Any
) -> OFAPlus:
    """The recorded model in eval mode. extra: tensors beside the stored ones; changes: fields of its configuration."""
    config = replace(config_from_hf(read_json(directory / "config.json")), **changes)
    model = OFAPlus(config, backend=backend).eval()
    load_hf_weights(model, Ledger({**load_file(directory / WEIGHTS), **(extra or {})}, str(directory)))
    return model


@dataclass(frozen=True)
class HfCase:
    """A case's arrays and its batch. honour_masks: an image whose mask is False is left out (the port has it in)."""

    name: str
    arrays: Mapping[str, Tensor]
    honour_masks: bool

    @classmethod
    def read(cls, directory: Path, name: str) -> HfCase:
        path = directory / f"case_{name}.safetensors"
        if not path.is_file():
            raise DataError(f"parity: case must have a file {path}, got none")
        arrays = load_file(path)
        if name.startswith(TRAINED):
            inputs = load_file(directory / f"case_{name.removeprefix(TRAINED)}.safetensors")
            arrays |= {key: value for key, value in inputs.items() if key.startswith("in.")}
        return cls(name, arrays, name.endswith(_CANONICAL))

    @property
    def samples(self) -> int:
        return int(self.arrays["in.input_ids"].shape[0])

    def batch(self, samples: Sequence[int]) -> PackedBatch:
        return PackedBatch.collate([self._example(b) for b in samples])

    def rows(self, source: bool, samples: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(sample, padded position) of every packed row."""
        owners, places = [], []
        for b in samples:
            if source:
                patches = self._patches()
                kept = torch.arange(patches) if self._has_image(b) else torch.arange(0)
                place = torch.cat([kept, patches + torch.arange(len(self._text("in.input_ids", b)))])
            else:
                place = torch.arange(len(self._text("in.decoder_input_ids", b)))
            owners.append(torch.full_like(place, b))
            places.append(place)
        return torch.cat(owners), torch.cat(places)

    def _text(self, key: str, b: int) -> Tensor:
        tokens = self.arrays[key][b]
        return tokens[: int((tokens != PAD).sum())]

    def _patches(self) -> int:
        if "in.patch_orders" in self.arrays:
            return int(self.arrays["in.patch_orders"].shape[1])
        images = self.arrays.get("in.patch_images")
        return 0 if images is None else -(-images.shape[2] // _STRIDE) * -(-images.shape[3] // _STRIDE)

    def _has_image(self, b: int) -> bool:
        if "in.patch_images" not in self.arrays:
            return False
        return not self.honour_masks or bool(self.arrays["in.patch_masks"][b])

    def _example(self, b: int) -> Example:
        source = []
        if self._has_image(b):
            orders = self.arrays.get("in.patch_orders")
            image = self.arrays["in.patch_images"][b]
            positions = None if orders is None else orders[b]
            source.append(Segment(0, "image_resnet", int(Modality.IMAGE), image, self._patches(), positions))
        source.append(Segment(1, "text", int(Modality.TEXT), self._text("in.input_ids", b)))
        tokens = self._text("in.decoder_input_ids", b)
        codes = "in.code_masks" in self.arrays and bool(self.arrays["in.code_masks"][b])
        adaptor, modality = ("image_vqgan", Modality.IMAGE) if codes else ("text", Modality.TEXT)
        labels = self.arrays["in.target"][b][: len(tokens)]
        target = [Segment(2, adaptor, int(modality), tokens)]
        return Example(source, target, labels.masked_fill(labels == PAD, IGNORE_LABEL))


def run_hf_case(directory: Path, name: str, model: OFAPlus) -> CaseResult:
    """All checks of a case, or of a recorded search (`generate:<name>`)."""
    if name.startswith("generate:"):
        return run_search(directory, name, model)
    if name.startswith("fairseq:"):
        return run_fairseq_variant(directory, name, model.encoder.backend)
    case = HfCase.read(directory, name)
    result = CaseResult(name)
    summary = read_json(directory / "summary.json")
    if name.startswith(TRAINED):
        trained = load_hf_model(directory, model.encoder.backend, dropout=0.0).train()
        result.checks += _trained_checks(trained, case, summary[f"train_mode_dropout0_{name.removeprefix(TRAINED)}"])
        return result
    model.zero_grad(set_to_none=True)
    everyone = range(case.samples)
    batch = case.batch(everyone)
    with traced(model) as (encoder, decoder):
        memory = model.encode(batch.source)
        hidden = model.decode(batch.target, memory)
    result.checks += _states(case, "encoder", encoder.states, True)
    result.checks += _states(case, "decoder", decoder.states, False)
    result.checks.append(_rows_check(case, "encoder", "encoder_last_hidden_state", memory.states, True, everyone))
    result.checks.append(_rows_check(case, "logits", "logits", model.logits(hidden), False, everyone))
    assert encoder.positions is not None and decoder.positions is not None
    result.checks += _bias_checks(model, case, batch, encoder.positions, decoder.positions, memory)
    result.checks += _loss_checks(model, case, batch, hidden, summary[name])
    result.checks += _order_checks(model, case)
    return result


def _rows_check(case: HfCase, group: str, key: str, ours: Tensor, source: bool, samples: Sequence[int]) -> Check:
    owner, place = case.rows(source, samples)
    return compare(group, f"{key} of {list(samples)}", ours, case.arrays[key][owner, place].numpy())


def _states(case: HfCase, side: str, states: Sequence[Tensor], source: bool) -> list[Check]:
    everyone = range(case.samples)
    names = [f"{side}_hidden_states.{number}" for number in range(len(states))]
    pairs = [(name, state) for name, state in zip(names, states, strict=True) if name in case.arrays]
    return [_rows_check(case, side, name, state, source, everyone) for name, state in pairs]


def _bias_checks(
    model: OFAPlus, case: HfCase, batch: PackedBatch, source: Tensor, target: Tensor, memory: Memory
) -> list[Check]:
    """The dense biases that tables, coordinates and factored positions stand for."""
    checks = []
    for key in sorted(k for k in case.arrays if k.startswith("bias.")):
        _, side, _, layer, attention, _ = key.split(".")
        stack = model.encoder if side == "encoder" else model.decoder
        scale = float(stack.get_submodule("layers.0.self_attn").scale)  # type: ignore[arg-type]
        recorded = case.arrays[key].view(case.samples, -1, *case.arrays[key].shape[1:])
        ours, theirs = [], []
        if attention == "cross_attn":
            q_pos, k_pos = model.decoder.cross_queries(target), model.decoder.cross_keys(memory.positions)
            relative = None
        else:
            group = stack.adaptor
            side_batch = batch.source if side == "encoder" else batch.target
            q_pos, k_pos = group.factored(source if side == "encoder" else target)
            plan = group.plan(side_batch)
            relative = RelativeBias(plan.layout, group.tables(plan.blocks)[int(layer)])
        assert q_pos is not None and k_pos is not None
        queries = case.rows(side == "encoder", range(case.samples))
        keys = queries if relative is not None else case.rows(True, range(case.samples))
        for b in range(case.samples):
            q_rows, k_rows = (torch.nonzero(owner == b)[:, 0] for owner, _ in (queries, keys))
            bias = scale * torch.einsum("ihp,jhp->hij", q_pos[q_rows], k_pos[k_rows])
            if relative is not None:
                bias = bias + relative.dense(slice(int(q_rows[0]), int(q_rows[-1]) + 1))
            seen = torch.ones(bias.shape[1:], dtype=torch.bool)
            if side == "decoder" and relative is not None:
                seen = seen.tril()
            ours.append(bias[:, seen].flatten())
            found = recorded[b][:, queries[1][q_rows][:, None], keys[1][k_rows][None, :]]
            theirs.append(found[:, seen].flatten())
        checks.append(compare("bias", key, torch.cat(ours), torch.cat(theirs).numpy()))
    return checks


def _loss_checks(
    model: OFAPlus, case: HfCase, batch: PackedBatch, hidden: Tensor, summary: Mapping[str, Any]
) -> list[Check]:
    checks = []
    for name, recorded in summary["losses"].items():
        sums = _loss(model, batch, hidden, name)
        values = {"loss_sum": sums.loss.detach(), "nll_sum": sums.nll, "ntokens": sums.tokens}
        checks += [compare("loss", f"{name} {k}", v, np.array(recorded[k])) for k, v in values.items()]
    sums = _loss(model, batch, hidden, "eps0.1")
    return checks + _gradients(model, sums.loss / float(sums.tokens), case, summary.get("grad_norms_eval") or {})


def _loss(model: OFAPlus, batch: PackedBatch, hidden: Tensor, name: str) -> LossSums:
    """eps<e>, eps<e>_dropworst<r> or eps<e>_range<s>_<e>."""
    epsilon, _, variant = name.removeprefix("eps").partition("_")
    drop, allowed = 0.0, None
    if variant.startswith("dropworst"):
        drop = float(variant.removeprefix("dropworst"))
    elif variant.startswith("range"):
        lo, hi = map(int, variant.removeprefix("range").split("_"))
        ids = torch.cat([torch.arange(SPECIALS), torch.arange(lo, hi)])
        count = batch.labels.shape[0]
        allowed = Allowed(torch.arange(count + 1) * len(ids), ids.repeat(count))
    return label_smoothed_cross_entropy(
        hidden, model.output_weight, batch.labels, float(epsilon), allowed, drop_worst=drop
    )


def _gradients(model: OFAPlus, loss: Tensor, case: HfCase, norms: Mapping[str, float]) -> list[Check]:
    recorded = {key.removeprefix("grad."): value for key, value in case.arrays.items() if key.startswith("grad.")}
    if not recorded and not norms:
        return []
    loss.backward()  # type: ignore[no-untyped-call]
    found = _named_gradients(model)
    largest = max([*norms.values(), *(float(value.abs().max()) for value in recorded.values())])
    checks = []
    for name, value in recorded.items():
        ours = found.get(name, torch.zeros_like(value))
        checks.append(gradient_check("gradients", name, ours, value.numpy(), 1e-7 * largest))
    for name in sorted(set(norms) | set(found)) if norms else ():
        norm = found[name].double().norm() if name in found else torch.zeros(())
        checks.append(gradient_check("gradient norms", name, norm, np.array(norms.get(name, 0.0)), 1e-7 * largest))
    model.zero_grad(set_to_none=True)
    return checks


def _named_gradients(model: OFAPlus) -> dict[str, Tensor]:
    """By the port's names; its two type embeddings are one tensor."""
    found, types = {}, {}
    for key, parameter in model.named_parameters():
        if key.startswith("encoder.adaptor.") and key.endswith("type_embedding.weight"):
            grad = parameter.grad
            types[key.split(".")[2]] = torch.zeros_like(parameter) if grad is None else grad
        elif parameter.grad is not None:
            found[hf_key(key)] = parameter.grad
    found["encoder.type_embedding.weight"] = torch.cat([types["text"], types["image_resnet"]])
    return found


def _trained_checks(model: OFAPlus, case: HfCase, summary: Mapping[str, Any]) -> list[Check]:
    """Batch norm over the batch, and the running statistics after one step."""
    everyone = range(case.samples)
    batch = case.batch(everyone)
    memory = model.encode(batch.source)
    hidden = model.decode(batch.target, memory)
    checks = [
        _rows_check(case, "encoder", "encoder_last_hidden_state", memory.states, True, everyone),
        _rows_check(case, "logits", "logits", model.logits(hidden), False, everyone),
    ]
    sums = _loss(model, batch, hidden, "eps0.1")
    mean = sums.loss / float(sums.tokens)
    checks.append(compare("loss", "loss_mean", mean.detach(), np.array(summary["loss_mean"])))
    checks += _gradients(model, mean, case, summary["grad_norms"])
    state = {hf_key(key): value for key, value in model.state_dict().items()}
    for key, value in case.arrays.items():
        if key.startswith("after."):
            name = key.removeprefix("after.")
            checks.append(compare("running statistics", name, state[name], value.numpy()))
    return checks


@torch.no_grad()
def _order_checks(model: OFAPlus, case: HfCase) -> list[Check]:
    """Each sample alone, the batch reversed, and one token at a time."""
    checks = []
    orders = [[b] for b in range(case.samples)] + [list(reversed(range(case.samples)))]
    for samples in orders:
        batch = case.batch(samples)
        memory = model.encode(batch.source)
        logits = model.logits(model.decode(batch.target, memory))
        checks.append(_rows_check(case, "any order", "encoder_last_hidden_state", memory.states, True, samples))
        checks.append(_rows_check(case, "any order", "logits", logits, False, samples))
        if len(samples) == 1:
            segment = batch.target.segments[0]
            length = batch.target.tokens
            state = model.begin_decode(
                memory, 1, length, modality=int(segment.adaptor != "text") + 1, adaptor=segment.adaptor
            )
            steps = torch.cat([model.decode_step(state, segment.value[t : t + 1]) for t in range(length)])
            checks.append(_rows_check(case, "incremental", "logits", steps, False, samples))
    return checks


def run_fairseq_variant(directory: Path, name: str, backend: str = "auto") -> CaseResult:
    """What only OFA's fairseq version has: outputs, each sample alone and one token at a time."""
    variant = name.removeprefix("fairseq:")
    arguments = read_json(directory / f"{VARIANTS}.json")[variant]["args"]
    arrays = load_file(directory / f"case_{VARIANTS}.safetensors")
    start = f"{variant}.param."
    extra = {key.removeprefix(start): value for key, value in arrays.items() if key.startswith(start)}
    config = config_from_hf(read_json(directory / "config.json"))
    model = load_hf_model(directory, backend, extra, **fairseq_changes(arguments, config))
    inputs = HfCase.read(directory, VARIANT_INPUTS)
    recorded = {k: v for k, v in inputs.arrays.items() if k.startswith("in.")}
    recorded |= {"encoder_last_hidden_state": arrays[f"{variant}.encoder_out"], "logits": arrays[f"{variant}.logits"]}
    return CaseResult(name, _order_checks(model, replace(inputs, name=name, arrays=recorded)))


_SAME_SETTINGS = {
    "beam_size": "num_beams",
    "max_len_b": "max_new_tokens",
    "min_len": "min_new_tokens",
    "no_repeat_ngram_size": "no_repeat_ngram_size",
    "len_penalty": "length_penalty",
    "temperature": "temperature",
    "unk_penalty": "unk_penalty",
}


def run_search(directory: Path, name: str, model: OFAPlus) -> CaseResult:
    """The recorded answers of a search: the same tokens, scores to 1e-4."""
    entry = read_json(directory / "generate.json")[name.removeprefix("generate:")]
    result = CaseResult(name)
    case = HfCase.read(directory, entry["case"])
    if "hypos" not in entry:
        result.checks += _transformers_checks(model, case, entry)
        return result
    case = replace(case, honour_masks=bool(entry["canonical_patch_masks"]))
    found = answers(model, case, entry)
    for b, sample in enumerate(entry["hypos"]):
        for n, expected in enumerate(sample):
            got, label = found[b][n], f"{b}.{n}"
            result.checks.append(compare("tokens", label, np.array(got.tokens), np.array(expected["tokens"])))
            result.checks.append(compare("scores", label, np.array(got.score), np.array(expected["score"])))
            steps = np.array(expected["positional_scores"])
            result.checks.append(compare("token scores", label, np.array(got.token_scores), steps, floor=1e-4))
    return result


def _transformers_checks(model: OFAPlus, case: HfCase, entry: Mapping[str, Any]) -> list[Check]:
    """transformers' own search: it goes on while a beam may still win; an end that the length forces costs nothing."""
    kwargs = entry["kwargs"]
    config = GenerationConfig(
        num_beams=kwargs["num_beams"],
        max_new_tokens=kwargs["max_new_tokens"] - 1,
        no_repeat_ngram_size=kwargs.get("no_repeat_ngram_size", 0),
        early_stopping=False,
        compat="ofasys",
    )
    with torch.no_grad():
        memory = model.encode(case.batch(range(case.samples)).source)
    cut = Cut(model, "text", int(Modality.TEXT), free_end=config.max_new_tokens)
    found = generate(cut, memory, case.samples, config)
    checks = []
    for b, sequence in enumerate(entry["sequences"]):
        tokens = [token for token in sequence[1:] if token != PAD]
        checks.append(compare("tokens", f"{b}", np.array(found[b][0].tokens), np.array(tokens)))
        if entry["sequences_scores"] is not None:
            score = np.array(entry["sequences_scores"][b])
            checks.append(compare("scores", f"{b}", np.array(found[b][0].score), score))
    return checks


def answers(model: OFAPlus, case: HfCase, entry: Mapping[str, Any]) -> list[list[Hypothesis]]:
    """Our search with the settings of a recorded one."""
    kwargs = entry["kwargs"]
    settings: dict[str, Any] = {ours: kwargs[theirs] for theirs, ours in _SAME_SETTINGS.items() if theirs in kwargs}
    settings.setdefault("no_repeat_ngram_size", 0)
    settings.setdefault("min_new_tokens", 1)
    if kwargs.get("normalize_scores") is False:
        settings["length_penalty"] = 0.0
    config = GenerationConfig(**settings, num_return_sequences=settings["num_beams"], compat="ofasys")
    ids, codes_out = id_range(kwargs.get("constraint_range")), bool(kwargs.get("gen_code"))
    kind = ("image_vqgan", Modality.IMAGE) if codes_out else ("text", Modality.TEXT)
    automaton: TokenAutomaton | None = None
    if "constraint_trie_sequences" in kwargs:
        choices = tuple(tuple(sequence[1:-1]) for sequence in kwargs["constraint_trie_sequences"])
        automaton = compile_target([ChoiceTokens(choices)], eos=EOS, vocabulary_size=model.config.vocab_size)
        if kwargs.get("zero_shot"):
            automaton = automaton.unnormalised()
    if codes_out:  # no special token before the last step, but probabilities count them
        assert ids is not None
        codes = RangeTokens(*ids, settings["max_new_tokens"])
        automaton = compile_target([codes], eos=EOS, vocabulary_size=model.config.vocab_size)
    prefix = torch.tensor(entry["prefix_tokens"]) if entry["prefix_tokens"] else None
    with torch.no_grad():
        memory = model.encode(case.batch(range(case.samples)).source)
    return generate(
        Cut(model, kind[0], int(kind[1]), ids), memory, case.samples, config, automaton=automaton, prefix=prefix
    )
