"""AdamW over the right groups, the gradient's norm, and an average of the weights."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ofakern.train.config import TrainConfig


def build_optimizer(module: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices and convolutions only: biases, norms, scales and tables keep none."""
    tables = {
        id(parameter)
        for part in module.modules()
        if isinstance(part, nn.Embedding)
        for parameter in part.parameters(recurse=False)
    }
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            is_table = id(parameter) in tables or "rel_pos" in name
            (plain if parameter.dim() < 2 or is_table else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.adam_epsilon, fused=True)


def clip_gradients(parameters: Iterable[nn.Parameter], limit: float) -> float:
    """The norm of all gradients; they are scaled down to `limit` when it is above it (0: never)."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = float(torch.nn.utils.get_total_norm(gradients))
    if limit and norm > limit:
        torch._foreach_mul_(gradients, limit / (norm + 1e-6))
    return norm


class WeightAverage:
    """Exponential moving average of a module's parameters in f32; early on it forgets faster, as is usual."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self._decay = decay
        self.shadow = {name: p.detach().clone().float() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module, updates: int) -> None:
        """Take the weights after update number `updates` (from 1) into the average."""
        decay = min(self._decay, (1 + updates) / (10 + updates))
        for name, parameter in module.named_parameters():
            self.shadow[name].lerp_(parameter.float(), 1 - decay)

    @torch.no_grad()
    def swap(self, module: nn.Module) -> None:
        """Exchange the module's weights and the average; a second call undoes the first."""
        for name, parameter in module.named_parameters():
            kept = parameter.detach().clone().float()
            parameter.copy_(self.shadow[name])
            self.shadow[name] = kept


def optimizer_tensors(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as named tensors, `<state>|<parameter>`; parameters without state are left out."""
    state = optimizer.state
    return {
        f"{key}|{name}": value.contiguous()
        for name, parameter in module.named_parameters()
        if parameter in state
        for key, value in state[parameter].items()
    }


def restore_optimizer(module: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`."""
    parameters = dict(module.named_parameters())
    for full, value in tensors.items():
        key, name = full.split("|", 1)
        optimizer.state[parameters[name]][key] = value.to(parameters[name].device)
