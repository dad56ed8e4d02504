"""Learning rate, decay groups, settings."""

from __future__ import annotations

import pytest
import torch

from ofakern.modality.text.adaptor import TextAdaptorConfig
from ofakern.model import OFAConfig, OFAPlus
from ofakern.train import TrainConfig
from ofakern.train.optimizer import build_optimizer, clipped_step
from ofakern.train.schedule import learning_rate, warmup_share


@pytest.mark.parametrize(
    ("schedule", "power", "expected"),
    [
        ("linear", 1.0, [0.0, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0]),
        ("polynomial", 2.0, [0.0, 0.5, 1.0, 0.5625, 0.25, 0.0625, 0.0]),
        ("cosine", 1.0, [0.0, 0.5, 1.0, 0.853553, 0.5, 0.146447, 0.0]),
        ("constant", 1.0, [0.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_schedules(schedule: str, power: float, expected: list[float]) -> None:
    config = TrainConfig(learning_rate=1.0, schedule=schedule, power=power, warmup_ratio=0.2)
    places = [0.0, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert [learning_rate(config, place, warmup_share(config, 10)) for place in places] == pytest.approx(
        expected, abs=1e-6
    )
    late = config.replace(end_learning_rate=0.1)
    assert learning_rate(late, 1.0, 0.2) == pytest.approx(1.0 if schedule == "constant" else 0.1)


def test_warm_up_in_updates() -> None:
    assert warmup_share(TrainConfig(warmup_updates=5), 20) == 0.25
    assert warmup_share(TrainConfig(warmup_updates=50), 20) == 1.0
    assert learning_rate(TrainConfig(warmup_updates=0, learning_rate=3.0), 0.0, 0.0) == 3.0


def test_only_matrices_decay() -> None:
    text = TextAdaptorConfig(max_position=16, bucket_size=4)
    model = OFAPlus(
        OFAConfig(vocab_size=20, dim=16, ffn_dim=16, heads=2, encoder_layers=1, decoder_layers=1, adaptors=(text,))
    )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, plain = (
        {names[id(p)] for p in group["params"]} for group in build_optimizer(model, TrainConfig()).param_groups
    )
    assert decayed | plain == set(names.values()) and not decayed & plain
    assert all(name.endswith("weight") and "norm" not in name and "_ln" not in name for name in decayed)
    assert not [name for name in decayed if "embed" in name or "rel_pos" in name]
    assert "encoder.layers.0.fc1.weight" in decayed
    assert "encoder.adaptor.embed_tokens.weight" in plain


@pytest.mark.parametrize("limit", [0.0, 0.5, 100.0])
def test_the_clipped_step_is_clip_and_step(limit: float) -> None:
    """torch's own clip and AdamW, and what the norm was; a norm that is not finite changes nothing."""
    made = [[torch.nn.Parameter(torch.tensor([1.0, -2.0])), torch.nn.Parameter(torch.ones(2, 2))] for _ in range(2)]
    optimizers = [torch.optim.AdamW(parameters, lr=0.1, fused=True) for parameters in made]
    for step in range(3):
        for one, two in zip(*made, strict=True):
            one.grad = torch.full_like(one, 0.3 * (step + 1))
            two.grad = one.grad.clone()
        expected = torch.nn.utils.get_total_norm([p.grad for p in made[1] if p.grad is not None])
        if limit:
            torch.nn.utils.clip_grad_norm_(made[1], limit)
        assert clipped_step(optimizers[0], limit) == pytest.approx(expected.item())
        optimizers[1].step()
        for one, two in zip(*made, strict=True):
            torch.testing.assert_close(one, two)
    before = [p.clone() for p in made[0]]
    made[0][0].grad = torch.tensor([torch.inf, 1.0])
    assert clipped_step(optimizers[0], limit).isinf()
    assert all(torch.equal(p, q) for p, q in zip(before, made[0], strict=True))
    assert optimizers[0].state[made[0][0]]["step"] == 3
