"""One batch with one configuration: a session run to its end."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ofakern.errors import OfakernValueError
from ofakern.generate.automaton import TokenAutomaton
from ofakern.generate.config import GenerationConfig
from ofakern.generate.search.contract import Finished, Hypothesis, SearchRequest, SpecialTokens, StepDecoder
from ofakern.generate.search.session import SearchSession

__all__ = ["finish", "generate"]


def generate(
    model: StepDecoder,
    memory: Any,
    batch_size: int,
    config: GenerationConfig,
    *,
    automaton: TokenAutomaton | None = None,
    prefix: Tensor | None = None,
    special: SpecialTokens | None = None,
    max_positions: int | None = None,
    cuda_graphs: bool = False,
) -> list[list[Hypothesis]]:
    """For each of `batch_size` samples its `config.num_return_sequences` best answers, best first.

    Args:
        memory: what `model.encode` returned for these samples.
        automaton: what a target may look like; None leaves every token allowed, as OFASys does.
        prefix: int64 [B, P] forced first tokens, padded with `special.pad` behind.
        max_positions: most tokens the decoder takes, start token included.
        cuda_graphs: steps run as CUDA graphs: docs/GPU.md.

    Raises:
        OfakernValueError: the answers cannot fit into `max_positions`, or a prefix of another batch size.
        OfakernRuntimeError: the model's logits are not finite.
    """
    if prefix is not None and (prefix.dim() != 2 or len(prefix) != batch_size):
        raise OfakernValueError(f"generate: prefix must be [{batch_size}, P], got {list(prefix.shape)}")
    forced = [()] * batch_size if prefix is None else [tuple(row) for row in prefix.tolist()]
    session = SearchSession(model, special, cuda_graphs=cuda_graphs)
    requests = [SearchRequest(config, automaton, own, max_positions) for own in forced]
    ids = session.add(memory, requests)
    answers = finish(session)
    return [answers[id] for id in ids]


def finish(session: SearchSession) -> dict[int, list[Hypothesis]]:
    """Step until nothing runs; each request's answers by its id. Raises the first error that ended a request."""
    answers: dict[int, list[Hypothesis]] = {}
    while session.running:
        for event in session.step():
            if isinstance(event, Finished):
                if event.error is not None:
                    raise event.error
                answers[event.id] = event.answers
    return answers
