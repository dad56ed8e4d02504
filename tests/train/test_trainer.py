"""The trainer on a toy model: mixing, exact resume, checkpoints, signals, broken samples, ranks."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_model import ToyModel, rows, task

from ofakern.errors import CheckpointError, DataError, OfakernRuntimeError, OfakernTypeError, OfakernValueError
from ofakern.tasks import Task
from ofakern.train import TrainConfig, Trainer, read_log
from ofakern.train.checkpoints import list_checkpoints

QUIET: dict[str, Any] = {"progress": False, "tensorboard": False, "learning_rate": 0.05}


def weights(model: ToyModel) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.network.state_dict().items()}


def assert_same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def test_learns_and_evaluates(tmp_path: Path) -> None:
    learnt = task(metrics=["accuracy"], target_field="answer")
    learnt.add_dataset(rows(1), "valid")
    model = ToyModel()
    result = Trainer(**QUIET, max_updates=80, output_dir=tmp_path, evaluate_every=40).fit(model=model, tasks=learnt)
    assert result.updates == 80 and not model.network.training and model.prepared == 1
    assert result.evaluation["shift"]["accuracy"] == 1.0
    assert result.evaluation["shift"]["nll"] < 0.5
    log = read_log(tmp_path)
    assert [r["update"] for r in log if "loss" in r] == list(range(1, 81))
    assert [r["update"] for r in log if "valid" in r] == [40, 80]
    assert log[70]["loss"] < log[0]["loss"] and log[0]["tokens_per_second"] > 0
    assert result.broken == ["shift: 320 samples, none broken"]
    assert result.checkpoint == tmp_path / "checkpoint-00000080"


def test_every_task_contributes_to_every_update() -> None:
    model = ToyModel()
    tasks = [task("a", 1), task("b", 2, update_freq=2, micro_batch_size=3)]
    Trainer(**QUIET, max_updates=5, gradient_accumulation=2).fit(model=model, tasks=tasks)
    assert [len(b) for b in model.batches] == [4, 4, 3, 3, 3, 3] * 5


def test_gradient_is_the_sum_of_losses_over_the_sum_of_tokens() -> None:
    """One update of two micro-batches equals one of their union, where the network itself is per-token."""
    for split in ((4, 1), (2, 2)):
        model = ToyModel()
        model.network.norm = torch.nn.Identity()  # type: ignore[assignment]
        model.network.dropout = torch.nn.Identity()  # type: ignore[assignment]
        data = Task("t", "[TEXT:x] -> [TEXT:y]", micro_batch_size=split[0], update_freq=split[1])
        data.add_dataset(rows(1), "train")
        Trainer(**QUIET, max_updates=1).fit(model=model, tasks=data)
        if split == (4, 1):
            expected = weights(model)
    for name, tensor in weights(model).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)


def test_weight_is_honoured() -> None:
    silent, loud = ToyModel(), ToyModel()
    Trainer(**QUIET, max_updates=3, weight_decay=0).fit(model=silent, tasks=task(weight=0.0))
    start = ToyModel()
    for name, parameter in silent.network.named_parameters():
        assert torch.equal(parameter, dict(start.network.named_parameters())[name])
    Trainer(**QUIET, max_updates=3, weight_decay=0).fit(model=loud, tasks=task(weight=2.0))
    assert not torch.equal(loud.network.out.weight, start.network.out.weight)


@pytest.mark.parametrize("extra", [{}, {"ema_decay": 0.9}, {"bf16": True, "schedule": "cosine"}, {"num_workers": 1}])
def test_resume_is_exact(tmp_path: Path, extra: dict[str, Any]) -> None:
    settings: dict[str, Any] = {**QUIET, **extra, "max_updates": 12}
    tasks = lambda: [task("a", 1), task("b", 5, micro_batch_size=3)]  # noqa: E731
    whole = ToyModel()
    Trainer(**settings, output_dir=tmp_path / "whole").fit(model=whole, tasks=tasks())
    first = ToyModel()
    with pytest.raises(Stopped):
        Trainer(**settings, output_dir=tmp_path / "cut", save_every=5).fit(model=Stopping(first, 17), tasks=tasks())
    assert [p.name for p in list_checkpoints(tmp_path / "cut")] == ["checkpoint-00000005"]
    second = ToyModel(seed=99)
    result = Trainer(**settings, output_dir=tmp_path / "cut").fit(model=second, tasks=tasks(), resume=True)
    assert result.updates == 12
    assert_same_bits(weights(whole), weights(second))
    a, b = read_log(tmp_path / "whole"), read_log(tmp_path / "cut")
    assert [r["loss"] for r in a] == [r["loss"] for r in b]
    files = [p.name for p in (tmp_path / "whole" / "checkpoint-00000012").iterdir() if p.suffix == ".safetensors"]
    for name in files:
        parts = [(tmp_path / run / "checkpoint-00000012" / name).read_bytes() for run in ("whole", "cut")]
        assert parts[0] == parts[1], name


class Stopped(Exception):
    pass


class Stopping(ToyModel):
    """Raises in the middle of a run, as a crash would."""

    def __init__(self, model: ToyModel, after: int) -> None:
        self.__dict__ = model.__dict__
        self.after = after

    def train_step_loss(self, batch: Any, label_smoothing: float) -> Any:
        self.after -= 1
        if self.after < 0:
            raise Stopped
        return super().train_step_loss(batch, label_smoothing)


def test_resume_refuses_another_run(tmp_path: Path) -> None:
    Trainer(**QUIET, max_updates=2, output_dir=tmp_path).fit(model=ToyModel(), tasks=task("a"))
    with pytest.raises(CheckpointError, match="tasks and seed"):
        Trainer(**QUIET, max_updates=4, output_dir=tmp_path).fit(model=ToyModel(), tasks=task("b"), resume=True)
    with pytest.raises(CheckpointError, match="none in"):
        Trainer(**QUIET, output_dir=tmp_path / "empty").fit(model=ToyModel(), tasks=task("a"), resume=True)
    (tmp_path / "checkpoint-00000002" / "training.safetensors").write_bytes(b"\x10\0\0\0")
    with pytest.raises(CheckpointError, match="whole checkpoint"):
        Trainer(**QUIET, max_updates=4, output_dir=tmp_path).fit(model=ToyModel(), tasks=task("a"), resume=True)


def test_checkpoints_are_whole_and_few(tmp_path: Path) -> None:
    Trainer(**QUIET, max_updates=7, output_dir=tmp_path, save_every=2, keep_last=2).fit(model=ToyModel(), tasks=task())
    assert [p.name for p in list_checkpoints(tmp_path)] == ["checkpoint-00000006", "checkpoint-00000007"]
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_signal_saves_and_ends(tmp_path: Path) -> None:
    class Signalled(ToyModel):
        def train_step_loss(self, batch: Any, label_smoothing: float) -> Any:
            if len(self.batches) == 3:
                os.kill(os.getpid(), signal.SIGINT)
            return super().train_step_loss(batch, label_smoothing)

    before = signal.getsignal(signal.SIGINT)
    result = Trainer(**QUIET, max_updates=50, output_dir=tmp_path).fit(model=Signalled(), tasks=task())
    assert result.interrupted and result.updates == 4
    assert result.checkpoint == tmp_path / "checkpoint-00000004"
    assert signal.getsignal(signal.SIGINT) is before


def test_a_run_without_one_usable_sample_is_no_success() -> None:
    broken = Task("t", "[TEXT:x] -> [TEXT:y]", micro_batch_size=4)
    broken.add_dataset([{"x": None, "y": 0}] * 4, "train")
    with pytest.raises(DataError, match="t: broken samples must leave some sample to learn from, got 8 of 8"):
        Trainer(**QUIET, max_updates=2).fit(model=ToyModel(), tasks=broken)


def test_broken_samples_are_skipped_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    broken = Task("t", "[TEXT:x] -> [TEXT:y]", micro_batch_size=20)
    broken.add_dataset([{"x": None, "y": 0} if i == 7 else r for i, r in enumerate(rows(1, 20))], "train")
    result = Trainer(**QUIET, max_updates=2).fit(model=ToyModel(), tasks=broken)
    assert result.broken == ["t: 40 samples, 2 broken (rows 7)"]
    assert "sample 7 skipped" in caplog.text
    broken.add_dataset([{"x": None, "y": 0}] * 60, "train")
    with pytest.raises(DataError, match="must be at most 10.00%"):
        Trainer(**QUIET, max_updates=60).fit(model=ToyModel(), tasks=broken)


def test_nan_stops_the_run(tmp_path: Path) -> None:
    model = ToyModel()
    with torch.no_grad():
        model.network.out.weight[3] = torch.nan
    with pytest.raises(OfakernRuntimeError, match="loss must be finite, got nan in task 'shift' at update 1"):
        Trainer(**QUIET, max_updates=5, output_dir=tmp_path).fit(model=model, tasks=task())
    assert list_checkpoints(tmp_path) == []


def test_epochs_and_time_limits() -> None:
    tasks = [task("a"), task("b", 2, micro_batch_size=2)]
    assert Trainer(**QUIET, epochs=2).fit(model=ToyModel(), tasks=tasks).updates == 11
    assert Trainer(**QUIET, max_updates=10**9, max_seconds=0.3).fit(model=ToyModel(), tasks=tasks).updates < 10**6


def test_average_is_what_is_returned_and_saved(tmp_path: Path) -> None:
    plain, averaged = ToyModel(), ToyModel()
    Trainer(**QUIET, max_updates=20).fit(model=plain, tasks=task())
    Trainer(**QUIET, max_updates=20, ema_decay=0.95, output_dir=tmp_path).fit(model=averaged, tasks=task())
    assert not torch.equal(plain.network.out.weight, averaged.network.out.weight)
    loaded = ToyModel()
    loaded.load_weights(tmp_path / "checkpoint-00000020")
    assert_same_bits(weights(loaded), weights(averaged))


def test_global_random_state_is_left_alone() -> None:
    model = ToyModel()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    Trainer(**QUIET, max_updates=2).fit(model=model, tasks=task())
    assert torch.equal(torch.rand(3), expected)


def test_wrong_arguments() -> None:
    with pytest.raises(OfakernTypeError, match="'lr'"):
        Trainer(lr=1)
    with pytest.raises(OfakernValueError, match="schedule"):
        TrainConfig(schedule="step")
    with pytest.raises(OfakernValueError, match="training rows"):
        Trainer(**QUIET).fit(model=ToyModel(), tasks=Task("t", "[TEXT:x] -> [TEXT:y]"))
    with pytest.raises(OfakernValueError, match="different names"):
        Trainer(**QUIET).fit(model=ToyModel(), tasks=[task(), task()])
    with pytest.raises(OfakernValueError, match="at least one task"):
        Trainer(**QUIET).fit(model=ToyModel(), tasks=[])
    assert TrainConfig.from_dict({"betas": [0.9, 0.98]}).betas == (0.9, 0.98)


def train_rank(rank: int, world: int, port: int, out: Path) -> None:
    """What torchrun starts, in a forked process."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    model = per_token_model(seed=rank)  # the first rank's weights must win
    Trainer(**QUIET, max_updates=4, output_dir=out).fit(model=model, tasks=task(micro_batch_size=2))


