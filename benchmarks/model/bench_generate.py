"""Generation by OFA-base: our search on the decode state, and the same model decoded as is usually done.

Phases: `decode` everything after the encoder, `whole` with it (its attention, too, as each contender has it); where
1024 codes are drawn, one step with 1, 256, ... tokens before it (`step_N` is the N-th). Records carry `decode_ms` and
`floor_ms` (of what is timed) beside `ms`: the floor is the sum over ops of max(bytes / read bandwidth, operations /
GEMM rate).
`python -m benchmarks.model.bench_generate CASE DTYPE THREADS` prints where the time goes, by op.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.core import DTYPES, Contender, Phase, Unavailable, Work
from benchmarks.model import candidate_case, generate_libraries
from benchmarks.model.candidate_case import Candidates
from benchmarks.model.generate_peers import BOS, PEERS, Peer, PeerState, beam_search, prepared
from benchmarks.model.train_step_peers import ATTENTION
from ofakern.data.batch import Example, PackedBatch, Segment
from ofakern.generate import GenerationConfig, generate
from ofakern.instruction import Modality
from ofakern.modality.image.adaptor import ImagePatchEmbedConfig, ImageResnetConfig
from ofakern.modality.image.codes import ImageCodesConfig
from ofakern.modality.text.adaptor import TextAdaptorConfig
from ofakern.model import DecodeState, OFAConfig, OFAPlus, SegmentWriter
from ofakern.model.stacks import Memory
from ofakern.nn import attention as nn_attention

OP = "generate"
OURS = "ofakern"
PHASES: tuple[Phase, ...] = ("decode", "whole", "step_1", "step_256", "step_512", "step_768", "step_1024")
TIMED_DTYPES = ("bf16",)
ABOUT = {
    "ofasys": "OFASys's algorithm: keys, values and states expanded to beams and copied; the position biases of all "
    "positions made anew in every step; bmm, float32 softmax",
    "expanded": "transformers' way: keys and values expanded to beams, SDPA, position terms cached and of the newest "
    "position only",
    "batched": "all candidates only: answers as rows of one decoding state, all logits, masked",
    **generate_libraries.ABOUT,
}
SLOW_CONTENDERS = frozenset(generate_libraries.PEERS)
_STRIDE = 16
_CODES = 8192


@dataclass(frozen=True)
class Spec:
    """image: pixels (0: none), through a ResNet or (patches) by image_patch_embed; source: text tokens; tokens:
    generated, an end of sequence comes after them; codes: they are an image's, of which single steps are timed;
    candidates: all answers of a closed set are scored instead."""

    name: str
    description: str
    batch: int
    beams: int
    tokens: int
    image: int = 480
    source: int = 32
    codes: bool = False
    candidates: bool = False
    small: bool = False
    quick: bool = False
    default: bool = True
    patches: bool = False

    @property
    def phases(self) -> tuple[Phase, ...]:
        return PHASES[2:] if self.codes else PHASES[:1] if self.candidates else PHASES[:2]

    @property
    def length(self) -> int:
        """Encoder tokens of a sample."""
        return (self.image // _STRIDE) ** 2 + self.source

    def config(self) -> OFAConfig:
        codes = (ImageCodesConfig(),) if self.codes else ()
        size = {"image_height": self.image, "image_width": self.image}
        patches = (ImagePatchEmbedConfig(**size, class_token=False),) if self.patches else ()
        if not self.small:
            base = OFAConfig.from_size("base", dropout=0.0)
            return replace(base, adaptors=(*base.adaptors, *codes, *patches))
        backbone = ImageResnetConfig(resnet_blocks=(1, 1, 1), resnet_width=8)
        adaptors = (TextAdaptorConfig(), backbone, *codes, *patches)
        shape = {"dim": 64, "ffn_dim": 128, "heads": 4, "encoder_layers": 1, "decoder_layers": 2, "vocab_size": 997}
        return OFAConfig(adaptors=adaptors, dropout=0.0, **shape)  # type: ignore[arg-type]


CASES: dict[str, Spec] = {
    spec.name: spec
    for spec in (
        Spec("ofa_base_480_b4_beam5", "OFA-base, image 480 and 32 tokens, beam 5, 16 tokens, batch 4", 4, 5, 16),
        Spec(
            "ofa_base_480_patch_b4_beam5",
            "the same with image_patch_embed (16 pixels) instead of the ResNet",
            4,
            5,
            16,
            default=False,
            patches=True,
        ),
        Spec("text_932_b4_beam5", "OFA-base, 932 text tokens, no image, otherwise the same", 4, 5, 16, 0, 932),
        Spec("codes_1024_b4", "OFA-base, 32 tokens to 1024 codes, sampling, 4 samples", 4, 1, 1024, 0, codes=True),
        Spec(
            "allcand_3129",
            "OFA-base, image 480 and 32 tokens, all 3,129 answers of VQA scored",
            1,
            1,
            5,
            candidates=True,
        ),
        Spec("small_96_b2", "1 + 2 layers of width 64, image 96, beam 3", 2, 3, 7, 96, small=True, quick=True),
    )
}


@dataclass
class Problem:
    """A model and the source sides of a batch; what the encoder makes of it is made once."""

    spec: Spec
    model: OFAPlus
    batch: PackedBatch

    @cached_property
    def memory(self) -> Memory:
        return self.encode()

    @cached_property
    def candidates(self) -> Candidates:
        return Candidates.of(self.model, self.spec.small)

    @torch.inference_mode()
    def encode(self) -> Memory:
        return self.model.encode(self.batch.source)


def make(spec: Spec, dtype: str) -> Problem:
    """Weights and inputs from fixed seeds; nothing of the model is zero."""
    model = OFAPlus(spec.config(), seed=1).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02, generator=generator)
    batch = PackedBatch.collate([_example(spec, generator) for _ in range(spec.batch)])
    for segment in batch.source.segments:
        if segment.value.is_floating_point():
            object.__setattr__(segment, "value", segment.value.to(DTYPES[dtype]))
    return Problem(spec, model.to(DTYPES[dtype]), batch)


def _example(spec: Spec, generator: torch.Generator) -> Example:
    text = torch.randint(4, spec.config().vocab_size, (spec.source,), generator=generator)
    source = [Segment(1, "text", Modality.TEXT, text)]
    if spec.image:
        image = torch.randn(3, spec.image, spec.image, generator=generator)
        adaptor = "image_patch_embed" if spec.patches else "image_resnet"
        source.insert(0, Segment(0, adaptor, Modality.IMAGE, image, (spec.image // _STRIDE) ** 2))
    return Example(source, [Segment(2, "text", Modality.TEXT, torch.tensor([BOS]))], torch.tensor([2]))


def ours(problem: Problem) -> Contender:
    spec, model = problem.spec, problem.model
    if spec.codes:
        return _steps(OURS, problem, _OurCodes(problem))
    if spec.candidates:
        return candidate_case.contender(OURS, problem.candidates, problem.memory)
    config = GenerationConfig(
        num_beams=spec.beams,
        max_new_tokens=spec.tokens,
        min_new_tokens=spec.tokens,
        no_repeat_ngram_size=0,
        length_penalty=0.0,
    )

    def decode(memory: Memory) -> Tensor:
        answers = generate(SegmentWriter(model, "text", Modality.TEXT), memory, spec.batch, config)
        return torch.tensor([best[0].score for best in answers])

    return _contender(OURS, problem, decode)


def _peer(name: str) -> Callable[[Problem], Contender]:
    def build(problem: Problem) -> Contender:
        spec = problem.spec
        if spec.candidates and name == "ofasys":
            return candidate_case.contender(name, problem.candidates, problem.memory)
        if spec.candidates:
            raise Unavailable("beams only: `batched` scores all candidates")
        if spec.codes:
            return _steps(name, problem, _PeerCodes(PEERS[name](problem.model, "image_vqgan"), problem))
        peer = PEERS[name](problem.model)

        def decode(memory: Memory) -> Tensor:
            return beam_search(peer, memory, spec.beams, spec.tokens)

        return _contender(name, problem, decode, ATTENTION["ofasys" if name == "ofasys" else "sdpa_mask"]())

    return build


def batched(problem: Problem) -> Contender:
    if not problem.spec.candidates:
        raise Unavailable("it scores all candidates only")
    return candidate_case.contender("batched", problem.candidates, problem.memory)


def _library(name: str) -> Callable[[Problem], Contender]:
    def build(problem: Problem) -> Contender:
        case = generate_libraries.case_of(problem.spec, problem.model.output_weight.dtype)
        return generate_libraries.PEERS[name](case, problem.spec.image == 0)

    return build


CONTENDERS: dict[str, Callable[[Any], Contender]] = {
    OURS: ours,
    **{name: _peer(name) for name in PEERS},
    "batched": batched,
    **{name: _library(name) for name in generate_libraries.PEERS},
}


def _contender(
    name: str, problem: Problem, decode: Callable[[Memory], Tensor], attention: Any | None = None
) -> Contender:
    """attention: what takes our op's place in the encoder of `whole`."""

    def encoded() -> Memory:
        if attention is None:
            return problem.encode()
        attention.begin()
        with mock.patch.object(nn_attention, "attention", attention):
            return problem.encode()

    steps = {"decode": lambda: decode(problem.memory), "whole": lambda: decode(encoded())}
    return Contender(name, steps["decode"], steps=steps)


