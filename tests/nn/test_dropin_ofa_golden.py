"""OFA's drop-in layers against what the Hugging Face port itself computed (tests/golden/ofa_hf).

States, logits and gradients: the layers stand between the recorded embeddings and the recorded logits, on positions
from the port's own parameters.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from ofakern.nn import OFADecoderLayer, OFAEncoderLayer, OFAPositions, PositionBias

GOLDEN = Path(__file__).parents[1] / "golden" / "ofa_hf"
CONFIG = SimpleNamespace(**json.loads((GOLDEN / "config.json").read_text()))
PORT_KEYS = list(json.loads((GOLDEN / "state_dict_keys.json").read_text()))
PAD, HEADS = 1, 4
BUCKETS = {"token_bucket_size": CONFIG.token_bucket_size}


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return {name: value.float() for name, value in load_file(GOLDEN / "model.fp16.safetensors").items()}


def norm(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])


def projected(weights: dict[str, Tensor], name: str, x: Tensor, batch: int) -> Tensor:
    out = F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])
    return out.view(1, x.shape[0], HEADS, -1).expand(batch, -1, -1, -1)


def layers_of(weights: dict[str, Tensor], side: str, cls: type[nn.Module]) -> list[nn.Module]:
    made = []
    for index in range(2):
        prefix = f"{side}.layers.{index}."
        layer = cls(CONFIG).eval()
        state = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        keys = [name.removeprefix(prefix) for name in PORT_KEYS if name.startswith(prefix)]
        assert list(layer.state_dict()) == keys
        layer.load_state_dict(state)
        made.append(layer)
    return made


class Port:
    """The stacks of one case, on leaf parameters whose gradients can be compared."""

    def __init__(self, weights: dict[str, Tensor], case: dict[str, Tensor]) -> None:
        self.case = case
        self.leaves = {
            name: value.clone().requires_grad_()
            for name, value in weights.items()
            if any(part in name for part in ("pos_", "positions", "rel_pos", "coder.layer_norm"))
        }
        self.encoder = layers_of(weights, "encoder", OFAEncoderLayer)
        self.decoder = layers_of(weights, "decoder", OFADecoderLayer)
        self.embedding = weights["decoder.output_projection.weight"]
        self.batch, self.text = case["in.input_ids"].shape
        image = case.get("in.patch_images")
        self.grid = None if image is None else (image.shape[2] // 16, image.shape[3] // 16)

    def source_positions(self) -> Tensor:
        text = norm(self.leaves, "encoder.pos_ln", self.leaves["encoder.embed_positions.weight"][: self.text])
        if self.grid is None:
            return text
        rows, columns = torch.meshgrid(*(torch.arange(n) for n in self.grid), indexing="ij")
        ids = (rows * CONFIG.image_bucket_size + columns + 1).flatten()
        image = norm(self.leaves, "encoder.image_pos_ln", self.leaves["encoder.embed_image_positions.weight"][ids])
        return torch.cat([image, text])

    def padding(self) -> Tensor:
        text = self.case["in.input_ids"] == PAD
        if self.grid is None:
            return text
        patches = ~self.case["in.patch_masks"][:, None].expand(-1, self.grid[0] * self.grid[1])
        return torch.cat([patches, text], dim=1)

    def encode(self) -> list[Tensor]:
        positions = OFAPositions.encoder(self.text, self.grid, image_bucket_size=CONFIG.image_bucket_size, **BUCKETS)
        places = self.source_positions()
        q_pos, k_pos = (projected(self.leaves, f"encoder.pos_{x}_linear", places, self.batch) for x in "qk")
        states = [self.case["encoder_hidden_states.0"]]
        for index, layer in enumerate(self.encoder):
            token = self.leaves[f"encoder.token_rel_pos_table_list.{index}.weight"]
            image = self.leaves[f"encoder.image_rel_pos_table_list.{index}.weight"]
            table = positions.table(token) if self.grid is None else positions.table(token, image)
            bias = PositionBias(q_pos, k_pos, (table,), positions.given)
            states.append(layer(states[-1], ~self.padding()[:, None, None], attn_bias=bias)[0])
        return [*states, norm(self.leaves, "encoder.layer_norm", states[-1])]

    def decode(self, memory: Tensor) -> list[Tensor]:
        length = self.case["in.decoder_input_ids"].shape[1]
        positions = OFAPositions.decoder(length, **BUCKETS)
        places = norm(self.leaves, "decoder.pos_ln", self.leaves["decoder.embed_positions.weight"][:length])
        own = [projected(self.leaves, f"decoder.self_pos_{x}_linear", places, self.batch) for x in "qk"]
        cross = PositionBias(
            projected(self.leaves, "decoder.cross_pos_q_linear", places, self.batch),
            projected(self.leaves, "decoder.cross_pos_k_linear", self.source_positions(), self.batch),
        )
        causal = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
        states = [self.case["decoder_hidden_states.0"]]
        for index, layer in enumerate(self.decoder):
            table = positions.table(self.leaves[f"decoder.token_rel_pos_table_list.{index}.weight"])
            states.append(
                layer(
                    states[-1],
                    causal,
                    memory,
                    ~self.padding()[:, None, None],
                    self_attn_bias=PositionBias(*own, (table,), positions.given),
                    cross_attn_bias=cross,
                )[0]
            )
        logits = norm(self.leaves, "decoder.layer_norm", states[-1]) @ self.embedding.t()
        return [*states, logits]

    def gradients(self) -> dict[str, Tensor]:
        found: dict[str, Any] = {name: leaf.grad for name, leaf in self.leaves.items()}
        for side, layers in (("encoder", self.encoder), ("decoder", self.decoder)):
            for index, layer in enumerate(layers):
                found |= {f"{side}.layers.{index}.{name}": p.grad for name, p in layer.named_parameters()}
        return {name: grad for name, grad in found.items() if grad is not None}


def smoothed_loss(logits: Tensor, target: Tensor) -> Tensor:
    """OFA's label-smoothed loss (0.1), over the number of tokens."""
    log_probabilities = logits.log_softmax(-1)[target != PAD]
    labels = target[target != PAD]
    each = 0.1 / (logits.shape[-1] - 1)
    nll = -log_probabilities.gather(1, labels[:, None]).sum()
    return ((1 - 0.1 - each) * nll - each * log_probabilities.sum()) / labels.numel()


