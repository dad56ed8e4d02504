"""The decode state: rows that change places, samples that join, packed weights, threads, int8."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ofakern.data.batch import Example, PackedBatch, Segment
from ofakern.errors import BackendError, OfakernRuntimeError, OfakernTypeError, OfakernValueError
from ofakern.modality.image.codes import ImageCodesConfig
from ofakern.modality.text.adaptor import TextAdaptorConfig
from ofakern.model import OFAConfig, OFAPlus
from ofakern.model.stacks import Memory

CONFIG = OFAConfig(
    vocab_size=80,
    dim=64,
    ffn_dim=96,
    heads=2,
    encoder_layers=1,
    decoder_layers=2,
    adaptors=(TextAdaptorConfig(max_position=64, bucket_size=8), ImageCodesConfig(window=4, bucket_size=6)),
)
VARIANTS: list[dict[str, Any]] = [
    {},
    {"modal_ffn": True, "adapter_dim": 8, "scale_resids": True},
    {"normalize_before": False, "activation": "relu", "share_attn_bias": True},
    {"entangle_position_embedding": True, "use_self_attn_bias": False},
    {"decoder_prefix": 3, "prefix_dim": 16, "target_slots": 2},
]
BOUND = {torch.float32: 4e-5, torch.bfloat16: 0.05, torch.float16: 6e-3}


def build(dtype: torch.dtype = torch.float32, **flags: Any) -> OFAPlus:
    """Every parameter random, so that nothing hides behind zero tables and unit scales."""
    model = OFAPlus(replace(CONFIG, **flags), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval().to(dtype)


def memory_of(model: OFAPlus, lengths: Sequence[int]) -> Memory:
    """Of sources that differ by length, the same source whatever stands beside it."""
    target = [Segment(9, "text", 1, torch.tensor([0]))]
    examples = []
    for n in lengths:
        tokens = torch.randint(4, 80, (n,), generator=torch.Generator().manual_seed(n))
        examples.append(Example([Segment(0, "text", 1, tokens)], target, torch.tensor([2])))
    with torch.no_grad():
        return model.encode(PackedBatch.collate(examples).source)


def written(model: OFAPlus, lengths: Sequence[int], tokens: Sequence[Sequence[int]], **segment: Any) -> list[Tensor]:
    """Logits of every row's tokens, one row per source, by the decoder's one pass over all of them."""
    slot, adaptor, modality = segment.get("target_slot", 0), segment.get("adaptor", "text"), segment.get("modality", 1)
    found = []
    for n, row in zip(lengths, tokens, strict=True):
        target = Segment(9, adaptor, modality, torch.tensor(row))
        example = Example([], [target], torch.zeros(len(row)).long(), target_slot=torch.full((len(row),), slot).int())
        with torch.no_grad():
            side = PackedBatch.collate([example]).target
            found.append(model.logits(model.decode(side, memory_of(model, [n]))))
    return found


def close(have: Tensor, want: Tensor, dtype: torch.dtype = torch.float32) -> None:
    assert have.dtype == dtype
    error = (have.float() - want.float()).norm() / want.float().norm()
    assert float(error) <= BOUND[dtype], float(error)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize("flags", VARIANTS, ids=lambda f: "-".join(f) or "default")
def test_reordered_rows_are_those_written_from_scratch(flags: dict[str, Any], dtype: torch.dtype) -> None:
    """Random reorderings: beams multiply, change places, leave; past the first cache and blocks of positions."""
    model, lengths = build(dtype, **flags), [5, 9, 3]
    state = model.begin_decode(memory_of(model, lengths), 1, 40)
    generator = torch.Generator().manual_seed(3)
    histories: list[list[int]] = [[], [], []]
    sample = torch.arange(3)
    for step in range(36):
        tokens = torch.randint(4, 80, (len(histories),), generator=generator)
        logits = model.decode_step(state, tokens)
        histories = [[*row, int(token)] for row, token in zip(histories, tokens, strict=True)]
        if step % 5 == 4:
            want = written(model, [lengths[int(s)] for s in sample], histories)
            close(logits, torch.stack([rows[-1] for rows in want]), dtype)
        keep = sample.unique()[1:] if step == 20 else sample.unique()
        index = []
        for one in keep:
            own = (sample == one).nonzero()[:, 0]
            index.append(own[torch.randint(len(own), (int(torch.randint(1, 5, (), generator=generator)),))])
        order = torch.cat(index)
        state.reorder(order)
        histories, sample = [histories[int(r)] for r in order], sample[order]
        assert state.rows == len(order) and state.rows_of_sample == [int((sample == s).sum()) for s in keep]
        assert state.positions.tolist() == [step + 1] * len(order)


def run(model: OFAPlus, state: Any, tokens: Sequence[Sequence[int]]) -> list[Tensor]:
    return [model.decode_step(state, torch.tensor([row[t] for row in tokens])) for t in range(len(tokens[0]))]


@pytest.mark.parametrize("flags", [{}, {"modal_ffn": True, "target_slots": 2}], ids=["default", "mixed"])
def test_joined_states_give_what_each_gives_alone(flags: dict[str, Any]) -> None:
    """Requests of other lengths, positions, segments and rows join; one sample leaves; all go on as if alone."""
    model = build(**flags)
    kinds = [{}, {"adaptor": "image_vqgan", "modality": 2}, {"target_slot": 1 if flags else 0}]
    sources, rows = [[6, 4], [11], [8]], [2, 3, 1]
    generator = torch.Generator().manual_seed(5)
    counts = [rows[n] * len(source) for n, source in enumerate(sources)]
    tokens = [torch.randint(4, 80, (count, 12), generator=generator).tolist() for count in counts]
    alone = []
    for n, source in enumerate(sources):
        state = model.begin_decode(memory_of(model, source), rows[n], 14 + n, **kinds[n])
        alone.append(run(model, state, tokens[n]))
    states = [model.begin_decode(memory_of(model, s), rows[n], 14 + n, **kinds[n]) for n, s in enumerate(sources)]
    first, second, third = states
    run(model, first, [row[:4] for row in tokens[0]])
    run(model, second, [row[:1] for row in tokens[1]])
    first.join(second)
    assert first.positions.tolist() == [4] * 4 + [1] * 3 and first.rows_of_sample == [2, 2, 3]
    got = model.decode_step(first, torch.tensor([row[4] for row in tokens[0]] + [row[1] for row in tokens[1]]))
    close(got, torch.cat([alone[0][4], alone[1][1]]))
    first.reorder(torch.tensor([1, 0, 4, 5, 6]))  # the second source of the first state leaves
    first.join(third)
    assert first.rows_of_sample == [2, 3, 1]
    places = [[1, 0], [0, 1, 2], [0]]
    for t in range(5):
        at = (5 + t, 2 + t, t)
        fed = [tokens[n][r][at[n]] for n in range(3) for r in places[n]]
        got = model.decode_step(first, torch.tensor(fed))
        close(got, torch.cat([alone[n][at[n]][places[n]] for n in range(3)]))


def test_rewound_rows_go_on_from_where_they_were() -> None:
    model = build()
    state = model.begin_decode(memory_of(model, [5, 8]), 1, 40)
    run(model, state, [[*range(4, 24)], [*range(30, 50)]])
    state.rewind(3)
    assert state.positions.tolist() == [3, 3]
    want = written(model, [5, 8], [[4, 5, 6, 70, 71], [30, 31, 32, 72, 73]])
    close(torch.stack(run(model, state, [[70, 71], [72, 73]])), torch.stack([rows[-2:] for rows in want], 1))
    with pytest.raises(OfakernValueError, match="length must be at least 0"):
        state.rewind(-1)


def test_a_state_that_was_left_by_all_takes_new_samples() -> None:
    model = build()
    state = model.begin_decode(memory_of(model, [4]), 2, 20)
    run(model, state, [[5, 6], [7, 8]])
    state.reorder(torch.empty(0, dtype=torch.int64))
    assert state.rows == 0 and state.rows_of_sample == []
    assert model.decode_step(state, torch.empty(0, dtype=torch.int64)).shape == (0, 80)
    state.join(model.begin_decode(memory_of(model, [7]), 1, 20))
    close(run(model, state, [[5, 9, 3]])[-1], written(model, [7], [[5, 9, 3]])[0][-1:])


def test_many_joins_and_leavings_reuse_the_slots() -> None:
    model = build()
    state = model.begin_decode(memory_of(model, [4]), 2, 60)
    for turn in range(12):
        run(model, state, [[4 + turn] * 3] * state.rows)
        state.reorder(torch.arange(state.rows)[-2:])
        state.join(model.begin_decode(memory_of(model, [4 + turn]), 2, 60))
    state.reorder(torch.arange(state.rows)[-2:])
    assert state._past.caches[0].slots <= 4 * 2 * 16
    close(run(model, state, [[5, 9]] * 2)[-1], written(model, [15], [[5, 9]])[0][-1:].expand(2, -1))


def test_what_cannot_join_or_reorder() -> None:
    model, other = build(), build()
    state = model.begin_decode(memory_of(model, [3]), 1, 8)
    with pytest.raises(OfakernTypeError, match="other must be a DecodeState"):
        state.join(3)  # type: ignore[arg-type]
    for wrong in (state, other.begin_decode(memory_of(other, [3]), 1, 8)):
        with pytest.raises(OfakernValueError, match="same weights"):
            state.join(wrong)
    with pytest.raises(OfakernValueError, match="index must be in"):
        state.reorder(torch.tensor([1]))
    with pytest.raises(OfakernValueError, match="adaptor must be one of"):
        model.begin_decode(memory_of(model, [3]), 1, 8, adaptor="image_resnet")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_threads_do_not_change_a_bit(dtype: torch.dtype) -> None:
    model, tokens = build(dtype), torch.randint(4, 80, (6, 20)).tolist()
    memory, found = memory_of(model, [60, 7]), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(torch.stack(run(model, model.begin_decode(memory, 3, 30), tokens)))
    torch.set_num_threads(1)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_rows_beyond_the_packed_products_agree_with_them() -> None:
    model, memory = build(), memory_of(build(), [6])
    many = run(model, model.begin_decode(memory, 100, 4), [[5, 6]] * 100)[-1]
    close(many, run(model, model.begin_decode(memory, 1, 4), [[5, 6]])[-1].expand(100, -1))


@pytest.mark.parametrize("kind", [None, "int8"])
def test_logits_of_a_range_are_those_of_all(kind: str | None) -> None:
    model = build().quantize(kind)
    state = model.begin_decode(memory_of(model, [6]), 2, 4)
    hidden = model.decode_hidden(state, torch.tensor([5, 6]))
    whole = model.step_logits(state, hidden)
    for lo in range(0, 70, 7):  # more of them than are kept
        torch.testing.assert_close(model.step_logits(state, hidden, (lo, lo + 9)), whole[:, lo : lo + 9])
    for wrong in ((3, 3), (-1, 4), (70, 81)):
        with pytest.raises(OfakernValueError, match="ids must be a range"):
            model.step_logits(state, hidden, wrong)


def test_changed_parameters_are_packed_again() -> None:
    model = build()

    def logits() -> Tensor:
        return run(model, model.begin_decode(memory_of(model, [6]), 1, 4), [[5, 6]])[-1]

    first, weights = logits(), model.begin_decode(memory_of(model, [6]), 1, 4).weights
    assert model.begin_decode(memory_of(model, [6]), 1, 4).weights is weights, (
        "an unchanged model keeps its packed weights"
    )
    fused = torch.optim.AdamW(model.decoder.parameters(), lr=1e-2, fused=True)  # leaves torch's versions alone
    for parameter in model.decoder.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    fused.step()
    changed = logits()
    assert (changed - first).norm() > 1e-2 * first.norm()
    close(changed, written(model, [6], [[5, 6]])[0][-1:])
    with torch.no_grad():
        model.decoder.get_submodule("layers.0.fc1").weight.add_(0.05)
    close(logits(), written(model, [6], [[5, 6]])[0][-1:])
    model.train()
    in_training = model.begin_decode(memory_of(model, [6]), 1, 4).weights
    assert in_training is not model.begin_decode(memory_of(model, [6]), 1, 4).weights, "nothing is kept in training"


def test_copies_and_pickles_of_a_model_carry_no_packed_weights() -> None:
    model, memory = build(), memory_of(build(), [6])
    want, size = run(model, model.begin_decode(memory, 1, 4), [[5, 6]])[-1], len(pickle.dumps(build()))
    assert abs(len(pickle.dumps(model)) - size) < 200
    twin = copy.deepcopy(model)
    assert twin._decode_weights._weights is None
    assert torch.equal(run(twin, twin.begin_decode(memory, 1, 4), [[5, 6]])[-1], want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@torch.no_grad()
def test_int8_weights_keep_their_bound(dtype: torch.dtype) -> None:
    """Each projection within half a step per weight; the logits near; the model's own numbers come back."""
    model = build(dtype).quantize("int8")
    state = model.begin_decode(memory_of(model, [6, 9]), 2, 30)
    rounding = torch.finfo(dtype).eps
    for part in (*vars(state.weights.layers[0]).values(), state.weights.output):
        for projection in part[None] if isinstance(part, dict) else (part,):
            layers = projection._layers
            x = torch.randn(3, layers[0][0].shape[1]).to(dtype)
            for (weight, bias), got in zip(layers, projection.parts(x), strict=True):
                exact = x.double() @ weight.double().T + (0.0 if bias is None else bias.double())
                largest = weight.double().abs().amax(1)
                bound = x.double().abs().sum(1, keepdim=True) * largest / 254 + rounding * exact.abs() + 1e-5
                assert bool(((got.double() - exact).abs() <= bound).all())
                assert float((got.double() - exact).abs().max()) > 0, "it must have been rounded"
    tokens = torch.randint(4, 80, (4, 8), generator=torch.Generator().manual_seed(1)).tolist()
    rounded = torch.stack(run(model, state, tokens)).float()
    own = model.quantize(None)
    exact = torch.stack(run(own, own.begin_decode(memory_of(own, [6, 9]), 2, 30), tokens)).float()
    error = float((rounded - exact).norm() / exact.norm())
    assert 1e-4 < error < 0.03, error


def test_int8_is_for_decoding_only(monkeypatch: pytest.MonkeyPatch) -> None:
    model, memory = build(), memory_of(build(), [6])
    with pytest.raises(OfakernValueError, match="kind must be one of"):
        model.quantize("int4")
    with pytest.raises(OfakernRuntimeError, match="training mode"):
        model.train().quantize("int8")
    model.eval().quantize("int8").train()
    with pytest.raises(OfakernRuntimeError, match=r"model.eval\(\)"):
        model.begin_decode(memory, 1, 4)
    model.eval()
    many = run(model, model.begin_decode(memory, 100, 4), [[5]] * 100)[-1]
    assert torch.equal(many[:1], run(model, model.begin_decode(memory, 1, 4), [[5]])[-1])
    assert copy.deepcopy(model)._decode_weights.kind == "int8"
    with pytest.raises(BackendError, match="no kernel takes"):
        build().double().quantize("int8")