class _OurCodes:
    """A state that is fed codes up to a step, which is then made again and again; logits of the codes only, as
    `generate` asks for them."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._writer = SegmentWriter(problem.model, "image_vqgan", Modality.IMAGE)
        self._state: DecodeState | None = None
        self._codes = min(_CODES, problem.model.config.vocab_size)
        self._random = torch.Generator().manual_seed(3)

    @torch.inference_mode()
    def at(self, fed: int) -> Tensor:
        """Draws the next code with `fed` tokens before this step's."""
        spec = self._problem.spec
        if self._state is None:
            self._state = self._writer.begin_decode(self._problem.memory, 1, spec.tokens + 1)
        tokens = torch.full((spec.batch,), 5)
        while self._state.length < fed:
            self._writer.decode_hidden(self._state, tokens)
        self._state.rewind(fed)
        hidden = self._writer.decode_hidden(self._state, tokens)
        vocabulary = len(self._writer.output_weight)
        return draw(self._writer.step_logits(self._state, hidden, (vocabulary - self._codes, vocabulary)), self._random)


class _PeerCodes:
    def __init__(self, peer: Peer, problem: Problem) -> None:
        self._peer, self._problem = peer, problem
        self._made: tuple[int, PeerState] | None = None
        self._random = torch.Generator().manual_seed(3)

    @torch.inference_mode()
    def at(self, fed: int) -> Tensor:
        spec = self._problem.spec
        if self._made is None or self._made[0] != fed:
            self._made = (fed, prepared(self._peer, self._problem.memory, spec.tokens + 1, fed))
        state = replace(self._made[1], own=list(self._made[1].own))
        drawn = draw(self._peer.step(state, torch.full((spec.batch,), 5)), self._random)
        self._peer.reorder(state, torch.arange(spec.batch))
        return drawn


