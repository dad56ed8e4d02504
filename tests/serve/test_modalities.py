"""Sounds, videos, motions and pictures in and out of the server at once: what cannot share steps waits its turn."""

from __future__ import annotations

import base64
import io
import json
import wave
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from starlette.testclient import TestClient

from ofakern import GeneralistModel
from ofakern.data.example import PreprocessConfig
from ofakern.modality.audio.adaptor import AudioFbankConfig, AudioTargetConfig
from ofakern.modality.image.adaptor import ImageResnetConfig
from ofakern.modality.image.codes import ImageCodesConfig
from ofakern.modality.image.vqgan import VQGAN, VQGANConfig
from ofakern.modality.motion.adaptor import MotionConfig
from ofakern.modality.motion.preprocess import MotionSettings
from ofakern.modality.motion.skeleton import Motion
from ofakern.modality.text.adaptor import TextAdaptorConfig
from ofakern.modality.video.adaptor import VideoConfig
from ofakern.serve import Engine
from ofakern.serve.app import create_app
from ofakern.text import Tokenizer

BVH = next(iter(sorted((Path(__file__).parents[1] / "golden/real/motion").glob("*.bvh"))))
HEAR = "[AUDIO:wav] what is it? -> [TEXT:text]"
SAY = "[TEXT:t] -> [AUDIO:wav]"
WATCH = "[VIDEO:v] what happens? -> [TEXT:cap]"
DANCE = "[TEXT:t] -> [MOTION:m]"
MOVE = "[MOTION:m] what is done? -> [TEXT:cap]"
PAINT = "[TEXT:t] -> [IMAGE:img]"
SHORT = {"max_new_tokens": 4, "num_beams": 1}


@pytest.fixture(scope="module")
def everything() -> GeneralistModel:
    """A model of every modality; it knows nothing, so it says something."""
    torch.manual_seed(0)
    codes = VQGANConfig(
        codes=16, embed_dim=8, resolution=8, channels=32, multipliers=(1, 2), blocks=1, attention=(), latent=8
    )
    adaptors = (
        TextAdaptorConfig(max_position=64, bucket_size=16),
        ImageResnetConfig(resnet_type="resnet50", resnet_blocks=(1, 1, 1), resnet_width=8, bucket_size=4),
        AudioFbankConfig(max_position=64, prenet_dim=16, postnet_conv_dim=8),
        AudioTargetConfig(max_position=64, prenet_dim=16, postnet_conv_dim=8),
        VideoConfig(bucket_size=8),
        MotionConfig(max_position=40, bucket_size=16, max_data_dim=264, max_noise_levels=101),
        ImageCodesConfig(window=4, bucket_size=4),
    )
    motion = MotionSettings.of(Motion.read(BVH))
    preprocess = PreprocessConfig(video_size=32, video_frames=4, max_target_length=64, motion=motion)
    tokenizer = Tokenizer.train([HEAR, WATCH, "one two three"], 300, codes=16, bins=0)
    return GeneralistModel(
        adaptors=adaptors,
        tokenizer=tokenizer,
        preprocess=preprocess,
        image_tokenizer=VQGAN(codes),
        **{"dim": 32, "ffn_dim": 64, "heads": 4, "encoder_layers": 1, "decoder_layers": 1, "dropout": 0.0},
        init_std=0.2,
    )


@pytest.fixture(scope="module")
def client(everything: GeneralistModel) -> Iterator[TestClient]:
    with TestClient(create_app(Engine(everything)), raise_server_exceptions=False) as client:
        yield client


def sound() -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(2)
        writer.setframerate(16000)
        writer.writeframes((np.sin(np.arange(3200) / 8) * 9000).astype("<i2").tobytes())
    return file.getvalue()


def film() -> bytes:
    file = io.BytesIO()
    frames = [Image.new("RGB", (24, 16), colour) for colour in ("red", "green", "blue", "white")]
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    return file.getvalue()


def ask(client: TestClient, instruction: str, data: dict[str, Any], **settings: Any) -> dict[str, Any]:
    shown = {name: base64.b64encode(one).decode() if isinstance(one, bytes) else one for name, one in data.items()}
    body = {"instruction": instruction, "data": shown, "generation": settings}
    response = client.post("/v1/infer", json=body)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()["outputs"][0]
    return found


def test_sounds_videos_and_motions_are_understood(client: TestClient, everything: GeneralistModel) -> None:
    for instruction, data in ((HEAR, {"wav": sound()}), (WATCH, {"v": film()}), (MOVE, {"m": BVH.read_text()})):
        want = everything.inference(instruction, data, **SHORT)
        assert ask(client, instruction, data, **SHORT)["text"] == want.text
    upload = client.post("/v1/infer", files={"wav": ("a.wav", sound())}, data={"instruction": HEAR})
    assert upload.status_code == 200, upload.text


def test_speech_is_made(client: TestClient, everything: GeneralistModel) -> None:
    spoken = ask(client, SAY, {"t": "one"}, max_new_tokens=6)["values"]["wav"]
    want = everything.inference(SAY, {"t": "one"}, max_new_tokens=6).speech
    assert spoken["kind"] == "speech" and spoken["frames"] == len(want.features)
    with wave.open(io.BytesIO(base64.b64decode(spoken["wav"]))) as reader:
        assert reader.getframerate() == want.rate and reader.getnframes() == len(want.waveform())


def test_a_motion_is_made(client: TestClient, everything: GeneralistModel) -> None:
    settings = {"frames": 8, "diffusion_steps": 2}
    made = ask(client, DANCE, {"t": "two"}, **settings)["values"]["m"]
    want = everything.inference(DANCE, {"t": "two"}, **settings).motion
    assert made["kind"] == "motion" and made["frames"] == 8 and made["bvh"] == want.to_text()


def test_a_picture_is_made(client: TestClient, everything: GeneralistModel) -> None:
    made = ask(client, PAINT, {"t": "three"}, seed=5)["values"]["img"]
    want = everything.inference(PAINT, {"t": "three"}, seed=5).image
    picture = Image.open(io.BytesIO(base64.b64decode(made["png"])))
    assert picture.size == (8, 8) and np.array_equal(np.asarray(picture), np.asarray(want))


def test_all_of_it_at_once(client: TestClient, everything: GeneralistModel) -> None:
    asked: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        (HEAR, {"wav": sound()}, SHORT),
        (SAY, {"t": "one"}, {"max_new_tokens": 3}),
        (PAINT, {"t": "two"}, {"seed": 1}),
        (WATCH, {"v": film()}, SHORT),
        (DANCE, {"t": "one"}, {"frames": 4, "diffusion_steps": 2}),
    ]
    with ThreadPoolExecutor(10) as clients:
        found = list(clients.map(lambda one: ask(client, one[0], one[1], **one[2]), asked * 2))
    for (instruction, data, settings), first, second in zip(asked, found[:5], found[5:], strict=True):
        assert first["values"].keys() == second["values"].keys()
        want = everything.inference(instruction, data, **settings)
        assert first["text"] == second["text"] == want.text and first["tokens"] == len(want.tokens)


def test_what_is_not_written_in_tokens_streams_its_answer_only(client: TestClient) -> None:
    body = {"instruction": SAY, "data": {"t": "one"}, "generation": {"max_new_tokens": 3}, "stream": True}
    lines = client.post("/v1/infer", json=body, headers={"Accept": "application/x-ndjson"}).text.splitlines()
    assert [json.loads(line)["event"] for line in lines] == ["done"]
