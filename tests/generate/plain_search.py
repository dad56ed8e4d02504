"""Beam search written down plainly: lists of hypotheses, one sample, one token at a time."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from toy_decoder import ToyDecoder

from ofakern.generate import GenerationConfig

EOS = 2
PAD = 1


@dataclass
class Group:
    """Beams that compete: (sum, tokens, log-probability of each)."""

    beams: list[tuple[float, tuple[int, ...], tuple[float, ...]]]
    ended: list[tuple[float, tuple[int, ...], tuple[float, ...]]] = field(default_factory=list)
    done: bool = False


def log_probs(model: ToyDecoder, sample: int, tokens: tuple[int, ...], config: GenerationConfig) -> torch.Tensor:
    step = len(tokens)
    scores = torch.log_softmax(model.logits_after(sample, (0, *tokens)) / config.temperature, -1)
    if step == config.max_new_tokens:
        return torch.full_like(scores, -torch.inf).index_put((torch.tensor(EOS),), scores[EOS])
    scores[PAD] = -torch.inf
    if step < config.min_new_tokens:
        scores[EOS] = -torch.inf
    size = config.no_repeat_ngram_size or 0
    for begin in range(step - size + 1 if size else 0):
        if tokens[begin : begin + size - 1] == tokens[step - size + 1 :]:
            scores[tokens[begin + size - 1]] = -torch.inf
    return scores


def search(model: ToyDecoder, sample: int, config: GenerationConfig) -> list[tuple[float, tuple[int, ...]]]:
    """(score, tokens) of the best answers, by the rules of transformers' (diverse) beam search."""
    assert config.num_beams is not None
    width = config.num_beams // config.num_beam_groups
    groups = [Group([(0.0, (), ())]) for _ in range(config.num_beam_groups)]
    for step in range(config.max_new_tokens + 1):
        taken: list[int] = []
        for group in (group for group in groups if not group.done):
            candidates = []
            for total, tokens, each in group.beams:
                scores = log_probs(model, sample, tokens, config)
                for token in taken if step < config.max_new_tokens else []:
                    scores[token] -= config.diversity_penalty
                candidates += [
                    (total + float(scores[token]), (*tokens, token), (*each, float(scores[token])))
                    for token in range(model.vocabulary)
                    if scores[token] > -torch.inf
                ]
            best = sorted(candidates, key=lambda one: -one[0])[: 2 * width]
            for place, (total, tokens, each) in enumerate(best):
                if tokens[-1] == EOS and place < width:
                    if not (config.early_stopping is True and len(group.ended) >= width):
                        group.ended.append((total / len(tokens) ** config.length_penalty, tokens, each))
            group.beams = [one for one in best if one[1][-1] != EOS][:width]
            group.done = stops(group, config, width, step + 1)
            taken += [tokens[-1] for _, tokens, _ in group.beams]
        if all(group.done for group in groups):
            break
    found = sorted((one for group in groups for one in group.ended), key=lambda one: -one[0])
    return [(score, tokens) for score, tokens, _ in found[: config.num_return_sequences]]


def stops(group: Group, config: GenerationConfig, width: int, length: int) -> bool:
    if not group.beams:
        return True
    if len(group.ended) < width:
        return False
    if config.early_stopping is True:
        return True
    if config.early_stopping == "never" and config.length_penalty > 0:
        length = config.max_new_tokens + 1
    worst = sorted((score for score, _, _ in group.ended), reverse=True)[width - 1]
    return group.beams[0][0] / length**config.length_penalty <= worst