def per_token_model(seed: int = 0) -> ToyModel:
    model = ToyModel(seed)
    model.network.norm = torch.nn.Identity()  # type: ignore[assignment]
    model.network.dropout = torch.nn.Identity()  # type: ignore[assignment]
    return model


def test_two_ranks_equal_one(tmp_path: Path) -> None:
    alone = per_token_model()
    one = Trainer(**QUIET, max_updates=4).fit(model=alone, tasks=task(micro_batch_size=4))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=train_rank, args=(rank, 2, port, tmp_path)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
        assert process.exitcode == 0
    together = per_token_model()
    together.load_weights(tmp_path / "checkpoint-00000004")
    assert [r["tokens"] for r in read_log(tmp_path)] == [r["tokens"] for r in one.history]
    for name, tensor in weights(alone).items():
        torch.testing.assert_close(tensor, weights(together)[name], rtol=1e-5, atol=1e-6)


def test_state_file_is_plain_json(tmp_path: Path) -> None:
    Trainer(**QUIET, max_updates=2, output_dir=tmp_path).fit(model=ToyModel(), tasks=task())
    state = json.loads((tmp_path / "checkpoint-00000002" / "trainer_state.json").read_text())
    assert state["tasks"]["shift"]["position"] == 8 and state["update"] == 2
