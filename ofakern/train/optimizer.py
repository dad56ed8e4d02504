"""AdamW over the right groups, the gradient's norm, and an average of the weights."""

from __future__ import annotations

from typing import Any

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
    settings: dict[str, Any] = {"betas": config.betas, "eps": config.adam_epsilon, "fused": True}
    if not config.cuda_graphs:
        return torch.optim.AdamW(groups, lr=config.learning_rate, **settings)
    rate = torch.tensor(config.learning_rate, device=next(module.parameters()).device)
    optimizer = torch.optim.AdamW(groups, lr=rate, capturable=True, **settings)  # a recorded step reads its rate
    optimizer._warned_capturable_if_run_uncaptured = True  # the first step runs eagerly
    return optimizer


def clipped_step(optimizer: torch.optim.AdamW, limit: float) -> Tensor:
    """One step by gradients whose norm is cut to `limit` (0: never). Nothing waits for the device.

    Returns the norm before, f64 `[1]`; where it is not finite no weight and no state changes.
    """
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients).float()
    # The fused kernel divides by one as it reads them, and does nothing where the other is 1: torch's own way to
    # unscale gradients of 16 bits, without a pass of its own over all of them.
    optimizer.grad_scale = ((norm + 1e-6) / limit).clamp(min=1.0) if limit else None  # type: ignore[attr-defined]
    optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]
    optimizer.step()
    return norm.double().view(1)


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
