"""Decode steps as CUDA graphs, kernels and choice included: emulated ones under the stand-in, and graphs on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from replay import stand_in
from torch import Tensor

from ofakern.data.batch import Example, PackedBatch, Segment
from ofakern.errors import OfakernRuntimeError
from ofakern.generate import ChoiceTokens, GenerationConfig, RangeTokens, SearchRequest, SearchSession, compile_target
from ofakern.generate.search import Finished
from ofakern.model import OFAPlus
from ofakern.model.decode import weights
from ofakern.ops.decode_attention import KeyValueCache, decode_attention
from tests.cuda.test_search_cuda import assert_alike, chosen_there
from tests.model.test_decode_state import build

CONFIGS: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 3, "no_repeat_ngram_size": 2, "suppress_tokens": [7], "min_new_tokens": 2},
    "drawn": {"do_sample": True, "top_p": 0.9, "num_return_sequences": 2, "seed": 3},
}
TARGETS: dict[str, Any] = {
    "free": None,
    "closed": ChoiceTokens([[5, 6], [5, 8, 9], [11]]),
    "range": RangeTokens(40, 60, 3, renormalise=True),
}


@contextmanager
def as_on_a_gpu(device: torch.device) -> Iterator[list[str]]:
    """Inside graphs are recorded and kernels chosen. Gives the names of the kernels that were called."""
    with (
        pytest.MonkeyPatch.context() as patch,
        stand_in() if device.type == "cpu" else nullcontext(),
        chosen_there(device) as calls,
    ):
        patch.setattr(weights, "can_pack", lambda weight: False)
        yield calls


def memory_of(model: OFAPlus, lengths: list[int]) -> Any:
    target = [Segment(9, "text", 1, torch.tensor([0]))]
    sources = [torch.randint(4, 80, (n,), generator=torch.Generator().manual_seed(n)) for n in lengths]
    examples = [Example([Segment(0, "text", 1, tokens)], target, torch.tensor([2])) for tokens in sources]
    with torch.no_grad():
        return model.encode(PackedBatch.collate(examples).to(model.device).source)


def begun(model: OFAPlus, name: str, shape: str, **options: Any) -> SearchSession:
    """Three samples that end at different steps."""
    elements = TARGETS[shape]
    automaton = None if elements is None else compile_target([elements], eos=2, vocabulary_size=80)
    session = SearchSession(model, **options)
    configs = [GenerationConfig(**CONFIGS[name], max_new_tokens=most) for most in (2, 6, 4)]
    session.add(memory_of(model, [5, 9, 3]), [SearchRequest(config, automaton) for config in configs])
    return session


def finished(session: SearchSession) -> list[Finished]:
    """In the order of the requests."""
    events: list[Any] = []
    while session.running:
        events += session.step()
    return sorted(events, key=lambda event: int(event.id))


def on(device: torch.device) -> OFAPlus:
    model = build().to(device)
    model.decoder.backend = "cuda"
    return model


@pytest.mark.parametrize("shape", TARGETS)
@pytest.mark.parametrize("name", CONFIGS)
def test_answers_are_the_cpus(cuda_device: torch.device, name: str, shape: str) -> None:
    want = finished(begun(build(), name, shape))
    with as_on_a_gpu(cuda_device) as kernels:
        session = begun(on(cuda_device), name, shape, cuda_graphs=True)
        have = finished(session)
    assert_alike([one.answers for one in have], [one.answers for one in want])
    use = session.graph_use
    assert use.replayed >= 4 and not use.without and not use.chosen_after
    assert set(kernels) == {"sample_step" if name == "drawn" else "beam_step", "decode_attention"}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_request_whose_logits_are_no_numbers_fails_alone(
    cuda_device: torch.device, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graph says so, and the others choose from its logits."""
    monkeypatch.setitem(CONFIGS, "drawn", CONFIGS["drawn"] | {"num_return_sequences": 1})
    want, model = finished(begun(build(), name, "free")), on(cuda_device)
    spoilt, finish = torch.zeros(1, device=cuda_device), model.decoder.finish

    def spoiling(x: Tensor) -> Tensor:
        y = finish(x)
        y[-3:-2] += spoilt  # of four rows the second one
        return y

    monkeypatch.setattr(model.decoder, "finish", spoiling)
    with as_on_a_gpu(cuda_device):
        session = begun(model, name, "free", cuda_graphs=True)
        spoilt.fill_(torch.nan)
        events = session.step()
        spoilt.zero_()
        have = sorted([*events, *finished(session)], key=lambda event: int(event.id))
    assert isinstance(have[1].error, OfakernRuntimeError) and "got NaN at step 0" in str(have[1].error)
    for number in (0, 2):
        assert have[number].answers[0].tokens == want[number].answers[0].tokens


