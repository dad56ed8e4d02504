"""The fixed cost of a search's step: a session over a model that costs nothing, with and without the ops' own time.

Run it with `python -m benchmarks.search_step`. Times are of the process, on one thread: the 10th percentile of a run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ofakern.generate import GenerationConfig, SearchRequest, SearchSession
from ofakern.ops.beam_step import beam_step, sample_step

_STEPS = 200
_VOCABULARY = 64  # so small that the ops' time is their calls'
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "greedy": (1, {"num_beams": 1}),
    "beam 5": (1, {"num_beams": 5, "no_repeat_ngram_size": 0}),
    "beam 5, batch 4, n-grams": (4, {"num_beams": 5, "no_repeat_ngram_size": 3}),
    "beam 5, batch 16": (16, {"num_beams": 5, "no_repeat_ngram_size": 0}),
    "drawn, batch 4": (4, {"do_sample": True, "top_k": 50}),
    "diverse 3 x 2, batch 4": (
        4,
        {"num_beams": 6, "num_beam_groups": 3, "diversity_penalty": 0.5, "no_repeat_ngram_size": 0},
    ),
}


class _State:
    def __init__(self, rows: int) -> None:
        self.rows = rows

    def reorder(self, index: Tensor) -> None:
        self.rows = len(index)


class _Free:
    """A model whose logits are there already; no answer ends."""

    def __init__(self) -> None:
        self.logits = torch.randn(256, _VOCABULARY, generator=torch.Generator().manual_seed(0))
        self.logits[:, 2] = -50

    def begin_decode(self, memory: int, rows_per_sample: int | Sequence[int], max_length: int) -> _State:
        rows = rows_per_sample * memory if isinstance(rows_per_sample, int) else sum(rows_per_sample)
        return _State(rows)

    def decode_step(self, state: _State, tokens: Tensor) -> Tensor:
        return self.logits[: state.rows]


def _microseconds(call: Callable[[], object]) -> float:
    times = []
    for _ in range(_STEPS):
        begin = time.process_time()
        call()
        times.append(time.process_time() - begin)
    return sorted(times)[_STEPS // 10] * 1e6


def measure(batch: int, settings: dict[str, Any]) -> tuple[int, float, float]:
    """Rows, microseconds of a session's step, and of one call of its op on the same logits."""
    model = _Free()
    session = SearchSession(model)
    config = GenerationConfig(max_new_tokens=2 * _STEPS, **settings)
    session.add(batch, [SearchRequest(config)] * batch)
    for _ in range(4):  # until there are as many hypotheses as beams
        session.step()
    rows = batch * (config.num_beams or 1)
    logits, sums = model.logits[:rows], torch.zeros(rows)
    offsets = torch.arange(0, rows + 1, rows // batch, dtype=torch.int32)

    def op() -> object:
        return sample_step(logits, sums) if config.do_sample else beam_step(logits, sums, offsets, 2 * (rows // batch))

    return rows, _microseconds(session.step), _microseconds(op)


def main() -> None:
    """Print every case."""
    torch.set_num_threads(1)
    print(f"{'case':28} rows   step us     op us   rest us")
    for name, (batch, settings) in CASES.items():
        rows, step, op = measure(batch, settings)
        print(f"{name:28} {rows:4} {step:9.0f} {op:9.0f} {step - op:9.0f}")


if __name__ == "__main__":
    main()
