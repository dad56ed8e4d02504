"""Videos, motions and made images through the whole pipeline: plan, training, evaluation, answers, files."""

from __future__ import annotations

import builtins
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ofakern import GeneralistModel, Task, Trainer
from ofakern.cli.main import main
from ofakern.data.example import PreprocessConfig
from ofakern.errors import DataError, OfakernRuntimeError, OfakernTypeError, OfakernValueError
from ofakern.modality.image.adaptor import ImageResnetConfig
from ofakern.modality.image.codes import ImageCodesConfig
from ofakern.modality.image.vqgan import VQGAN, VQGANConfig
from ofakern.modality.motion.adaptor import MotionConfig
from ofakern.modality.motion.preprocess import MotionSettings
from ofakern.modality.motion.skeleton import Motion
from ofakern.modality.text.adaptor import TextAdaptorConfig
from ofakern.modality.video.adaptor import VideoConfig

REAL = Path(__file__).parents[1] / "golden" / "real"
CAPTIONS = {"cars": "cars drive on a road", "fruit": "fruit moves on a belt"}
DANCES = {"indian": "an Indian dance", "martial": "martial arts"}
RESNET = ImageResnetConfig(resnet_type="resnet50", resnet_blocks=(1, 1, 1), resnet_width=8, bucket_size=4)
TOKENIZER = VQGANConfig(
    codes=16, embed_dim=8, resolution=8, channels=32, multipliers=(1, 2), blocks=1, attention=(), latent=8
)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def small_model(*adaptors: Any, **kwargs: Any) -> GeneralistModel:
    return GeneralistModel(
        adaptors=(TextAdaptorConfig(max_position=64, bucket_size=16), *adaptors),
        vocab_size=300,
        bins=0,
        **{"dim": 32, "ffn_dim": 64, "heads": 4, "encoder_layers": 1, "decoder_layers": 1, "dropout": 0.0},
        init_std=0.2,
        **kwargs,
    )


def train(model: GeneralistModel, task: Task, updates: int, rate: float = 5e-3) -> tuple[float, float]:
    """The validation loss before and after."""
    model.prepare([task])
    before = Trainer(progress=False).evaluate(model=model, tasks=task, split="valid")[task.name]["nll"]
    trainer = Trainer(max_updates=updates, learning_rate=rate, progress=False)
    after = trainer.fit(model=model, tasks=task).evaluation[task.name]["nll"]
    return before, after


# ------------------------------------------------------------------------------------------------------------ video


def clip(name: str) -> list[Image.Image]:
    strip = Image.open(REAL / "video" / f"{name}.jpg")
    return [strip.crop((x, 0, x + 96, 54)) for x in range(0, 768, 96)]


@pytest.fixture(scope="module")
def captioner() -> tuple[GeneralistModel, Task, tuple[float, float]]:
    rows = [{"v": clip(f"{scene}_{n}"), "cap": text} for scene, text in CAPTIONS.items() for n in (0, 1)]
    task = Task("clips", "[VIDEO:v] what happens? -> [TEXT:cap]", micro_batch_size=4, metrics=["accuracy"])
    task.add_dataset(rows).add_dataset(rows, "valid")
    preprocess = PreprocessConfig(video_size=32, video_frames=4, max_target_length=64)
    model = small_model(RESNET, VideoConfig(bucket_size=8), preprocess=preprocess)
    return model, task, train(model, task, 25)


def test_a_clip_gets_its_caption(captioner: tuple[GeneralistModel, Task, tuple[float, float]]) -> None:
    model, task, (before, after) = captioner
    assert after < 0.3 * before
    assert Trainer().evaluate(model=model, tasks=task, split="valid")["clips"]["accuracy"] == 1.0
    assert model.inference("clips", {"v": clip("fruit_1")}).text == CAPTIONS["fruit"]


def test_a_clip_in_any_form(captioner: tuple[GeneralistModel, Task, tuple[float, float]], tmp_path: Path) -> None:
    model = captioner[0]
    frames = clip("cars_0")
    for number, frame in enumerate(frames):
        frame.save(tmp_path / f"{number}.png")
    frames[0].save(tmp_path.with_suffix(".gif"), save_all=True, append_images=frames[1:])
    array = np.stack([np.asarray(frame) for frame in frames])
    score = model.inference("clips", {"v": frames}).score
    for value in (tmp_path, str(tmp_path), array, torch.from_numpy(array).permute(0, 3, 1, 2)):
        assert model.inference("clips", {"v": value}).score == score
    for value in (tmp_path.with_suffix(".gif"), tmp_path.with_suffix(".gif").read_bytes()):  # 256 colours
        assert model.inference("clips", {"v": value}).text == CAPTIONS["cars"]