@pytest.mark.parametrize("name", ["text_b1", "text_b3_pad", "imgtext_b2_pad_96x128", "imgtext_b2_mask01.canonical"])
def test_states_logits_and_gradients_are_the_ports(name: str, weights: dict[str, Tensor]) -> None:
    case = load_file(GOLDEN / f"case_{name}.safetensors")
    port = Port(weights, case)
    encoded = port.encode()
    decoded = port.decode(encoded[-1])
    real = ~port.padding()
    for index, state in enumerate(encoded[1:-1], start=1):
        if f"encoder_hidden_states.{index}" in case:
            want = case[f"encoder_hidden_states.{index}"]
            torch.testing.assert_close(state[real], want[real], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(encoded[-1][real], case["encoder_last_hidden_state"][real], rtol=1e-5, atol=1e-5)
    shown = case["in.decoder_input_ids"] != PAD
    torch.testing.assert_close(decoded[-1][shown], case["logits"][shown], rtol=1e-5, atol=3e-5)
    smoothed_loss(decoded[-1], case["in.target"]).backward()
    found = port.gradients()
    compared = [key for key in found if f"grad.{key}" in case]
    for key in compared:
        want = case[f"grad.{key}"]
        tolerance = 2e-5 * float(want.abs().max()) + 2e-6
        torch.testing.assert_close(found[key], want, rtol=0, atol=tolerance, msg=lambda m, n=key: f"{n}: {m}")
    assert len(compared) >= 15 or not any(key.startswith("grad.") for key in case)
