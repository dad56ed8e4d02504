"""The oracle itself: against loops over pairs, its gradients against finite differences, its bits against Philox."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from harness import Case, make_case, oracle
from torch import Tensor

from ofakern.ops.attention.reference import attention_reference, dropout_keep, philox4x32

CASES: dict[str, dict[str, Any]] = {
    "full": {"q_lengths": (3, 5)},
    "causal_two_terms_pos": {"q_lengths": (4, 6), "mask": "causal", "terms": 2, "pos_width": 3},
    "cross_grouped": {"q_lengths": (2, 4), "k_lengths": (5, 3), "heads": 4, "key_heads": 2, "value_width": 7},
    "random_empty_rows": {"q_lengths": (6, 0, 5), "mask": "random", "empty_rows": True, "heads": 3, "key_heads": 1},
    "dropout": {"q_lengths": (5, 6), "mask": "prefix", "dropout_p": 0.4},
    "bare": {"q_lengths": (4,), "terms": 0, "head_scale": False, "lse_gradient": False},
}


def by_loops(case: Case) -> tuple[Tensor, Tensor]:
    """One score at a time, straight from the contract."""
    q, k, v, layout = case.q, case.k, case.v, case.layout
    queries, heads, width = q.shape
    out = torch.zeros(queries, heads, v.shape[2], dtype=q.dtype)
    lse = torch.full((queries, heads), -math.inf, dtype=q.dtype)
    p = case.options.get("dropout_p", 0.0)
    sample = [s for s in range(layout.samples) for _ in range(int(layout.q_offsets[s + 1] - layout.q_offsets[s]))]
    for i in range(queries):
        lo, hi = layout.visible[i].tolist()
        for h in range(heads):
            g = h // (heads // k.shape[1])
            scores = {}
            for j in range(lo, hi):
                score = q[i, h] @ k[j, g]
                if case.q_pos is not None and case.k_pos is not None:
                    score = score + case.q_pos[i, h] @ case.k_pos[j, g]
                score = score / math.sqrt(width)
                for table, term in zip(case.tables, layout.terms, strict=True):
                    if term.same[i, 0] <= j < term.same[i, 1]:
                        score = score + table[h, int(term.q_coord[i]) - int(term.k_coord[j])]
                scores[j] = score
            if not scores:
                continue
            total = sum(score.exp() for score in scores.values())
            lse[i, h] = total.log()
            for j, score in scores.items():
                keep = 1.0 if p == 0 else _keep_one(case, sample[i], h, i, j) / (1 - p)
                out[i, h] += keep * score.exp() / total * v[j, g]
            if case.head_scale is not None:
                out[i, h] *= case.head_scale[h]
    return out, lse


def _keep_one(case: Case, s: int, h: int, i: int, j: int) -> float:
    """README's dropout rule in Python integers."""
    seed, offset = (int(x) % 2**64 for x in case.options["dropout_seed"])
    key64 = (seed + offset * 0x9E3779B97F4A7C15) % 2**64
    key = [key64 % 2**32, key64 >> 32]
    j_local = (j - int(case.layout.k_offsets[s])) % 2**32
    c = [j_local >> 2, i - int(case.layout.q_offsets[s]), h, s]
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ key[0], b % 2**32, (a >> 32) ^ c[3] ^ key[1], a % 2**32]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    return float(c[j_local & 3] >= math.floor(case.options["dropout_p"] * 2**32 + 0.5))


def call(case: Case) -> tuple[Tensor, Tensor]:
    layout = case.layout
    return attention_reference(
        case.q,
        case.k,
        case.v,
        layout.visible,
        layout.q_offsets,
        layout.k_offsets,
        q_pos=case.q_pos,
        k_pos=case.k_pos,
        terms=[(table, t.q_coord, t.k_coord, t.same) for table, t in zip(case.tables, layout.terms, strict=True)],
        head_scale=case.head_scale,
        **({"scale": case.q.shape[2] ** -0.5} | case.options),
    )


@pytest.mark.parametrize("name", CASES)
def test_equals_loops_over_pairs(name: str) -> None:
    case = make_case(1, width=4, dtype=torch.float64, **CASES[name]).to(torch.float64)
    for got, want in zip(call(case), by_loops(case), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", CASES)
def test_gradients_equal_finite_differences(name: str) -> None:
    case = make_case(2, width=2, dtype=torch.float64, unread_nan=False, **CASES[name]).to(torch.float64)
    leaves = case.leaves()

    def function(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = call(case.with_leaves(dict(zip(leaves, tensors, strict=True))))
        return out, lse[torch.isfinite(lse)]

    inputs = [leaf.detach().requires_grad_() for leaf in leaves.values()]
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


def test_philox_known_answers() -> None:
    """The vectors published with Random123."""
    zero, ones = torch.zeros((), dtype=torch.long), torch.tensor(0xFFFFFFFF)
    pi_counter = tuple(torch.tensor(x) for x in (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344))
    pi_key = (torch.tensor(0xA4093822), torch.tensor(0x299F31D0))
    for counter, key, want in (
        ((zero,) * 4, (zero, zero), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ones,) * 4, (ones, ones), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (pi_counter, pi_key, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ):
        assert tuple(int(word) for word in philox4x32(counter, key)) == want


def test_dropout_share_and_locality() -> None:
    """About p of the pairs fall; a sample's mask does not depend on the lengths of the samples before it."""
    seed = torch.tensor([-5, 3])
    offsets = torch.tensor([0, 200, 400], dtype=torch.int32)
    keep = dropout_keep(seed, 0.25, 2, offsets, offsets, 400)
    assert abs(float(keep.float().mean()) - 0.75) < 0.005
    moved = torch.tensor([0, 7, 207], dtype=torch.int32)
    assert torch.equal(keep[:, 200:, 200:], dropout_keep(seed, 0.25, 2, moved, moved, 207)[:, 7:, 7:])
    assert not torch.equal(keep[0], keep[1])


def test_nothing_unread_leaks() -> None:
    """NaN in unseen keys and in rows without keys (their q and their incoming gradients) reaches no result."""
    case = make_case(3, (9, 0, 12), (4, 8, 11), mask="full", empty_rows=True, pos_width=4)
    assert torch.isnan(case.q).any() and torch.isnan(case.k).any() and torch.isnan(case.dout).any()
    leaves = {name: leaf.detach().double().requires_grad_() for name, leaf in case.leaves().items()}
    out, lse = call(case.with_leaves(leaves))
    grads = torch.autograd.grad([out, lse], list(leaves.values()), [case.dout.double(), case.dlse.double()])
    clean = oracle(case)
    assert torch.equal(out, clean["out"]) and torch.equal(lse, clean["lse"])
    for name, grad in zip(leaves, grads, strict=True):
        assert torch.equal(grad, clean[f"d{name}"]), name
