"""Data-parallel training without a wrapper: every rank has the whole model, gradients are summed once per update.

The losses of all ranks are divided by the tokens of all ranks, so the sum of their gradients is the gradient of one big
batch. A parameter that no rank used keeps no gradient, as on a single process.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Ranks:
    """This process among the others; alone unless started by torchrun (WORLD_SIZE above 1)."""

    def __init__(self, device: torch.device) -> None:
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        self._started = False
        if self.world > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
            self._started = True

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes."""
        return self.rank == 0

    def close(self) -> None:
        """Leave the process group, if this object entered it."""
        if self._started:
            dist.destroy_process_group()

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world > 1:
            dist.barrier()

    def total(self, value: float, device: torch.device) -> float:
        """The sum of `value` over the ranks."""
        if self.world == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64, device=device)
        dist.all_reduce(tensor)
        return float(tensor)

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether `flag` holds on some rank."""
        return self.total(float(flag), device) > 0

    def broadcast_module(self, module: nn.Module) -> None:
        """Give every rank the first one's parameters and buffers."""
        if self.world > 1:
            for tensor in (*module.parameters(), *module.buffers()):
                dist.broadcast(tensor.detach(), 0)

    def broadcast_buffers(self, module: nn.Module) -> None:
        """Give every rank the first one's running statistics."""
        if self.world > 1:
            for tensor in module.buffers():
                if tensor.is_floating_point():
                    dist.broadcast(tensor, 0)

    @torch.no_grad()
    def sum_gradients(self, module: nn.Module) -> None:
        """Replace every gradient by its sum over the ranks."""
        if self.world == 1:
            return
        parameters = [p for p in module.parameters() if p.requires_grad]
        used = torch.tensor([float(p.grad is not None) for p in parameters], device=parameters[0].device)
        dist.all_reduce(used)
        parts: list[Tensor] = []
        kept = [p for p, count in zip(parameters, used.tolist(), strict=True) if count]
        for parameter in kept:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parts.append(gradient.float().reshape(-1))
        flat = torch.cat(parts)
        dist.all_reduce(flat)
        for parameter, part in zip(kept, torch.split(flat, [p.numel() for p in kept]), strict=True):
            parameter.grad = part.view_as(parameter).to(parameter.dtype)
