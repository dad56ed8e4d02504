"""Images: the golden transform, every kind of input, every kind of bad input."""

from __future__ import annotations

import base64
import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ofakern.data.readers import open_files
from ofakern.errors import DataError
from ofakern.modality.image.preprocess import ImageTransform, centre_mask, load_image

GOLDEN = Path(__file__).parents[1] / "golden"
IMAGE = GOLDEN / "ofasys/main/raw/img1.png"


def png(image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


def test_golden_images_to_the_bit() -> None:
    expected = np.load(GOLDEN / "data/images.npz")["img"]
    for row, name in enumerate(("img1.png", "img2.png")):
        value = ImageTransform(64)(load_image(GOLDEN / "ofasys/main/raw" / name))
        assert value.dtype == torch.float32 and value.shape == (3, 64, 64)
        assert np.array_equal(value.numpy(), expected[row])


def test_all_kinds_of_input_give_the_same_image(tmp_path: Path) -> None:
    raw = IMAGE.read_bytes()
    pixels = np.array(Image.open(IMAGE).convert("RGB"))
    inputs = [
        IMAGE,
        str(IMAGE),
        raw,
        memoryview(raw),
        base64.b64encode(raw).decode(),
        base64.urlsafe_b64encode(raw).decode(),
        "data:image/png;base64," + base64.b64encode(raw).decode(),
        {"bytes": raw, "path": None},
        {"bytes": None, "path": str(IMAGE)},
        Image.open(IMAGE),
        pixels,
        pixels.transpose(2, 0, 1),
        torch.from_numpy(pixels).permute(2, 0, 1),
    ]
    for value in inputs:
        assert np.array_equal(np.array(load_image(value)), pixels)
    (tmp_path / "img1.png").write_bytes(raw)
    assert np.array_equal(np.array(load_image("img1.png", files=open_files(tmp_path))), pixels)


def test_normalised_tensors_are_taken_as_they_are() -> None:
    transform = ImageTransform(8)
    value = torch.randn(3, 8, 8)
    assert transform.is_ready(value) and torch.equal(transform.ready(value), value)
    assert transform.ready(value.double().numpy()).dtype == torch.float32
    assert not transform.is_ready(torch.zeros(3, 8, 8, dtype=torch.uint8))
    with pytest.raises(DataError, match="uint8, or float"):
        load_image(torch.zeros(3, 9, 9))


def test_exif_orientation() -> None:
    image = Image.new("RGB", (4, 2), "red")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned a quarter
    assert load_image(png(image, exif=exif)).size == (2, 4)


def test_transparency_is_white_and_deep_grey_is_scaled() -> None:
    clear = Image.new("RGBA", (2, 2), (10, 20, 30, 0))
    assert load_image(png(clear)).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([200, 0, 0] * 256)
    assert load_image(png(palette)).getpixel((0, 0)) == (200, 0, 0)
    assert load_image(png(palette, transparency=0)).getpixel((0, 0)) == (255, 255, 255)
    deep = Image.fromarray(np.full((2, 2), 0x8000, dtype=np.uint16))
    assert load_image(png(deep)).getpixel((0, 0)) == (128, 128, 128)
    assert load_image(Image.new("CMYK", (2, 2))).mode == "RGB"
    assert load_image(Image.new("LA", (2, 2), (7, 255))).getpixel((0, 0)) == (7, 7, 7)
    assert load_image(Image.new("1", (2, 2), 1)).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.5, 1.0])
def test_centre_mask(ratio: float) -> None:
    value = centre_mask(torch.ones(3, 8, 8), ratio)
    assert int((value == 0).sum()) == 3 * round(8 * ratio) ** 2
    if 0 < ratio < 1:
        assert value[:, 0].min() == 1


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("none.png", "img: image must be an existing file, got 'none.png'"),
        ("not base64!", "existing file or base64"),
        (b"not an image", "img: image must be readable, got 12 bytes"),
        (IMAGE.read_bytes()[:600], "img: image must be readable"),
        ("https://example.org/a.png", "must be local"),
        (None, "got NoneType"),
        ({"bytes": None, "path": None}, "got NoneType"),
        (np.zeros((2, 2, 5), np.uint8), r"got \(2, 2, 5\)"),
        (np.zeros((0, 4, 3), np.uint8), "pixels"),
        (Image.new("F", (2, 2)), "floating point"),
        (Path("missing.png"), "readable file"),
    ],
)
def test_bad_images(value: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_image(value, where="img")


def test_bombs_are_refused_before_they_are_decoded() -> None:
    # 20000 x 20000 pixels of one bit: 400 million pixels in a file of a few kilobytes
    header = png(Image.new("1", (20000, 20000)))
    with pytest.raises(DataError, match="img: image"):
        load_image(header, where="img")
    with pytest.raises(DataError, match="must have 1 to 100 pixels, got 80 x 56"):
        load_image(IMAGE, max_pixels=100)


def test_names_do_not_leave_their_folder(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "secret.png").write_bytes(IMAGE.read_bytes())
    files = open_files(tmp_path / "in")
    assert files is not None and "../secret.png" not in files
    with pytest.raises(DataError, match="must be an existing file"):
        load_image("../secret.png" if not os.path.exists("../secret.png") else "../../secret.png", files=files)
