"""`ofakern bench serve`: mixed requests of 16 clients at an engine, against the same requests one at a time.

A call answers all of a case's requests: captions (five beams), questions with a closed set and boxes, in a fixed random
order. Ours: sixteen client threads, each with one request on its way, at one `ofakern.serve.Engine`; HTTP is not part
of it. `serial`: `GeneralistModel.inference` on one request after the other, which has no queue, no threads and no
streaming to pay for. Weights are random: answers make no sense and take as many tokens as they may.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.core import DTYPES, Contender, Work
from ofakern import GeneralistModel
from ofakern.modality.image.adaptor import ImagePatchEmbedConfig
from ofakern.modality.text.adaptor import TextAdaptorConfig
from ofakern.model import OFAConfig
from ofakern.serve import Engine
from ofakern.text import Tokenizer

OP = "serve"
PHASES = ("serve",)
ABOUT = {"serial": "GeneralistModel.inference, one request after the other"}

_COLOURS = ("red", "green", "blue", "yellow", "black", "white", "brown", "grey", "pink", "orange", "teal", "purple")
_WORDS = ("what does the image describe which region colour is it a thing on the left right above below small",)
# Instruction, columns, settings; of ten requests so many.
_KINDS: tuple[tuple[int, str, tuple[str, ...], Mapping[str, Any]], ...] = (
    (4, "[IMAGE:img] what does the image describe? -> [TEXT:cap]", ("img",), {"max_new_tokens": 12}),
    (3, "[IMAGE:img] [TEXT:q] -> [TEXT:a,closed_set]", ("img", "q"), {"closed_set": _COLOURS}),
    (3, "[IMAGE:img] which region does the text [TEXT:q] describe? -> [BOX:b]", ("img", "q"), {}),
)


@dataclass(frozen=True)
class Spec:
    """base: OFA-base with its vocabulary's size and images of `image` pixels; else a model as the demonstration's."""

    name: str
    description: str
    requests: int
    image: int
    base: bool = False
    clients: int = 16
    quick: bool = False
    default: bool = True


_DEMO = OFAConfig(dim=128, ffn_dim=512, heads=2, encoder_layers=2, decoder_layers=2, init_std=0.08)

CASES = {
    spec.name: spec
    for spec in (
        Spec("demo_c16", "200 requests of 16 clients, a model as the demonstration's", 200, 64, quick=True),
        Spec("base_c16", "32 requests of 16 clients, OFA-base, images of 224", 32, 224, base=True),
    )
}


@dataclass(frozen=True)
class Problem:
    spec: Spec
    model: GeneralistModel
    requests: list[tuple[str, dict[str, Any], dict[str, Any]]]


def make(spec: Spec, dtype: str) -> Problem:
    tokenizer = Tokenizer.train([*_WORDS, *_COLOURS], 400, codes=58_000 if spec.base else 0, bins=1000)
    patch = 16 if spec.base else 8
    image = ImagePatchEmbedConfig(
        image_height=spec.image, image_width=spec.image, patch_height=patch, patch_width=patch
    )
    adaptors = (TextAdaptorConfig(max_position=256), image)
    config = replace(_config(spec), dropout=0.0, vocab_size=len(tokenizer.vocabulary), adaptors=adaptors)
    model = GeneralistModel(config, tokenizer=tokenizer, image_size=spec.image, seed=0)
    model.network.to(DTYPES[dtype]).eval()
    return Problem(spec, model, list(_requests(spec)))


def _config(spec: Spec) -> OFAConfig:
    return OFAConfig.from_size("base") if spec.base else _DEMO


def _requests(spec: Spec) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    rng = np.random.default_rng(0)
    kinds = [kind for kind in _KINDS for _ in range(kind[0])]
    for number in rng.permutation(spec.requests):
        _, instruction, columns, settings = kinds[int(number) % len(kinds)]
        pixels = rng.integers(0, 256, (spec.image + 16, spec.image + 32, 3), dtype=np.uint8)
        row = {"img": Image.fromarray(pixels), "q": f"which colour is the {_COLOURS[int(rng.integers(12))]} thing?"}
        yield instruction, {name: row[name] for name in columns}, dict(settings)


class _Clients:
    """Threads that ask one request after the other; `seconds` has what each request of the last call took."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self.seconds: list[float] = []

    def __call__(self) -> Tensor:
        spec, requests = self._problem.spec, self._problem.requests
        scores = torch.zeros(len(requests))
        self.seconds = [0.0] * len(requests)
        left = iter(range(len(requests)))
        lock = threading.Lock()
        failures: list[BaseException] = []

        def client(engine: Engine) -> None:
            try:
                while True:
                    with lock:
                        number = next(left, None)
                    if number is None or failures:
                        return
                    begin = time.perf_counter()
                    instruction, row, settings = requests[number]
                    scores[number] = engine.submit(instruction, row, **settings).result().score
                    self.seconds[number] = time.perf_counter() - begin
            except BaseException as error:
                failures.append(error)

        with Engine(self._problem.model, max_queue=spec.clients, max_running=spec.clients) as engine:
            threads = [threading.Thread(target=client, args=(engine,)) for _ in range(spec.clients)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        if failures:
            raise failures[0]
        return scores

    def details(self) -> dict[str, float]:
        """Of one request, in the last call."""
        p50, p99 = (float(np.percentile(self.seconds, p)) * 1e3 for p in (50, 99))
        return {"request_p50_ms": p50, "request_p99_ms": p99, "p99_over_p50": p99 / p50}


def _engine(problem: Problem) -> Contender:
    clients = _Clients(problem)
    return Contender("engine", clients, steps={"serve": clients}, details=clients.details)


def _serial(problem: Problem) -> Contender:
    def run() -> Tensor:
        return torch.tensor([_alone(problem, number) for number in range(len(problem.requests))])

    return Contender("serial", run, steps={"serve": run})


def _alone(problem: Problem, number: int) -> float:
    instruction, row, settings = problem.requests[number]
    score: float = problem.model.inference(instruction, row, **settings).score
    return score


CONTENDERS: dict[str, Callable[[Problem], Contender]] = {"engine": _engine, "serial": _serial}


def reduced(spec: Spec) -> Spec:
    return replace(spec, requests=10)


def work(spec: Spec, dtype: str, phase: str) -> Work:
    """Two flops per parameter and token, five beams of 13 tokens for captions and 4 or 5 tokens otherwise."""
    config = _config(spec)
    layers = config.encoder_layers
    layer = 4 * config.dim**2 + 2 * config.dim * config.ffn_dim
    vocabulary = config.dim * (59_000 if spec.base else 1_400)
    source = (spec.image // (16 if spec.base else 8)) ** 2 + 16
    target = 0.4 * 5 * 13 + 0.3 * 4 + 0.3 * 5 * 5
    decoder = layers * (layer + 2 * config.dim**2) + vocabulary
    flops = 2.0 * spec.requests * (layers * layer * source + layers * 2 * config.dim**2 * source + decoder * target)
    size = torch.finfo(DTYPES[dtype]).bits // 8
    return Work(flops, float(size * (layers * layer + decoder)))


def verify(spec: Spec, dtype: str, harness: Any) -> None:
    """The first requests, all at once: the scores of each alone."""
    problem = make(replace(spec, requests=min(16, spec.requests)), dtype)
    found = _Clients(problem)()
    alone = torch.tensor([_alone(problem, number) for number in range(len(problem.requests))])
    bound = {"f32": 1e-4, "bf16": 3e-2, "f16": 5e-3}[dtype]
    error = float((found - alone).abs().max() / alone.abs().max())
    assert error <= bound, f"scores differ by {error:.2e} of the largest, above {bound:.0e}"
