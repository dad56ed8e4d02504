"""Prepared requests to answers: searches of all kinds together, speech and motions by themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, Protocol, TypeVar

import torch
from torch.nn.utils.rnn import pad_sequence

from ofakern.checkpoint.denoise import made_motions
from ofakern.checkpoint.requests import Answer, PreparedRequest, prefix_of
from ofakern.data.batch import PackedBatch
from ofakern.data.example import PreprocessConfig
from ofakern.generate import SearchSession, SpecialTokens, best_candidates, generate_frames
from ofakern.generate.search import finish
from ofakern.instruction import Modality
from ofakern.modality.audio.postprocess import Speech
from ofakern.modality.output import Output
from ofakern.model import FrameWriter, Memory, OFAPlus, SegmentWriter

__all__ = ["answer_all", "encode_sources", "evaluating", "in_chunks"]

_T = TypeVar("_T")


class _Model(Protocol):
    """What answering needs of a `GeneralistModel`."""

    preprocess: PreprocessConfig

    @property
    def network(self) -> OFAPlus: ...

    @property
    def special_tokens(self) -> SpecialTokens: ...

    def search_session(self) -> SearchSession: ...

    def writer(self, key: tuple[str, int]) -> SegmentWriter: ...


@contextmanager
def evaluating(network: OFAPlus) -> Iterator[None]:
    """No dropout and no gradients inside; the mode is restored."""
    training = network.training
    network.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        network.train(training)


def in_chunks(items: Iterable[_T], size: int) -> Iterator[list[_T]]:
    """Lists of `size` items, the last one shorter."""
    rest = iter(items)
    while chunk := list(islice(rest, size)):
        yield chunk


def encode_sources(network: OFAPlus, prepared: Sequence[PreparedRequest]) -> Memory:
    """The encoder over the requests' sources, as one packed batch."""
    return network.encode(PackedBatch.collate([one.example for one in prepared]).source.to(network.device))


def answer_all(model: _Model, prepared: Sequence[PreparedRequest]) -> list[Answer]:
    """The requests' answers, in order. Whatever runs together: one session, each kind of writer with its own memory."""
    found: dict[int, Answer] = {}
    with evaluating(model.network):
        _search(model, {n: one for n, one in enumerate(prepared) if one.search is not None}, found)
        apart = {n: one for n, one in enumerate(prepared) if one.search is None}
        for numbers in _grouped(apart, lambda one: (id(one.recipe), id(one.automaton), one.config)):
            chosen = [prepared[n] for n in numbers]
            if chosen[0].config.all_candidates:
                found.update(zip(numbers, _score_all(model, chosen), strict=True))
                continue
            made = _speak if chosen[0].recipe.made is Modality.AUDIO else _move
            for number, outputs in zip(numbers, made(model, chosen), strict=True):
                found[number] = outputs if chosen[0].config.num_return_sequences > 1 else outputs[0]
    return [found[n] for n in range(len(prepared))]


def _grouped(prepared: Mapping[int, PreparedRequest], key: Callable[[PreparedRequest], Any]) -> list[list[int]]:
    groups: dict[Any, list[int]] = {}
    for number, one in prepared.items():
        groups.setdefault(key(one), []).append(number)
    return list(groups.values())


def _search(model: _Model, prepared: Mapping[int, PreparedRequest], found: dict[int, Answer]) -> None:
    session = model.search_session()
    numbers: dict[int, int] = {}
    for group in _grouped(prepared, lambda one: model.writer(one.writer_key)):
        chosen = [prepared[n] for n in group]
        requests = [one.search for one in chosen if one.search is not None]
        ids = session.add(encode_sources(model.network, chosen), requests, model.writer(chosen[0].writer_key))
        numbers.update(zip(ids, group, strict=True))
    for id, answers in finish(session).items():
        found[numbers[id]] = prepared[numbers[id]].read(answers)


def _score_all(model: _Model, prepared: Sequence[PreparedRequest]) -> list[Answer]:
    """Requests of one automaton whose candidates are all scored."""
    first = prepared[0]
    forced = [torch.tensor(prefix_of(one.example), dtype=torch.int64) for one in prepared]
    special = model.special_tokens
    answers = best_candidates(
        model.writer(first.writer_key),
        encode_sources(model.network, prepared),
        len(prepared),
        first.config,
        automaton=first.automaton,
        prefix=pad_sequence(forced, batch_first=True, padding_value=special.pad),
        special=special,
        max_positions=first.recipe.positions,
    )
    return [one.read(best) for one, best in zip(prepared, answers, strict=True)]


def _speak(model: _Model, prepared: Sequence[PreparedRequest]) -> Iterator[list[Output]]:
    network, preprocess = model.network, model.preprocess
    name = prepared[0].recipe.plan.target[0].slots[0].name
    writer = FrameWriter(network, *prepared[0].writer_key)
    memory = encode_sources(network, prepared)
    for answers in generate_frames(writer, memory, len(prepared), prepared[0].config, network.device):
        outputs = []
        for answer in answers:
            features = preprocess.audio.restore(answer.frames.cpu())
            speech = Speech(features, answer.stop, preprocess.speech_rate)
            outputs.append(Output(values={name: speech}, speech=speech))
        yield outputs


def _move(model: _Model, prepared: Sequence[PreparedRequest]) -> Iterator[list[Output]]:
    recipe = prepared[0].recipe
    slot, examples = recipe.plan.target[0].slots[0], [one.example for one in prepared]
    for answers in made_motions(model.network, recipe.encoder, slot, examples, prepared[0].config):
        yield [Output(values={slot.name: motion}, motion=motion) for motion in answers]
