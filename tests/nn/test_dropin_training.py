"""Drop-in layers in a user's training loop: autocast, torch.compile, gradient checkpointing, DDP and FSDP2."""

from __future__ import annotations

import copy
import socket
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ofakern.nn import (
    BeitAttention,
    BeitRelativePositionBias,
    BloomAttention,
    FairseqMultiheadAttention,
    MptAttention,
    MultiheadAttention,
    OFAAttention,
    OFAEncoderLayer,
    OFAPositions,
    OFASysEncoderLayer,
    PatchEmbed,
    PositionBias,
    SwinAttention,
    T5Attention,
    UMT5Attention,
)
from tests.nn.dropin import assert_all_like_peer, randomize
from tests.nn.ofa_replicas import ofa_config, ofasys_config

B, T, D, H = 2, 10, 32, 4
PADDING = torch.arange(T) >= torch.tensor([T, 6])[:, None]
POSITIONS = OFAPositions.encoder(T, token_bucket_size=8, max_position=16)


def additive(mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape).masked_fill(mask, torch.finfo(torch.float32).min)


class _WithBias(nn.Module):
    """An OFA layer and the parameters of its position inputs, as a user would write it."""

    def __init__(self, layer: nn.Module, ofasys: bool) -> None:
        super().__init__()
        self.layer, self.ofasys = layer, ofasys
        self.q_pos, self.k_pos = nn.Linear(D, D), nn.Linear(D, D)
        self.places = nn.Parameter(torch.zeros(T, D))
        self.token = nn.Parameter(torch.zeros(15, H))

    def forward(self, x: Tensor) -> Tensor:
        q, k = (layer(self.places).view(1, T, H, -1).expand(B, -1, -1, -1) for layer in (self.q_pos, self.k_pos))
        bias = PositionBias(q, k, (POSITIONS.table(self.token),), POSITIONS.given)
        if self.ofasys:
            return self.layer(x.transpose(0, 1), PADDING, self_attn_bias=bias)[0].transpose(0, 1)
        return self.layer(x, additive(PADDING)[:, None, None], attn_bias=bias)[0]


class _Beit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        config = SimpleNamespace(
            hidden_size=D, num_attention_heads=H, attention_probs_dropout_prob=0.0, image_size=12, patch_size=4
        )
        self.attention, self.bias = BeitAttention(config), BeitRelativePositionBias(config)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, self.bias((3, 3)).with_mask(additive(PADDING)[:, None, None]))[0]


@dataclass(frozen=True)
class Case:
    make: Callable[[], nn.Module]
    call: Callable[[nn.Module, Tensor], Tensor]
    shape: tuple[int, ...] = (B, T, D)


def t5(cls: type[nn.Module], decoder: bool) -> nn.Module:
    config = SimpleNamespace(
        is_decoder=decoder,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=20,
        d_model=D,
        d_kv=8,
        num_heads=H,
        dropout_rate=0.0,
    )
    return cls(config, has_relative_attention_bias=True, layer_idx=0)


def mpt() -> nn.Module:
    attention = SimpleNamespace(softmax_scale=None, attn_pdrop=0.0, clip_qkv=None)
    return MptAttention(SimpleNamespace(hidden_size=D, n_heads=H, max_seq_len=16, attn_config=attention), 0)


def bloom() -> nn.Module:
    return BloomAttention(
        SimpleNamespace(
            pretraining_tp=1, slow_but_exact=False, hidden_size=D, n_head=H, hidden_dropout=0.0, attention_dropout=0.0
        ),
        0,
    )


def swin() -> nn.Module:
    return SwinAttention(SimpleNamespace(attention_probs_dropout_prob=0.0, qkv_bias=True), D, H, 4)


def regions() -> Tensor:
    region = (torch.arange(16) % 4 >= 2).long() + 2 * (torch.arange(16) >= 8)
    return (region[:, None] != region)[None].float() * -100.0


CAUSAL = torch.ones(T, T, dtype=torch.bool).triu(1)
CASES = {
    "torch": Case(
        lambda: MultiheadAttention(D, H, batch_first=True),
        lambda m, x: m(x, x, x, key_padding_mask=PADDING, need_weights=False, attn_mask=CAUSAL)[0],
    ),
    "t5": Case(lambda: t5(T5Attention, False), lambda m, x: m(x, mask=additive(PADDING)[:, None, None])[0]),
    "umt5": Case(lambda: t5(UMT5Attention, True), lambda m, x: m(x, attention_mask=additive(CAUSAL)[None, None])[0]),
    "beit": Case(_Beit, lambda m, x: m(x)),
    "swin": Case(swin, lambda m, x: m(x, regions())[0], (B, 16, D)),
    "bloom": Case(
        bloom,
        lambda m, x: m(x, x, torch.linspace(0, 1, B * H * T).view(B * H, 1, T), additive(CAUSAL)[None, None])[0],
    ),
    "mpt": Case(mpt, lambda m, x: m(x, torch.linspace(0, 1, H * 16).view(H, 1, 16), None, CAUSAL[None, None])[0]),
    "ofa": Case(lambda: _WithBias(OFAEncoderLayer(ofa_config(D, H)), False), lambda m, x: m(x)),
    "ofasys": Case(lambda: _WithBias(OFASysEncoderLayer(ofasys_config(D, H)), True), lambda m, x: m(x)),
    "patches": Case(lambda: PatchEmbed(8, 4, 3, D), lambda m, x: m(x), (B, 3, 8, 8)),
}
ALONE = {
    "ofa attention": Case(lambda: OFAAttention(D, H), lambda m, x: m(x)[0]),
    "fairseq attention": Case(
        lambda: FairseqMultiheadAttention(D, H, self_attention=True), lambda m, x: m(x, x, x, need_weights=False)[0]
    ),
}
every = pytest.mark.parametrize("name", [*CASES, *ALONE])


