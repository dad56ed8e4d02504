"""`ofakern.patch` itself, on a model of a few lines: what it reports, refuses and restores."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import ofakern
from ofakern.errors import OfakernRuntimeError, OfakernTypeError, OfakernValueError


class T5Attention(nn.Module):
    """The attributes of transformers' class, and no more."""

    def __init__(self, width: int = 8, bias: bool = True) -> None:
        super().__init__()
        self.config = SimpleNamespace(_attn_implementation="eager")
        self.is_decoder, self.is_causal, self.layer_idx, self.scaling, self.dropout = False, False, 0, 1.0, 0.0
        self.has_relative_attention_bias = bias
        self.relative_attention_num_buckets, self.relative_attention_max_distance = 8, 12
        self.n_heads, self.key_value_proj_dim, self.inner_dim, self.d_model = 2, width, 2 * width, 16
        self.q, self.k, self.v = (nn.Linear(16, 2 * width, bias=False) for _ in range(3))
        self.o = nn.Linear(2 * width, 16, bias=False)
        if bias:
            self.relative_attention_bias = nn.Embedding(8, 2)

    def forward(self, hidden_states, position_bias=None):
        raise AssertionError("the drop-in layer runs instead")


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attention = nn.MultiheadAttention(16, 2)
        self.first = T5Attention()
        self.second = self.first
        self.linear = nn.Linear(16, 16)


class FancyAttention(nn.Module):
    pass


def test_every_place_of_a_module_is_replaced_by_one_layer_and_restored() -> None:
    model = Odd()
    original, modules = model.first, dict(model.named_modules(remove_duplicate=False))
    report = ofakern.patch(model)
    assert [row.path for row in report.replaced if row.before == "T5Attention"] == ["first", "second"]
    assert model.first is model.second and model.first is not original
    assert model.first.q is original.q and model.first.q.weight is original.q.weight
    out = model.first(torch.randn(1, 5, 16))[0]
    assert out.shape == (1, 5, 16)
    model.eval()
    report.undo()
    report.undo()
    assert dict(model.named_modules(remove_duplicate=False)) == modules and model.first is original
    assert not original.training, "the mode set while patched stays"


def test_the_report_is_a_table() -> None:
    model = nn.Sequential(nn.Sequential(T5Attention()), nn.ModuleDict({"fancy": FancyAttention()}))
    report = ofakern.patch(model)
    lines = str(report).splitlines()
    assert lines[0] == "patch Sequential: 1 replaced, 1 left alone"
    assert lines[1].split() == ["0.0", "T5Attention", "->", "ofakern", "T5Attention"]
    assert lines[2].split(maxsplit=1) == ["1.fancy", "FancyAttention left alone: no drop-in layer for this class"]


def test_options_without_a_kernel_are_left_alone_with_the_reason() -> None:
    model = nn.ModuleDict({"narrow": T5Attention(width=12)})
    before = model["narrow"]
    report = ofakern.patch(model)
    assert not report.replaced and model["narrow"] is before
    assert "multiple of 8" in report.left_alone[0].reason and "12" in report.left_alone[0].reason


def test_a_model_with_nothing_to_replace_is_untouched() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    modules = list(model.modules())
    report = ofakern.patch(model)
    assert report.replaced == () and report.left_alone == () and "untouched" in str(report)
    assert list(model.modules()) == modules
    report.undo()


def test_a_second_patch_is_refused_until_undo() -> None:
    model = Odd()
    report = ofakern.patch(model)
    for part in (model, copy.deepcopy(model), nn.Sequential(model)):
        with pytest.raises(OfakernValueError, match=r"must not be patched already.*\nTry: report\.undo"):
            ofakern.patch(part)
    report.undo()
    with ofakern.patch(model) as second:
        assert second.replaced == report.replaced


def test_undo_refuses_when_somebody_else_took_the_place() -> None:
    model = Odd()
    report = ofakern.patch(model)
    ours, model.second = model.first, nn.Linear(2, 2)
    with pytest.raises(OfakernRuntimeError, match="'second' of Odd is Linear now"):
        report.undo()
    assert model.first is ours
    model.second = ours
    report.undo()


def test_leaving_the_context_undoes_even_after_an_error() -> None:
    model = Odd()
    original = model.first
    with pytest.raises(ZeroDivisionError), ofakern.patch(model):
        raise ZeroDivisionError
    assert model.first is original


def test_hooks_go_with_the_layer() -> None:
    model = Odd()
    seen = []
    handle = model.first.register_forward_hook(lambda module, args, out: seen.append(type(module).__module__))
    with ofakern.patch(model):
        model.first(torch.randn(1, 3, 16))
        handle.remove()
        model.first(torch.randn(1, 3, 16))
    assert len(seen) == 1 and seen[0].startswith("ofakern.nn")


def test_torchs_attention_is_replaced_where_its_caller_never_asks_for_weights() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)
    model = nn.ModuleDict({"layers": nn.TransformerEncoder(layer, 2), "own": nn.MultiheadAttention(16, 2)})
    x, padding = torch.randn(2, 5, 16), torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 3:] = True
    want = model["layers"](x, src_key_padding_mask=padding)
    with ofakern.patch(model) as report:
        have = model["layers"](x, src_key_padding_mask=padding)
    torch.testing.assert_close(have[~padding], want[~padding])
    assert [row.path for row in report.replaced] == [f"layers.layers.{n}.self_attn" for n in range(2)]
    (stayed,) = report.left_alone
    assert stayed.path == "own" and "may ask for attention weights" in stayed.reason


def test_only_modules_are_taken() -> None:
    with pytest.raises(OfakernTypeError, match="patch: model must be a torch.nn.Module, got dict"):
        ofakern.patch({})


def test_the_name_is_a_function_whatever_was_imported_first() -> None:
    import ofakern.patching  # noqa: F401

    assert callable(ofakern.patch) and ofakern.patch is ofakern.patching.patch