def test_a_video_file(captioner: tuple[GeneralistModel, Task, tuple[float, float]]) -> None:
    pytest.importorskip("av")
    path = REAL / "video" / "milk.mkv"
    model = captioner[0]
    answer = model.inference("clips", [{"v": path}, {"v": path.read_bytes()}])
    assert answer[0].score == answer[1].score and answer[0].text
    with pytest.raises(DataError, match="row 0, column 'v': video must be readable, got 2000 bytes"):
        model.inference("clips", {"v": bytes(2000)})
    with pytest.raises(DataError, match="row 0, column 'v': video must have at least one frame"):
        model.inference("clips", {"v": path.read_bytes()[:2000]})


def test_a_video_file_without_pyav(
    captioner: tuple[GeneralistModel, Task, tuple[float, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    real_import = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "av":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(OfakernRuntimeError, match=r"PyAV must be installed.*\nTry: pip install 'ofakern\[video\]'"):
        captioner[0].inference("clips", {"v": REAL / "video" / "milk.mkv"})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "at least one frame, got none"),
        (np.zeros((4, 8, 8), np.uint8), "four dimensions"),
        (7, "must be a path, bytes, images or a uint8 array, got int"),
        ("absent.mp4", "existing file or folder, got 'absent.mp4'"),
        ([Image.new("RGB", (8, 8)), "gone.png"], "frame 1: image must be an existing file"),
    ],
)
def test_bad_videos(value: Any, message: str, captioner: tuple[GeneralistModel, Task, tuple[float, float]]) -> None:
    with pytest.raises(DataError, match=message):
        captioner[0].inference("clips", {"v": value})


def test_a_video_needs_the_image_backbone() -> None:
    task = Task("clips", "[VIDEO:v] -> [TEXT:cap]").add_dataset([{"v": clip("cars_0"), "cap": "cars"}])
    with pytest.raises(OfakernValueError, match="adaptors must include 'image_resnet'"):
        small_model(VideoConfig()).prepare([task])


# ----------------------------------------------------------------------------------------------------------- motion


@pytest.fixture(scope="module")
def dancer() -> tuple[GeneralistModel, Task, tuple[float, float]]:
    files = [(text, f"{name}_{n}.bvh") for name, text in DANCES.items() for n in ("04", "05") if _there(name, n)]
    rows = [{"t": text, "m": file} for text, file in files]
    task = Task(
        "dance",
        "motion: [TEXT:t] -> [MOTION:m,anchor_frame=0,max_length=24,window]",
        files=REAL / "motion",
        micro_batch_size=2,
        metrics={"rows": lambda made, wanted: float(len(made) == len(wanted) and isinstance(made[0], Motion))},
        generation={"diffusion_steps": 5},
    )
    task.add_dataset(rows).add_dataset(rows, "valid")
    motion = MotionConfig(max_position=40, bucket_size=16, max_data_dim=264, max_noise_levels=101)
    model = small_model(motion)
    return model, task, train(model, task, 60, rate=1e-2)


def _there(name: str, number: str) -> bool:
    return (REAL / "motion" / f"{name}_{number}.bvh").is_file()


def test_training_lowers_the_diffusion_loss(dancer: tuple[GeneralistModel, Task, tuple[float, float]]) -> None:
    model, task, (before, after) = dancer
    assert after < 0.6 * before
    found = Trainer().evaluate(model=model, tasks=task, split="valid")["dance"]
    assert found == {"nll": after, "rows": 1.0}