def case_of(name: str) -> tuple[Case, nn.Module, Tensor]:
    case = (CASES | ALONE)[name]
    torch.manual_seed(1)
    return case, randomize(case.make()), torch.randn(case.shape)


def gradients(module: nn.Module, run: Callable[[nn.Module, Tensor], Tensor], x: Tensor) -> dict[str, Tensor]:
    module.zero_grad()
    x = x.detach().clone().requires_grad_()
    out = run(module, x)
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape)
    (out * weights.to(out.dtype)).sum().backward()
    found = {"out": out.detach(), "d x": x.grad}
    return found | {f"d {n}": p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


def assert_equal(have: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    assert have.keys() == want.keys() and len(want) > 2
    for name, value in want.items():
        size = float(value.abs().max()) + 1.0
        torch.testing.assert_close(have[name], value, rtol=0, atol=tolerance * size, msg=lambda m, n=name: f"{n}: {m}")


@every
def test_autocast(name: str) -> None:
    """bf16 inside, f32 parameters: within twice the error of the same layer on the reference backend."""
    case, module, x = case_of(name)
    exact = gradients(copy.deepcopy(module).double(), case.call, x.double())

    def run(module: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return case.call(module, x)

    have = gradients(module, run, x)
    for part in module.modules():
        part.backend = "reference"
    peer = gradients(module, run, x)
    assert all(value.dtype == torch.float32 for key, value in have.items() if key != "out")
    have["out"], peer["out"] = have["out"].float(), peer["out"].float()
    assert_all_like_peer(have, exact, peer, torch.bfloat16)


@every
def test_gradient_checkpointing(name: str) -> None:
    case, module, x = case_of(name)
    want = gradients(module, case.call, x)
    for reentrant in (False, True):
        have = gradients(module, lambda m, x, r=reentrant: checkpoint(case.call, m, x, use_reentrant=r), x)
        assert_equal(have, want, 0.0)


@every
def test_compiled_without_graph_breaks(name: str) -> None:
    """Dynamo and AOT autograd trace all of it, masks included."""
    case, module, x = case_of(name)
    want = gradients(module, case.call, x)
    torch._dynamo.reset()
    compiled = torch.compile(case.call, fullgraph=True, backend="aot_eager")
    assert_equal(gradients(module, compiled, x), want, 1e-6)


def test_inductor() -> None:
    """Generated code around the op, with a mask whose content changes between calls."""
    case, module, x = case_of("t5")
    torch._dynamo.reset()
    run = torch.compile(lambda m, x, mask: m(x, mask=mask)[0], fullgraph=True)
    for padding in (PADDING, PADDING.roll(1, 0)):
        mask = additive(padding)[:, None, None]
        want = gradients(module, lambda m, x, k=mask: m(x, mask=k)[0], x)
        assert_equal(gradients(module, lambda m, x, k=mask: run(m, x, k), x), want, 1e-6)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class All(nn.Module):
    """Every structured layer side by side: one model for one process group."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.parts = nn.ModuleDict({name: randomize(case.make()) for name, case in CASES.items()})

    def forward(self, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        outs = [
            CASES[name].call(part, torch.randn(CASES[name].shape, generator=generator))
            for name, part in self.parts.items()
        ]
        return torch.stack([out.pow(2).mean() for out in outs]).sum()


def distributed_step(rank: int, port: int, results: Any) -> None:
    """One step with DDP and one with FSDP2; both must give the mean gradient of the two ranks' data."""
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        alone = All()
        ((alone(0) + alone(1)) / 2).backward()
        want = {name: p.grad for name, p in alone.named_parameters() if p.grad is not None}
        ddp = DistributedDataParallel(All(), find_unused_parameters=True)
        ddp(rank).backward()
        sharded = All()
        for part in sharded.parts.values():
            fully_shard(part)
        fully_shard(sharded)
        sharded(rank).backward()
        for name, value in want.items():
            tolerance = 1e-5 * (float(value.abs().max()) + 1e-2)
            found = dict(ddp.module.named_parameters())[name].grad
            torch.testing.assert_close(found, value, rtol=0, atol=tolerance, msg=lambda m, n=name: f"DDP {n}: {m}")
            found = dict(sharded.named_parameters())[name].grad.full_tensor()
            torch.testing.assert_close(found, value, rtol=0, atol=tolerance, msg=lambda m, n=name: f"FSDP {n}: {m}")
        state = {name: t.full_tensor() for name, t in sharded.state_dict().items()}
        assert list(state) == list(alone.state_dict())
        results[rank] = len(want)
    finally:
        dist.destroy_process_group()


def test_two_ranks_with_ddp_and_fsdp2() -> None:
    context = torch.multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.spawn(distributed_step, (free_port(), results), nprocs=2)
        assert results[0] == results[1] > 50
