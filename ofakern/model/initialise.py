"""The weights a new model starts from."""

from __future__ import annotations

import torch
from torch import nn

from ofakern.nn.adaptor import Adaptor


def initialise(model: nn.Module, pad_id: int, seed: int | None, std: float = 0.02) -> None:
    """OFA's practice: N(0, std) for matrices and embeddings, zero biases, He for convolutions; a zero pad row.

    Relative tables stay zero. (OFASys meant that too, and then drew them from the normal law with the rest.)
    """
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=std, generator=generator)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=std, generator=generator)
        elif isinstance(module, nn.Conv1d):  # of the post-net, whose tanh units want Glorot's width
            nn.init.xavier_uniform_(module.weight, nn.init.calculate_gain("tanh"), generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu", generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in model.modules():
        if isinstance(module, Adaptor):
            for table in module.zero_at_start():
                nn.init.zeros_(table)
    with torch.no_grad():
        embed_tokens = model.get_parameter("encoder.adaptor.embed_tokens.weight")
        if 0 <= pad_id < embed_tokens.shape[0]:
            embed_tokens[pad_id].zero_()
