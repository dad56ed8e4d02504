"""What users can hand over wrongly, through the public API: each message names the argument, the rule and the value."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from ofakern import AttentionLayout, GeneralistModel, RelativeTerm, Task, Trainer, attention
from ofakern.errors import CheckpointError, DataError, OfakernError, OfakernTypeError, OfakernValueError
from ofakern.modality.image.adaptor import ImagePatchEmbedConfig
from ofakern.modality.text.adaptor import TextAdaptorConfig
from ofakern.model import OFAConfig
from ofakern.ops.attention import intervals

N = 5
INSTRUCTION = "[IMAGE:img] what is it? -> [TEXT:cap]"
ROW = {"img": Image.new("RGB", (32, 32), "red"), "cap": "a red square"}


def qkv(**changes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.ones(N, 2, 16)
    return changes.get("q", x), changes.get("k", x), changes.get("v", x)


def layout(rows: int = 2 * N - 1, visible: Tensor | None = None) -> AttentionLayout:
    position = torch.arange(N, dtype=torch.int32)
    full = intervals.full([N])
    term = RelativeTerm(position + N - 1, position, full, rows)
    return AttentionLayout.build(full if visible is None else visible, [N], [N], [term])


def outside() -> Tensor:
    visible = intervals.full([N])
    visible[2, 1] = N + 1
    return visible


TABLE = torch.zeros(2, 2 * N - 1)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (
            lambda backend: attention(*qkv(k=torch.ones(N, 2, 16).double()), layout(), tables=[TABLE], backend=backend),
            OfakernTypeError,
            "attention: k must have q's dtype (torch.float32), got torch.float64",
        ),
        (
            lambda backend: attention(*qkv(q=torch.ones(N, 2, 16).int()), layout(), tables=[TABLE], backend=backend),
            OfakernTypeError,
            "attention: q must be float32, bfloat16, float16 or float64, got torch.int32",
        ),
        (
            lambda backend: attention(*qkv(v=torch.ones(4, 2, 16)), layout(), tables=[TABLE], backend=backend),
            OfakernValueError,
            "attention: v must have shape [Nk=5,Hk=2,V=16], got [4, 2, 16]",
        ),
        (
            lambda backend: attention(
                *qkv(k=torch.ones(N, 2, 16, device="meta")), layout(), tables=[TABLE], backend=backend
            ),
            OfakernValueError,
            "attention: k must be on q's device (cpu), got meta",
        ),
        (
            lambda backend: attention(*qkv(), layout().to("meta"), tables=[TABLE], backend=backend),
            OfakernValueError,
            "attention: layout must be on q's device (cpu), got meta\nTry: layout.to(q.device)",
        ),
        (
            lambda backend: attention(*qkv(), layout(), tables=[torch.zeros(2, 8)], backend=backend),
            OfakernValueError,
            "attention: tables[0] must have shape [H=2,rows=9], got [2, 8]",
        ),
        (
            lambda backend: layout(rows=8),
            OfakernValueError,
            "AttentionLayout: terms[0] must read rows within [0, 8), got rows 4..8 at query 4 (all queries: 0..8)",
        ),
        (
            lambda backend: layout(visible=outside()),
            OfakernValueError,
            "AttentionLayout: visible[2] must satisfy 0 <= lo <= hi <= Nk = 5, got (0, 6)",
        ),
    ],
    ids=["dtype", "dtype-int", "shape", "device", "layout-device", "table", "coordinates", "interval"],
)
def test_attention(call: Callable[[str], object], kind: type[OfakernError], message: str, backend: str) -> None:
    with pytest.raises(kind) as caught:
        call(backend)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_negative_bit_view_gives_the_numbers_it_stands_for(backend: str) -> None:
    """DLPack hands over its memory without the sign: bindings refuse it (build/test_bindings.py), the op resolves."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(N, 2, 16, generator=generator) for _ in range(2))
    table = torch.randn(2, 2 * N - 1, generator=generator)

    def results(view: Callable[[Tensor], Tensor]) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for _ in range(3)] + [table.clone().requires_grad_()]
        q, k, v, bias = (view(leaf) for leaf in leaves)
        out = attention(q, k, v, layout(), tables=[bias], backend=backend)
        out.backward(view(weight))
        return [out, *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    assert torch._neg_view(x).is_neg()
    for got, want in zip(results(torch._neg_view), results(torch.neg), strict=True):
        assert torch.equal(got, want)


def small_model() -> GeneralistModel:
    image = ImagePatchEmbedConfig(image_height=32, image_width=32, patch_height=16, patch_width=16)
    adaptors = (TextAdaptorConfig(max_position=32, bucket_size=8), image)
    config = OFAConfig(dim=16, ffn_dim=16, heads=2, encoder_layers=1, decoder_layers=1, adaptors=adaptors)
    return GeneralistModel(config, image_size=32, vocab_size=270, bins=8)


def fit(rows: list[dict[str, Any]], model: GeneralistModel | None = None, **options: Any) -> Any:
    task = Task("caption", INSTRUCTION, micro_batch_size=len(rows)).add_dataset(rows, "train")
    trainer = Trainer(progress=False, tensorboard=False, **{"max_updates": 1, **options})
    return trainer.fit(model=model or small_model(), tasks=task)


@pytest.fixture(scope="module")
def model() -> GeneralistModel:
    model = small_model()
    fit([ROW], model)
    return model


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a file that is no image and half of one."""
    folder = tmp_path_factory.mktemp("images")
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "half.png")
    (folder / "half.png").write_bytes((folder / "half.png").read_bytes()[:1500])
    (folder / "text.png").write_text("not an image")
    return folder


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.png", "row 0, column 'img': image must be an existing file, got '{path}'"),
        ("half.png", "row 0, column 'img': image must be readable, got '{path}': image file is truncated"),
        ("text.png", "row 0, column 'img': image must be readable, got '{path}': no known image format"),
    ],
)
def test_images(model: GeneralistModel, images: Path, name: str, message: str) -> None:
    path = str(images / name)
    with pytest.raises(DataError) as caught:
        model.inference("caption", data={"img": path})
    assert str(caught.value).startswith(message.format(path=path))


def test_a_column_missing_from_a_row(model: GeneralistModel) -> None:
    with pytest.raises(DataError) as caught:
        model.inference("caption", data=[ROW, {"image": ROW["img"]}])
    assert str(caught.value) == f"row 1: column 'img' must be there for '{INSTRUCTION}', got columns ['image']"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("decoder.layer_norm.bias"), "got 1 missing: decoder.layer_norm.bias"),
        (lambda tensors: tensors.update(surprise=torch.zeros(1)), "got 1 unexpected: surprise"),
    ],
    ids=["missing", "extra"],
)
def test_checkpoint_keys(
    model: GeneralistModel, tmp_path: Path, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(CheckpointError) as caught:
        GeneralistModel.from_pretrained(tmp_path)
    assert str(caught.value) == f"from_pretrained: keys of {path} must be the model's, {message}"


def test_a_broken_sample_is_reported_and_skipped_until_they_are_too_many(
    images: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [ROW, ROW, ROW, {**ROW, "img": str(images / "text.png")}]
    result = fit(rows, max_updates=3, max_broken_share=0.25)
    assert result.updates == 3
    assert result.broken == ["caption: 12 samples, 3 broken (rows 3)"]
    reports = [record.getMessage() for record in caplog.records]
    assert len(reports) == 1, "one report per sample, not per epoch"
    assert re.match(
        r"caption: sample 3 skipped: row 3, column 'img': image must be readable, got '.*text.png'", reports[0]
    )
    with pytest.raises(
        DataError, match=r"caption: broken samples must be at most 20.00% of those seen, got \d+ of \d+"
    ):
        fit(rows, max_updates=100, max_broken_share=0.2)
