"""Prepared requests to answers: searches of all kinds together, speech and motions by themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, Protocol

import torch
from torch.nn.utils.rnn import pad_sequence

from ofakern.checkpoint.denoise import made_motions
from ofakern.checkpoint.requests import Answer, PreparedRequest, prefix_of
from ofakern.data.batch import PackedBatch
from ofakern.data.example import PreprocessConfig
from ofakern.generate import Finished, SearchSession, SpecialTokens, best_candidates, generate_frames
from ofakern.instruction import Modality
from ofakern.modality.audio.postprocess import Speech
from ofakern.modality.output import Output
from ofakern.model import FrameWriter, Memory, OFAPlus, SegmentWriter

__all__ = ["answer_all", "encode_sources", "evaluating"]


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


def encode_sources(network: OFAPlus, prepared: Sequence[PreparedRequest]) -> Memory:
    """The encoder over the requests' sources, as one packed batch."""
    return network.encode(PackedBatch.collate([one.example for one in prepared]).source.to(network.device))


def answer_all(
    model: _Model, prepared: Iterable[PreparedRequest], batch_size: int, *, in_batches: bool = False
) -> list[Answer]:
    """The requests' answers, in order; at most `batch_size` of them run at a time, those of searches in one session.

    As soon as half of them have ended others take their places. in_batches: only when all have (OFASys's forced
    prefixes depend on what is in the batch).
    """
    found: dict[int, Answer] = {}
    running: dict[int, tuple[int, PreparedRequest]] = {}
    waiting, session = enumerate(prepared), model.search_session()
    with evaluating(model.network):
        while True:
            if session.running <= (0 if in_batches else batch_size // 2):
                chunk = dict(islice(waiting, batch_size - session.running))
                if not chunk and not session.running:
                    return [found[number] for number in range(len(found))]
                _start(model, session, {n: one for n, one in chunk.items() if one.search is not None}, running)
                _make(model, {n: one for n, one in chunk.items() if one.search is None}, found)
            for event in session.step():
                if isinstance(event, Finished):
                    number, one = running.pop(event.id)
                    if event.error is not None:
                        raise event.error
                    found[number] = one.read(event.answers)


def _start(
    model: _Model,
    session: SearchSession,
    prepared: Mapping[int, PreparedRequest],
    running: dict[int, tuple[int, PreparedRequest]],
) -> None:
    """Searches join the session, each kind of writer with a memory of its own."""
    for group in _grouped(prepared, lambda one: model.writer(one.writer_key)):
        chosen = [prepared[n] for n in group]
        requests = [one.search for one in chosen if one.search is not None]
        ids = session.add(encode_sources(model.network, chosen), requests, model.writer(chosen[0].writer_key))
        running.update(zip(ids, zip(group, chosen, strict=True), strict=True))


def _make(model: _Model, prepared: Mapping[int, PreparedRequest], found: dict[int, Answer]) -> None:
    """What is not searched for, whatever is alike together."""
    for numbers in _grouped(prepared, lambda one: (id(one.recipe), id(one.automaton), one.config)):
        chosen = [prepared[n] for n in numbers]
        if chosen[0].config.all_candidates:
            found.update(zip(numbers, _score_all(model, chosen), strict=True))
            continue
        made = _speak if chosen[0].recipe.made is Modality.AUDIO else _move
        for number, outputs in zip(numbers, made(model, chosen), strict=True):
            found[number] = outputs if chosen[0].config.num_return_sequences > 1 else outputs[0]


def _grouped(prepared: Mapping[int, PreparedRequest], key: Callable[[PreparedRequest], Any]) -> list[list[int]]:
    groups: dict[Any, list[int]] = {}
    for number, one in prepared.items():
        groups.setdefault(key(one), []).append(number)
    return list(groups.values())


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