def test_a_motion_from_text(dancer: tuple[GeneralistModel, Task, tuple[float, float]], tmp_path: Path) -> None:
    model = dancer[0]
    made = model.inference("dance", {"t": "martial arts"}, diffusion_steps=8).motion
    taken = Motion.read(REAL / "motion" / "martial_05.bvh")
    assert len(made) == 24 and made.skeleton == taken.skeleton and made.frame_time == taken.frame_time
    spans = [float((m.points()[:24].amax(1) - m.points()[:24].amin(1))[:, 1].mean()) for m in (made, taken)]
    assert spans[0] == pytest.approx(spans[1], rel=0.35)  # it stands about as high as a person
    output = model.inference("dance", {"t": "martial arts"}, diffusion_steps=3, frames=6)
    for name in ("m.bvh", "m.png", "m.gif"):
        output.save_motion(tmp_path / name)
    assert len(Motion.read(tmp_path / "m.bvh")) == 6
    assert Image.open(tmp_path / "m.gif").n_frames == 6 and Image.open(tmp_path / "m.png").width > 300
    with pytest.raises(DataError, match="path must end in .bvh, .gif"):
        output.save_motion(tmp_path / "m.txt")


def test_a_motion_follows_from_its_seed(dancer: tuple[GeneralistModel, Task, tuple[float, float]]) -> None:
    model, rows = dancer[0], [{"t": text} for text in DANCES.values()]
    settings: dict[str, Any] = {"diffusion_steps": 3, "frames": 5}
    together = model.inference("dance", rows, **settings)
    alone = model.inference("dance", rows, batch_size=1, **settings)
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one.motion.points(), other.motion.points(), atol=1e-2, rtol=1e-4)
    first = together[0].motion.points()
    for changed in ({"seed": 1}, {"guidance": 2.0}, {"sampler": "ddpm"}):
        points = model.inference("dance", rows[0], **settings, **changed).motion.points()
        assert float((points - first).abs().max()) > 1e-2
    several = model.inference("dance", rows[0], num_return_sequences=2, **settings)
    torch.testing.assert_close(several[0].motion.points(), first, atol=1e-2, rtol=1e-4)
    assert float((several[1].motion.points() - first).abs().max()) > 1e-2


