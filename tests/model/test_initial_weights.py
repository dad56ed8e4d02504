"""The deviation of a new model's weights."""

from __future__ import annotations

import pytest

from ofakern.modality.text.adaptor import TextAdaptorConfig
from ofakern.model import OFAConfig, OFAPlus


@pytest.mark.parametrize("std", [0.02, 0.1])
def test_matrices_and_embeddings_have_the_asked_deviation(std: float) -> None:
    config = OFAConfig(
        vocab_size=300,
        dim=64,
        ffn_dim=128,
        heads=2,
        encoder_layers=1,
        decoder_layers=1,
        adaptors=(TextAdaptorConfig(max_position=32, bucket_size=8),),
        init_std=std,
    )
    model = OFAPlus(config, seed=0)
    for name in ("encoder.layers.0.fc1.weight", "encoder.adaptor.embed_tokens.weight"):
        assert model.get_parameter(name).std().item() == pytest.approx(std, rel=0.05)
    assert model.get_parameter("encoder.adaptor.text.token_rel_pos_table_list.0.weight").abs().max() == 0
