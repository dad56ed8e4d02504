"""Training by recorded steps, by the CPU's stand-in for CUDA graphs: the same bits as the same steps run eagerly."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from replay import stand_in
from scenes import small_config, tasks
from toy_model import ToyModel, task

from ofakern.checkpoint import GeneralistModel
from ofakern.data.batch import PackedBatch
from ofakern.errors import OfakernRuntimeError, OfakernValueError, OfakernWarning
from ofakern.modality.image.adaptor import ImagePatchEmbedAdaptor
from ofakern.nn import norm
from ofakern.nn.loss import LossSums
from ofakern.ops import library
from ofakern.ops.graph import RECORDERS
from ofakern.ops.selection import Backends
from ofakern.tasks import Task
from ofakern.train import Trainer, TrainResult, read_log, recorded, run

QUIET: dict[str, Any] = {"progress": False, "tensorboard": False, "learning_rate": 0.05}
GRAPHS: dict[str, Any] = {**QUIET, "cuda_graphs": True}


@pytest.fixture(autouse=True)
def graphs() -> Iterator[None]:
    with stand_in():
        yield


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.network.state_dict().items()}


def assert_same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def losses(result: TrainResult) -> list[tuple[float, float]]:
    return [(record["loss"], record["grad_norm"]) for record in result.history]


def two_tasks() -> list[Task]:
    return [task("a", 1, weight=0.5), task("b", 5, micro_batch_size=3, update_freq=2)]


def eagerly(model: Any, monkeypatch: pytest.MonkeyPatch, given: list[Task], **settings: Any) -> TrainResult:
    """The same run, of which nothing is recorded."""
    with monkeypatch.context() as patch, pytest.warns(OfakernWarning, match="there are 0 graphs"):
        patch.setattr(recorded, "MOST_GRAPHS", 0)
        return Trainer(**{**GRAPHS, **settings}).fit(model=model, tasks=given)


@pytest.mark.parametrize(
    "extra", [{}, {"bf16": True, "ema_decay": 0.9}, {"clip_norm": 0.05, "gradient_accumulation": 2}]
)
def test_the_bits_of_eager_steps(extra: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout, running statistics, a parameter that nothing uses, two tasks, and batches that differ."""
    by_graph, eager, plain = ToyModel(), ToyModel(), ToyModel()
    result = Trainer(**GRAPHS, **extra, max_updates=6).fit(model=by_graph, tasks=two_tasks())
    expected = eagerly(eager, monkeypatch, two_tasks(), **extra, max_updates=6)
    assert_same_bits(weights(by_graph), weights(eager))
    assert losses(result) == losses(expected)
    micro = 18 * extra.get("gradient_accumulation", 1)
    assert result.graphs == {"recorded": 2, "replayed": micro - 2, "eager": 2}
    assert result.history[-1]["graphs"] == result.graphs
    assert expected.graphs == {"recorded": 0, "replayed": 0, "eager": micro}
    without = Trainer(**QUIET, **extra, max_updates=6).fit(model=plain, tasks=two_tasks())
    assert without.graphs == {} and "graphs" not in without.history[0]
    assert torch.equal(plain.network.unused.weight, by_graph.network.unused.weight)
    for name, tensor in weights(plain).items():
        torch.testing.assert_close(tensor, weights(by_graph)[name], rtol=2e-4, atol=2e-5)


def scenes_model(seed: int = 0) -> GeneralistModel:
    torch.manual_seed(seed)
    config = replace(small_config(), dropout=0.1, attention_dropout=0.1, encoder_drop_path=0.1)
    return GeneralistModel(config, image_size=32, vocab_size=300, bins=33)


def scenes_tasks() -> list[Task]:
    """Six pictures, four of them in a batch: texts of other lengths at every update."""
    found = tasks()
    for one in found:
        one.micro_batch_size = 4
    return found