def draw(logits: Tensor, random: torch.Generator) -> Tensor:
    """int64 `[R]`, drawn from the last 8,192 ids (or fewer: the numbers of those given)."""
    probabilities = torch.softmax(logits[:, -_CODES:].float(), -1)
    return torch.multinomial(probabilities, 1, generator=random)[:, 0]


def _steps(name: str, problem: Problem, codes: _OurCodes | _PeerCodes) -> Contender:
    numbers = [int(phase.removeprefix("step_")) for phase in problem.spec.phases]
    steps = {f"step_{number}": (lambda number=number: codes.at(number - 1)) for number in numbers}
    return Contender(name, steps["step_1"], steps=steps)


def ops(spec: Spec, dtype: str, phase: Phase) -> list[Work]:
    """Every op after the encoder once: what it multiplies and what it must read and write."""
    c, item = spec.config(), DTYPES[dtype].itemsize
    if spec.candidates:
        return candidate_case.ops(c, spec.batch, spec.length, item)
    rows, keys, dim, layers = spec.batch * spec.beams, spec.batch * spec.length, c.dim, c.decoder_layers

    def linear(m: int, n: int, k: int) -> Work:
        return Work(2.0 * m * n * k, float(item * (m * k + n * k + m * n)))

    def attend(keys: int, most: int) -> Work:
        """keys read once, each by as many rows as there are; most: of one row."""
        return Work(4.0 * rows * most * dim, float(2 * item * keys * dim + 2 * item * rows * dim))

    def step(number: int) -> list[Work]:
        shapes = [(3 * dim, dim), (dim, dim), (dim, dim), (dim, dim), (c.ffn_dim, dim), (dim, c.ffn_dim)]
        own = attend(rows * number, number)
        layer = [linear(rows, n, k) for n, k in shapes] + [own, attend(keys, spec.length)]
        logits = min(_CODES, c.vocab_size) if spec.codes else c.vocab_size
        choose = Work(0.0, float(item * rows * logits))
        return layer * layers + [linear(rows, logits, dim), choose]

    if spec.codes:
        return step(int(phase.removeprefix("step_")))
    once = [linear(keys, 2 * dim, dim)] * layers + [linear(keys, dim, dim)]
    return once + [op for number in range(1, spec.tokens + 2) for op in step(number)]