def test_a_saved_model_moves_the_same(
    dancer: tuple[GeneralistModel, Task, tuple[float, float]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = dancer[0]
    model.save_pretrained(tmp_path / "dancer")
    again = GeneralistModel.from_pretrained(tmp_path / "dancer")
    assert again.preprocess == model.preprocess
    made = [m.inference("dance", {"t": "martial arts"}, diffusion_steps=3, frames=4).motion for m in (model, again)]
    assert torch.equal(made[0].frames, made[1].frames)
    command = ["generate", str(tmp_path / "dancer"), "dance", "--data", "t=martial arts", "--diffusion-steps", "3"]
    assert main([*command, "--frames", "4", "--save-motion", str(tmp_path / "shell.bvh")]) == 0
    assert capsys.readouterr().out == "motion of 4 frames\n"
    torch.testing.assert_close(Motion.read(tmp_path / "shell.bvh").frames, made[0].frames, atol=1e-4, rtol=0)
    assert main([*command, "--frames", "4", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)["values"]["m"]
    assert shown == {"kind": "motion", "size": "4 frames", "seconds": pytest.approx(0.4, rel=1e-3)}
    assert main([*command, "--save-image", str(tmp_path / "none.png")]) == 2


def test_a_motion_can_be_described() -> None:
    rows = [
        {"m": (REAL / "motion" / f).read_text(), "t": t} for f, t in (("indian_04.bvh", "a"), ("martial_05.bvh", "b"))
    ]
    task = Task("names", "[MOTION:m,max_length=12,sample_rate=2] what is it? -> [TEXT:t]", micro_batch_size=2)
    task.add_dataset(rows).add_dataset(rows, "valid")
    model = small_model(MotionConfig(max_position=16, bucket_size=8, max_data_dim=264, max_noise_levels=8))
    before, after = train(model, task, 15)
    assert after < 0.3 * before
    frames = Motion.parse(rows[0]["m"]).frames
    assert model.inference("names", {"m": rows[0]["m"]}).text == "a"
    assert model.inference("names", {"m": frames.numpy()}).text == "a"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("absent.bvh", "motion must be an existing file, got 'absent.bvh'"),
        (5, "must be a BVH file or an array of frames, got int"),
        (np.zeros((3, 7)), r"finite numbers \[frames, 132\], got \[3, 7\]"),
        (np.full((3, 132), np.nan), "finite numbers"),
        ("HIERARCHY\nROOT hip", "got its end"),
    ],
)
def test_bad_motions(value: Any, message: str, dancer: tuple[GeneralistModel, Task, tuple[float, float]]) -> None:
    encoder = dancer[0].example_encoder(dancer[1], "valid")
    with pytest.raises(DataError, match=message):
        encoder({"t": "x", "m": value})


def test_bad_settings_of_motions(dancer: tuple[GeneralistModel, Task, tuple[float, float]]) -> None:
    model = dancer[0]
    with pytest.raises(OfakernValueError, match="frames must be at most 40, got 41"):
        model.inference("dance", {"t": "x"}, frames=41)
    with pytest.raises(OfakernValueError, match=r"diffusion_steps must be in \[1, 100\], got 101"):
        model.inference("dance", {"t": "x"}, diffusion_steps=101)
    with pytest.raises(OfakernValueError, match="guidance must not be negative"):
        model.inference("dance", {"t": "x"}, guidance=-1.0)
    with pytest.raises(OfakernValueError, match="skeleton must be known"):
        MotionSettings().coder()


# ----------------------------------------------------------------------------------------------------------- images


def squares() -> list[dict[str, Any]]:
    colours: Mapping[str, tuple[int, int, int]] = {"red": (255, 0, 0), "green": (0, 200, 0), "blue": (0, 0, 255)}
    return [{"t": name, "img": Image.new("RGB", (20, 12), colour)} for name, colour in colours.items()]


@pytest.fixture(scope="module")
def painter() -> tuple[GeneralistModel, Task, tuple[float, float]]:
    torch.manual_seed(3)
    task = Task("paint", "paint [TEXT:t] -> [IMAGE:img]", micro_batch_size=3).add_dataset(squares())
    task.add_dataset(squares(), "valid")
    model = small_model(ImageCodesConfig(window=4, bucket_size=4), image_tokenizer=VQGAN(TOKENIZER))
    return model, task, train(model, task, 40, rate=1e-2)


def test_a_text_becomes_a_picture(painter: tuple[GeneralistModel, Task, tuple[float, float]], tmp_path: Path) -> None:
    model, _, (before, after) = painter
    assert after < 0.1 * before and model.image_tokenizer is not None
    for row in squares():
        made = model.inference("paint", {"t": row["t"]}, num_beams=1)
        example = model.example_encoder(painter[1], "valid")(row)
        assert made.tokens == example.labels.tolist() and len(made.tokens) == 17
        assert made.image is made.values["img"] and made.image.size == (8, 8) and made.text is None
    made.save_image(tmp_path / "made.png")
    model.save_pretrained(tmp_path / "painter")
    again = GeneralistModel.from_pretrained(tmp_path / "painter").inference("paint", {"t": "blue"}, num_beams=1)
    assert np.array_equal(np.asarray(again.image), np.asarray(made.image))


def test_pictures_are_drawn_unless_beams_are_asked_for(
    painter: tuple[GeneralistModel, Task, tuple[float, float]],
) -> None:
    model = painter[0]
    drawn = [model.inference("paint", {"t": "red"}, seed=seed, temperature=5.0).tokens for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    with pytest.raises(OfakernTypeError):
        model.inference("paint", {"t": "red"}, window=3)


def test_codes_may_be_given_instead_of_pixels(painter: tuple[GeneralistModel, Task, tuple[float, float]]) -> None:
    encoder = painter[0].example_encoder(painter[1], "valid")
    codes = [n % 16 for n in range(16)]
    first = encoder.tokenizer.vocabulary.range("code").start
    for value in (codes, np.array(codes), " ".join(map(str, codes))):
        example = encoder({"t": "red", "img": value})
        assert example.labels.tolist() == [first + code for code in codes] + [encoder.tokenizer.vocabulary.eos]
        assert example.target[0].value.tolist() == [0] + [first + code for code in codes]
    with pytest.raises(DataError, match=r"codes must be in \[0, 16\)"):
        encoder({"t": "red", "img": [3, 16]})


def test_a_tokenizer_must_fit_the_adaptor() -> None:
    task = Task("paint", "[TEXT:t] -> [IMAGE:img]").add_dataset(squares())
    with pytest.raises(OfakernValueError, match=r"must be the image tokenizer's \(4\), got 5"):
        small_model(ImageCodesConfig(window=5), image_tokenizer=VQGAN(TOKENIZER)).prepare([task])
    with pytest.raises(OfakernValueError, match="vocabulary must hold image codes"):
        model = small_model(ImageCodesConfig(window=4))
        model.prepare([task])
        model.example_encoder(task, "train")