@pytest.mark.parametrize("kernels", [True, False])
def test_the_model_on_pictures_texts_and_closed_sets(kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without kernels: on a GPU's road today, plain torch."""
    if not kernels:
        monkeypatch.setattr(library, "_CPU", ())
        monkeypatch.setattr(Backends, "select", lambda *_: "reference")
        monkeypatch.setattr(norm, "has_kernel", lambda *_: False)

        def convolved(self: ImagePatchEmbedAdaptor, images: torch.Tensor) -> torch.Tensor:
            return self.proj(images).flatten(2).transpose(1, 2)

        monkeypatch.setattr(ImagePatchEmbedAdaptor, "_patches", convolved)
    by_graph, eager = scenes_model(), scenes_model()
    settings: dict[str, Any] = {"max_updates": 4, "pad_to": 32, "learning_rate": 1e-3}
    result = Trainer(**{**GRAPHS, **settings}).fit(model=by_graph, tasks=scenes_tasks())
    expected = eagerly(eager, monkeypatch, scenes_tasks(), **settings)
    assert result.graphs == {"recorded": 3, "replayed": 9, "eager": 3}
    assert losses(result) == losses(expected)
    assert_same_bits(weights(by_graph), weights(eager))


def test_resume_is_exact(tmp_path: Path) -> None:
    settings: dict[str, Any] = {**GRAPHS, "max_updates": 9}
    whole, cut = ToyModel(), ToyModel(seed=99)
    Trainer(**settings, output_dir=tmp_path / "cut", save_every=4, keep_last=0).fit(model=whole, tasks=two_tasks())
    path = tmp_path / "cut" / "checkpoint-00000004"
    Trainer(**settings, output_dir=tmp_path / "again").fit(model=cut, tasks=two_tasks(), resume=path)
    assert_same_bits(weights(whole), weights(cut))
    files = [tmp_path / run / "checkpoint-00000009" / "training.safetensors" for run in ("cut", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert [r["loss"] for r in read_log(tmp_path / "cut")][4:] == [r["loss"] for r in read_log(tmp_path / "again")]


def test_so_many_graphs_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded, "MOST_GRAPHS", 1)
    with pytest.warns(OfakernWarning, match="there are 1 graphs, so micro-batches of other shapes run eagerly") as seen:
        result = Trainer(**GRAPHS, max_updates=5).fit(model=ToyModel(), tasks=two_tasks())
    assert len([w for w in seen if issubclass(w.category, OfakernWarning)]) == 1
    # The second task's batches are two in an update, so theirs come first for the second time.
    assert result.graphs == {"recorded": 1, "replayed": 9, "eager": 6}


class Longing(ToyModel):
    """Its loss goes by how long single samples are."""

    def train_step_loss(self, batch: PackedBatch, label_smoothing: float) -> LossSums:
        sums = super().train_step_loss(batch, label_smoothing)
        return replace(sums, loss=sums.loss * max(batch.source.lengths_cpu))


class Hosting(ToyModel):
    """Its loss is known to read values."""

    def prepare_batch(self, batch: PackedBatch) -> bool:
        return False

    def train_step_loss(self, batch: PackedBatch, label_smoothing: float) -> LossSums:
        sums = super().train_step_loss(batch, label_smoothing)
        return replace(sums, loss=sums.loss * (1.0 + 0.0 * float(sums.nll)))


class Reading(Hosting):
    """It is not."""

    def prepare_batch(self, batch: PackedBatch) -> bool:
        return True


@pytest.mark.parametrize("kind", [Longing, Hosting])
def test_a_loss_that_cannot_be_recorded_runs_eagerly_and_says_so(kind: type[ToyModel]) -> None:
    model, expected = kind(), ToyModel()
    with pytest.warns(OfakernWarning, match="of task 'shift' run eagerly") as seen:
        result = Trainer(**GRAPHS, max_updates=4).fit(model=model, tasks=task())
    assert len([w for w in seen if issubclass(w.category, OfakernWarning)]) == 1
    assert result.graphs == {"recorded": 0, "replayed": 0, "eager": 4}
    Trainer(**GRAPHS, max_updates=4).fit(model=expected, tasks=task())
    assert_same_bits(weights(model), weights(expected))


def test_a_loss_that_reads_values_is_an_error_by_name() -> None:
    with pytest.raises(OfakernRuntimeError, match="the loss of task 'shift' must leave its values on the device"):
        Trainer(**GRAPHS, max_updates=4).fit(model=Reading(), tasks=task())


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    model = ToyModel()

    class Breaking(ToyModel):
        def __init__(self) -> None:
            self.__dict__ = model.__dict__

    trained = task()
    Trainer(**GRAPHS, max_updates=3).fit(model=model, tasks=trained)
    with torch.no_grad():
        model.network.norm.weight[3] = torch.inf
    before = weights(model)
    with pytest.raises(OfakernRuntimeError, match="loss must be finite, got nan in task 'shift' at update 1"):
        Trainer(**GRAPHS, max_updates=3).fit(model=Breaking(), tasks=trained)
    after = weights(model)
    assert_same_bits(
        {name: before[name] for name, _ in model.network.named_parameters()},
        {name: after[name] for name, _ in model.network.named_parameters()},
    )


class Two:
    """Ranks, of which there are two."""

    world, rank, first = 2, 0, True

    def __init__(self, device: torch.device) -> None: ...
    def broadcast_module(self, module: torch.nn.Module) -> None: ...


def test_where_graphs_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "Ranks", Two)
    with pytest.raises(OfakernValueError, match=r"cuda_graphs must be False with several ranks \(WORLD_SIZE=2\)"):
        Trainer(**GRAPHS, max_updates=2).fit(model=ToyModel(), tasks=task())
    monkeypatch.undo()
    monkeypatch.delitem(RECORDERS, "cpu")
    with pytest.raises(OfakernValueError, match="TrainConfig: cuda_graphs: device must be a GPU, got cpu"):
        Trainer(**GRAPHS, max_updates=2).fit(model=ToyModel(), tasks=task())
    with pytest.raises(OfakernValueError, match="pad_to must not be negative, got -1"):
        Trainer(pad_to=-1)