def work(spec: Spec, dtype: str, phase: Phase) -> Work:
    """The sum over `ops`; the encoder is not counted, so that `whole` has the work of `decode`."""
    every = ops(spec, dtype, phase)
    return Work(sum(op.flops for op in every), sum(op.bytes for op in every))


def extras(record: Mapping[str, Any], records: list[dict[str, Any]], roof: Mapping[str, Any]) -> dict[str, Any]:
    """decode_ms: the same contender's time after the encoder; floor_ms: the least for that."""
    spec, dtype, phase = CASES[record["case"]], record["dtype"], record["phase"]
    same = [r for r in records if all(r[key] == record[key] for key in ("case", "dtype", "backend"))]
    decode = next((r["ms"] for r in same if r["phase"] == "decode"), record["ms"])["p50"]
    rate = roof["gemm_tflops"][dtype]["best"] * 1e12
    read = max(band["read_gbps"] for band in roof["bandwidth"].values()) * 1e9
    floor = sum(max(op.bytes / read, op.flops / rate) for op in ops(spec, dtype, phase))
    return {"decode_ms": decode, "floor_ms": 1e3 * floor}


def verify(spec: Spec, dtype: str, harness: Any) -> None:
    """Raises AssertionError unless, in f32 and on a small model, all contenders give one score and one code's odds."""
    image = 0 if spec.codes else 96
    like = {"codes": spec.codes, "candidates": spec.candidates, "patches": spec.patches}
    small = replace(CASES["small_96_b2"], image=image, **like)
    problem = make(small, "f32")
    if spec.candidates:
        wanted, *found = candidate_case.every(problem.candidates, problem.memory)
    elif not spec.codes:
        wanted, *found = [build(problem).forward() for build in (ours, *map(_peer, PEERS))]
    else:
        wanted, *found = _first_codes(problem)
    for other in found:
        assert isinstance(wanted, Tensor) and isinstance(other, Tensor)
        torch.testing.assert_close(wanted, other, rtol=1e-3, atol=1e-4)


@torch.inference_mode()
def _first_codes(problem: Problem) -> list[Tensor]:
    """Logits of a few steps by each contender."""
    rows = problem.spec.batch
    steps = [torch.full((rows,), 4 + t) for t in range(5)]
    writer = SegmentWriter(problem.model, "image_vqgan", Modality.IMAGE)
    state = writer.begin_decode(problem.memory, 1, 9)
    found = [torch.stack([writer.decode_step(state, tokens) for tokens in steps])]
    for build in PEERS.values():
        peer = build(problem.model, "image_vqgan")
        begun = peer.begin(problem.memory, 1, 9)
        found.append(torch.stack([peer.step(begun, tokens) for tokens in steps]))
    return found


def reduced(spec: Spec) -> Spec:
    return spec if spec.codes else CASES["small_96_b2"]


def profile(case: str, dtype: str, threads: int) -> str:
    """Of each contender's decoding (of the last step timed, for codes), the ops that take most of its time."""
    torch.set_num_threads(threads)
    problem = make(CASES[case], dtype)
    phase = "decode" if not problem.spec.codes else problem.spec.phases[-1]
    parts = []
    for name, build in CONTENDERS.items():
        call = build(problem).call(phase)
        call()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
            call()
        table = recorded.key_averages().table(sort_by="self_cpu_time_total", row_limit=24, max_name_column_width=40)
        parts.append(f"{name}, {case}, {dtype}\n{table}")
    return "\n".join(parts)


if __name__ == "__main__":
    print(profile(sys.argv[1], sys.argv[2], int(sys.argv[3])))