# ------------------------------------------------------------------------------- what a graph hands to decode_attention


def test_bounds_and_idle_rows_change_no_bit_of_a_table(cuda_device: torch.device) -> None:
    """A wider table, samples without rows that fill the bias's columns, and rows without keys."""
    random = torch.Generator().manual_seed(0)
    rows, counts = [3, 1, 2], [20, 70, 1]
    cache = KeyValueCache.empty(400, 2, 16, device=cuda_device)
    cache.keys.copy_(torch.randn(400, 2, 16, generator=random))
    cache.values.copy_(torch.randn(400, 2, 16, generator=random))
    q = torch.randn(8, 2, 16, generator=random).to(cuda_device)
    table = torch.randint(0, 400, (6, max(counts)), generator=random).int()
    bias = torch.randn(2, sum(counts), generator=random)
    want = attend(q[:6], cache, offsets_of(rows), slots=table, counts=ints(counts), bias=bias.to(cuda_device))
    for width in (128, 512):
        spread = torch.full((2, 4 * width), torch.nan)  # what no row sees may be anything
        for sample, own in enumerate(bias.split(counts, 1)):
            spread[:, sample * width : sample * width + counts[sample]] = own
        wide = torch.zeros(8, width, dtype=torch.int32)
        wide[:6, : max(counts)] = table
        have = attend(
            q,
            cache,
            offsets_of([3, 0, 1, 0, 2, 0, 0, 0, 2]),
            slots=wide,
            counts=ints([20, width - 20, 70, width - 70, 1, width - 1, 0, width, 0]),
            bias=spread.to(cuda_device),
        )
        assert torch.equal(have[:6], want) and not have[6:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)  # bf16: the kernel on tensor cores
def test_bounds_and_idle_rows_change_no_bit_of_a_source(cuda_device: torch.device, dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(0)
    lengths, rows = [5, 0, 90], [3, 1, 2]
    k, v = (torch.randn(95, 2, 16, generator=random).to(cuda_device, dtype) for _ in range(2))
    q = torch.randn(8, 2, 16, generator=random).to(cuda_device, dtype)
    bias = torch.randn(2, 95, generator=random).to(cuda_device)
    cache = KeyValueCache.of_source(k, v, lengths, backend="cuda")
    want = attend(q[:6], cache, offsets_of(rows), bias=bias)
    runs = torch.tensor([[0, 5], [0, 0], [5, 0], [0, 0], [5, 90], [0, 0], [0, 0]]).int().to(cuda_device)
    for longest in (128, 4096):
        have = attend(q, cache.standing(runs, longest), offsets_of([3, 0, 1, 0, 2, 0, 2]), bias=bias)
        assert torch.equal(have[:6], want) and not have[6:].any()


def attend(q: Tensor, cache: KeyValueCache, row_offsets: Tensor, **options: Any) -> Tensor:
    found = decode_attention(q, cache, row_offsets, **options, backend="cuda")
    assert isinstance(found, Tensor)
    return found


def ints(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def offsets_of(rows: list[int]) -> Tensor:
    return ints([0, *rows]).cumsum(0).int()
