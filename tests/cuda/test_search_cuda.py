"""A whole search whose steps choose in CUDA C++: the answers that the CPU's kernels give."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from ofakern.errors import OfakernRuntimeError
from ofakern.generate import ChoiceTokens, GenerationConfig, compile_target, generate
from ofakern.generate.search.contract import Hypothesis
from ofakern.ops import native
from ofakern.ops.beam_step import api
from ofakern.ops.beam_step.op import BACKENDS
from tests.generate.toy_decoder import ToyDecoder

CONFIGS: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 4, "num_return_sequences": 2},
    "rules": {
        "num_beams": 3,
        "repetition_penalty": 1.3,
        "suppress_tokens": [7],
        "min_new_tokens": 3,
        "temperature": 0.7,
    },
    "diverse": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
    "drawn": {"do_sample": True, "top_p": 0.9, "top_k": 20, "num_return_sequences": 2, "seed": 3},
}


class OnGpu(ToyDecoder):
    """Gives its logits where the kernels are."""

    device = torch.device("cpu")

    def decode_step(self, state: Any, tokens: torch.Tensor) -> torch.Tensor:
        return super().decode_step(state, tokens).to(self.device)


@contextmanager
def chosen_there(device: torch.device) -> Iterator[list[str]]:
    """Inside, `auto` takes the CUDA kernels, emulated ones too. Gives the names of those that were called."""
    calls: list[str] = []

    class Counted:
        def __getattr__(self, name: str) -> Any:
            calls.append(name)
            return getattr(kernels, name)

    kernels = native.cuda_kernels
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "cuda_kernels", Counted())
        patch.setattr(BACKENDS, "automatic", lambda logits: "cuda")
        patch.setattr(api, "straight", lambda *arguments: False)
        patch.setattr(OnGpu, "device", device)
        yield calls


def answers(config: dict[str, Any], closed: bool = False, model: type[ToyDecoder] = ToyDecoder) -> Any:
    automaton = compile_target([ChoiceTokens([[5, 6], [5, 8, 9], [11]])], eos=2, vocabulary_size=40) if closed else None
    settings = GenerationConfig(**({"max_new_tokens": 6} | config))
    return generate(model(vocabulary=40), 3, 3, settings, automaton=automaton)


def assert_alike(have: list[list[Hypothesis]], want: list[list[Hypothesis]]) -> None:
    for mine, theirs in zip(have, want, strict=True):
        assert [one.tokens for one in mine] == [one.tokens for one in theirs]
        assert all(math.isclose(a.score, b.score, rel_tol=1e-5) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("closed", [False, True], ids=["free", "closed"])
@pytest.mark.parametrize("name", CONFIGS)
def test_answers_are_the_cpus(cuda_device: torch.device, name: str, closed: bool) -> None:
    want = answers(CONFIGS[name], closed)
    with chosen_there(cuda_device) as calls:
        assert_alike(answers(CONFIGS[name], closed, OnGpu), want)
    assert set(calls) == {"sample_step" if name == "drawn" else "beam_step"}


@pytest.mark.parametrize("name", ["beams", "drawn"])
def test_a_request_whose_logits_are_no_numbers_fails(
    cuda_device: torch.device, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Any, state: Any, tokens: torch.Tensor) -> torch.Tensor:
        return ToyDecoder.decode_step(self, state, tokens).mul_(torch.nan).to(self.device)

    monkeypatch.setattr(OnGpu, "decode_step", broken)
    with (
        chosen_there(cuda_device),
        pytest.raises(OfakernRuntimeError, match="logits must be finite, got NaN at step 0"),
    ):
        answers(CONFIGS[name], model=OnGpu)
