"""beam_step and sample_step in CUDA C++ against the reference, on an emulated GPU and on a real one."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from beam_step_cases import (
    CASES,
    DTYPES,
    NEVER,
    assert_same,
    draw_logits,
    draw_rules,
    draw_tables,
    i32,
    offsets,
    outcome,
    ragged,
)
from hypothesis import HealthCheck, given, settings
from torch import Tensor

from ofakern.errors import OfakernValueError
from ofakern.ops import native
from ofakern.ops.beam_step import (
    AutomatonTables,
    BeamCandidates,
    InvalidLogitsError,
    RaggedLogits,
    StepRules,
    beam_step,
    refuse_invalid_candidates,
    refuse_invalid_draws,
    sample_step,
)
from ofakern.ops.beam_step import op as registered

# A fixture that stands for all examples: which device.
examples = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def to(device: torch.device, x: Any) -> Any:
    return RaggedLogits(*(part.to(device) for part in x[:3]), x.vocabulary) if isinstance(x, tuple) else x.to(device)


def beams(device: torch.device, logits: Any, sums: Tensor, rows: Tensor, *rest: Any) -> BeamCandidates:
    """The kernel's choice, back on the CPU; raises what the CPU kernel would have raised. Rules are on the CPU."""
    found = beam_step(to(device, logits), sums.to(device), rows, *rest, backend="cuda")
    refuse_invalid_candidates(found, rows)
    return BeamCandidates(*(part.cpu() for part in found))


def draws(device: torch.device, logits: Any, uniforms: Tensor, *rest: Any, **filters: Tensor) -> tuple[Tensor, Tensor]:
    tokens, log_probs = sample_step(to(device, logits), uniforms.to(device), *rest, **filters, backend="cuda")
    refuse_invalid_draws(tokens)
    return tokens.cpu(), log_probs.cpu()


def check_beams(device: torch.device, logits: Any, sums: Tensor, rows: Tensor, width: int, rules: StepRules) -> None:
    have = beams(device, logits, sums, rows, width, rules)
    assert_same(have, beam_step(logits, sums, rows, width, rules, backend="reference"), sums, rows)


def check_draws(device: torch.device, logits: Any, uniforms: Tensor, rules: StepRules, **filters: Tensor) -> None:
    have = draws(device, logits, uniforms, rules, **filters)
    want = sample_step(logits, uniforms, rules, **filters, backend="reference")
    assert torch.equal(have[0], want[0])
    torch.testing.assert_close(have[1], want[1], rtol=3e-7, atol=3e-7)


@examples
@given(case=CASES)
def test_beams_with_all_rules_mixed(cuda_device: torch.device, case: Any) -> None:
    seed, vocabulary, samples, width, which, dtype = case
    generator = torch.Generator().manual_seed(seed)
    rows = sum(samples)
    logits = draw_logits(generator, rows, vocabulary, dtype)
    sums = -torch.randint(0, 4, (rows,), generator=generator).float() / 2
    sums[torch.rand(rows, generator=generator) < 0.1] = NEVER
    rules = draw_rules(generator, rows, vocabulary, which, tables=True)
    arguments = (logits, sums, offsets(*samples), width, rules)
    have = outcome(lambda: beams(cuda_device, *arguments))
    want = outcome(lambda: beam_step(*arguments, backend="reference"))
    assert isinstance(have, int) == isinstance(want, int)
    if isinstance(have, int):
        assert have == want
    else:
        uneven = any(x is not None for x in (rules.repetition_penalty, rules.adjust_first, rules.unk_penalty))
        assert_same(have, want, sums, arguments[2], uneven)


@examples
@given(case=CASES)
def test_ragged(cuda_device: torch.device, case: Any) -> None:
    seed, vocabulary, samples, width, which, dtype = case
    generator = torch.Generator().manual_seed(seed)
    rows = sum(samples)
    logits = (torch.randint(-12, 13, (rows, vocabulary), generator=generator) / 4).to(dtype)
    keep = torch.rand(rows, vocabulary, generator=generator) < 0.6
    rules = draw_rules(generator, rows, vocabulary, which, tables=False)
    check_beams(cuda_device, ragged(logits, keep), torch.zeros(rows), offsets(*samples), width, rules)
    uniforms = torch.rand(rows, generator=generator)
    have = draws(cuda_device, ragged(logits, keep), uniforms, rules)
    assert torch.equal(have[0], sample_step(ragged(logits, keep), uniforms, rules, backend="reference")[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", [1000, 20000])
def test_pieces(cuda_device: torch.device, vocabulary: int, dtype: torch.dtype) -> None:
    """Rows of several pieces, with all rules and with none."""
    generator = torch.Generator().manual_seed(7)
    logits = (torch.randn(5, vocabulary, generator=generator) * 3).to(dtype)
    logits[3], sums = logits[2], torch.randn(5, generator=generator)
    sums[3] = sums[2]  # two rows that tie everywhere
    for which in (0, 0b1111111111):
        rules = draw_rules(generator, 5, vocabulary, which, tables=True)
        check_beams(cuda_device, logits, sums, offsets(4, 0, 1), 10, rules)
    check_draws(cuda_device, logits, torch.rand(5, generator=generator), rules, top_k=i32([0, 1, 5, 50, 3]))


def test_ties_take_the_smaller_row_then_the_smaller_token(cuda_device: torch.device) -> None:
    """All logits alike: no threshold is of use, and a radix selection decides."""
    logits = torch.zeros(4, 1000)
    have = beams(cuda_device, logits, torch.zeros(4), offsets(4), 8, StepRules(pad=0))
    assert have.tokens.tolist() == [list(range(1, 9))] and not have.origins.any()
    logits[1:, 900:903] = 5.0
    sums = torch.tensor([0.0, -9.0, 0.0, 0.0])
    have = beams(cuda_device, logits, sums, offsets(4), 8, StepRules(pad=901))
    assert have.tokens.tolist() == [[900, 902, 900, 902, 0, 1, 2, 3]]
    assert have.origins.tolist() == [[2, 2, 3, 3, 0, 0, 0, 0]]


def test_equal_scores_of_unequal_logits_tie_too(cuda_device: torch.device) -> None:
    logits = torch.full((1, 600), -4.0)
    logits[0, 10], logits[0, 500] = 1e-3, 1e-3 + 1e-8
    logits[0, 300] = 20.0
    have = beams(cuda_device, logits, torch.zeros(1), offsets(1), 2)
    assert have.tokens.tolist() == [[300, 10]]


def test_wide_and_empty(cuda_device: torch.device) -> None:
    logits = draw_logits(torch.Generator().manual_seed(1), 3, 5, torch.float32)
    check_beams(cuda_device, logits, torch.zeros(3), offsets(0, 2, 1), 40, StepRules())
    empty = beams(cuda_device, logits[:0], torch.zeros(0), offsets(0, 0), 3)
    assert (empty.tokens == -1).all() and empty.tokens.shape == (2, 3)
    assert beams(cuda_device, logits[:0], torch.zeros(0), i32([0]), 3).scores.shape == (0, 3)
    assert (beams(cuda_device, logits[:, :0], torch.zeros(3), offsets(3), 2).tokens == -1).all()
    assert draws(cuda_device, logits[:0], torch.zeros(0))[0].shape == (0,)
    wide = torch.randn(2, 12000, generator=torch.Generator().manual_seed(2))
    check_beams(cuda_device, wide, torch.zeros(2), offsets(2), 400, StepRules())
    with pytest.raises(OfakernValueError, match=r"width must be in 1\.\.1024, got 1025"):
        beams(cuda_device, wide, torch.zeros(2), offsets(2), 1025)


def test_rows_outside_of_all_samples_are_not_looked_at(cuda_device: torch.device) -> None:
    logits = torch.randn(4, 30, generator=torch.Generator().manual_seed(3))
    logits[0], logits[3] = torch.nan, torch.nan
    have = beams(cuda_device, logits, torch.zeros(4), i32([1, 2, 3]), 3)
    want = beams(cuda_device, logits[1:3], torch.zeros(2), offsets(1, 1), 3)
    assert torch.equal(have.scores, want.scores)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_and_small_logits(cuda_device: torch.device, dtype: torch.dtype) -> None:
    base = torch.randn(5, 9000, generator=torch.Generator().manual_seed(5))
    base[1] = base[1] * 1e4
    base[2] = -3e30
    base[2, 8500] = -2.9e30
    base[3, :8100] += 4e5
    base[4] = torch.linspace(-1000, 0, 9000)
    check_beams(cuda_device, base.to(dtype), torch.zeros(5), offsets(1, 1, 1, 1, 1), 6, StepRules())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, NEVER])
def test_invalid_rows_are_named(cuda_device: torch.device, bad: float) -> None:
    logits = torch.zeros(4, 300)
    logits[2, 298 if bad != NEVER else slice(None)] = bad
    for rules in (StepRules(), StepRules(repetition_penalty=torch.full((4,), 2.0), history=i32([[1]] * 4))):
        with pytest.raises(InvalidLogitsError, match="logits must be finite .* row 2") as caught:
            beams(cuda_device, logits, torch.zeros(4), offsets(2, 2), 3, rules)
        assert caught.value.row == 2
        with pytest.raises(InvalidLogitsError, match="sample_step: .* row 2"):
            draws(cuda_device, logits, torch.zeros(4), rules)
    live = StepRules(live=torch.tensor([True, True, False, True]))
    assert (beams(cuda_device, logits, torch.zeros(4), offsets(2, 2), 3, live).origins[1] == 1).all()
    sums = torch.tensor([0.0, bad if bad != NEVER else torch.nan, 0.0, 0.0])
    with pytest.raises(InvalidLogitsError, match="sums must be finite .* row 1"):
        beams(cuda_device, torch.zeros(4, 7), sums, offsets(2, 2), 3)
    marked = beam_step(to(cuda_device, logits), torch.zeros(4, device=cuda_device), offsets(2, 2), 3, backend="cuda")
    assert marked.tokens[0].min() >= 0 and (marked.tokens[1] == -2).all() and marked.scores[1].isnan().all()


def test_states_and_offsets_that_are_none(cuda_device: torch.device) -> None:
    tables = draw_tables(torch.Generator().manual_seed(0), 30)
    rules = StepRules(states=i32([0, 99]), tables=tables)
    with pytest.raises(OfakernValueError, match="states must be states of the tables or -1, got another in row 1"):
        beams(cuda_device, torch.zeros(2, 30), torch.zeros(2), offsets(2), 3, rules)
    with pytest.raises(OfakernValueError, match="states must be"):
        draws(cuda_device, torch.zeros(2, 30), torch.zeros(2), rules)
    for lying in (i32([0, 2, 1, 2]), i32([1, 0, 2, 2])):
        with pytest.raises(OfakernValueError, match="row_offsets must ascend"):
            beams(cuda_device, torch.zeros(2, 30), torch.zeros(2), lying, 3)
    check_beams(cuda_device, torch.zeros(2, 30), torch.zeros(2), offsets(2), 3, StepRules())  # counters are zeros again


def test_offsets_that_lie_are_not_followed(cuda_device: torch.device) -> None:
    tables = AutomatonTables(i32([-7, 9]), i32([3, 99, -2]), i32([0, 0, 0]), i32([0, 5]), i32([[-4, 99, 0], [8, 2, 0]]),
                             torch.tensor([False]), torch.tensor([True]))  # fmt: skip
    for renormalise in (False, True):
        tables = dataclasses.replace(tables, renormalise=torch.tensor([renormalise]))
        rules = StepRules(states=i32([0, 0]), tables=tables, adjust_first=i32([-3, 50, 2]), adjust_tokens=i32([70, -1]),
                          adjust_values=torch.ones(2), history=i32([[99], [-5]]), ngram=i32([1, 100]))  # fmt: skip
        assert (beams(cuda_device, torch.zeros(2, 10), torch.zeros(2), offsets(2), 3, rules).tokens >= 0).all()
        assert (draws(cuda_device, torch.zeros(2, 10), torch.zeros(2), rules)[0] >= 0).all()
    lying = RaggedLogits(torch.zeros(3), i32([2, 77, 1]), i32([1, 5, 500]), 10)
    assert beams(cuda_device, lying, torch.zeros(2), offsets(1, 1), 2).tokens.tolist() == [[-1, -1], [-1, -1]]


def test_a_ragged_row_is_a_renormalised_state(cuda_device: torch.device) -> None:
    generator = torch.Generator().manual_seed(11)
    logits = torch.randn(3, 5000, generator=generator)
    allowed = torch.randperm(5000, generator=generator)[:700].sort().values.int()
    tables = AutomatonTables(
        offsets(700), allowed, torch.zeros_like(allowed), offsets(0), torch.empty(0, 3, dtype=torch.int32),
        torch.tensor([True]), torch.tensor([False]),
    )  # fmt: skip
    keep = torch.zeros(3, 5000, dtype=torch.bool)
    keep[:, allowed.long()] = True
    sums, rules = torch.tensor([0.0, -1.0, -2.0]), StepRules(states=i32([0, 0, 0]), tables=tables)
    dense = beams(cuda_device, logits, sums, offsets(3), 10, rules)
    narrow = beams(cuda_device, ragged(logits, keep), sums, offsets(3), 10)
    assert torch.equal(dense.tokens, narrow.tokens) and torch.equal(dense.origins, narrow.origins)
    torch.testing.assert_close(dense.scores, narrow.scores, rtol=3e-7, atol=3e-7)  # sums are divided otherwise


@pytest.mark.parametrize("name", ["top_k", "top_p", "typical_p", "min_p"])
@pytest.mark.parametrize("vocabulary", [300, 2500])
def test_filters(cuda_device: torch.device, vocabulary: int, name: str) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    logits, uniforms = torch.randn(4, vocabulary, generator=generator) * 3, torch.rand(4, generator=generator)
    values = i32([1, 7, 100, 0]) if name == "top_k" else torch.tensor([0.3, 0.05, 0.9, 1.0 if name != "min_p" else 0])
    check_draws(cuda_device, logits, uniforms, StepRules(), **{name: values})


def test_filters_together_and_ties(cuda_device: torch.device) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randint(-8, 9, (4, 200), generator=generator).float() / 4
    rules = draw_rules(generator, 4, 200, 0b1101111111, tables=True)
    all_of_them = {"top_k": i32([40, 50, 60, 0]), "top_p": torch.full((4,), 0.8), "typical_p": torch.full((4,), 0.7),
                   "min_p": torch.full((4,), 0.1)}  # fmt: skip
    check_draws(cuda_device, logits, torch.tensor([0.0, 0.3, 0.6, 0.999999]), rules, **all_of_them)
    equal, mass = torch.zeros(4, 8), torch.tensor([1.0, 0.5, 0.51, 1e-9])
    kept, _ = draws(cuda_device, equal, torch.full((4,), 0.9999), StepRules(pad=-1), top_p=mass)
    assert kept.tolist() == [7, 3, 4, 0]


def all_results(device: torch.device, logits: Tensor, rules: StepRules, sums: Tensor) -> list[Tensor]:
    p = torch.linspace(0.3, 0.9, len(sums))
    candidates = beams(device, logits, sums, offsets(3, len(sums) - 3), 6, rules)
    return [*candidates, *draws(device, logits, p, rules, top_p=p, typical_p=p)]


def test_the_same_bits_whoever_comes_last(cuda_device: torch.device) -> None:
    generator = torch.Generator().manual_seed(21)
    logits = torch.randn(5, 9000, generator=generator)
    rules = draw_rules(generator, 5, 9000, 0b1111111001, tables=True)
    first = all_results(cuda_device, logits, rules, torch.zeros(5))
    for seed in (1, 2):
        if cuda_device.type == "cpu":
            native.cuda_kernels.set_seed(seed)
        for have, want in zip(all_results(cuda_device, logits, rules, torch.zeros(5)), first, strict=True):
            assert torch.equal(have, want)


def test_a_row_does_not_depend_on_its_neighbours(cuda_device: torch.device) -> None:
    generator = torch.Generator().manual_seed(22)
    logits, sums = torch.randn(6, 3001, generator=generator), torch.randn(6, generator=generator)
    whole = beams(cuda_device, logits, sums, offsets(3, 3), 5)
    for have, want in zip(beams(cuda_device, logits[3:], sums[3:], offsets(3), 5), whole, strict=True):
        assert torch.equal(have[0], want[1])


def test_views(cuda_device: torch.device) -> None:
    generator = torch.Generator().manual_seed(23)
    logits, history = torch.randn(12, 80, generator=generator), torch.randint(0, 9, (12, 20), dtype=torch.int32)
    ngram, penalty, sums = torch.full((12,), 2, dtype=torch.int32), torch.full((12,), 1.5), torch.zeros(12)
    for x in (logits[::2, :40], logits[:6, ::2], logits.T[:40].T[:6]):
        for past in (history[::2, 3:9], history[:6, ::2]):
            rules = StepRules(history=past, ngram=ngram[::2], repetition_penalty=penalty[::2])
            whole = StepRules(
                history=past.contiguous(), ngram=ngram[:6].clone(), repetition_penalty=penalty[:6].clone()
            )
            strided = all_results(cuda_device, x, rules, sums[::2])
            plain = all_results(cuda_device, x.contiguous(), whole, sums[:6].clone())
            assert all(torch.equal(have, want) for have, want in zip(strided, plain, strict=True))


def test_poisoned_outputs_are_all_written(cuda_device: torch.device) -> None:
    logits, rows = torch.randn(3, 600, generator=torch.Generator().manual_seed(1)), offsets(2, 0, 1)
    moved = [x.to(cuda_device) if isinstance(x, Tensor) else x for x in registered.step_arguments(logits, StepRules())]
    arguments = (*moved, torch.zeros(3, device=cuda_device), rows.to(cuda_device))
    kernels = native.cuda_kernels
    needed = kernels.beam_step_workspace(*arguments, 7)
    scratch = torch.full((needed,), 255, dtype=torch.uint8, device=cuda_device)
    places = [torch.full((3, 7), -99, dtype=torch.int32, device=cuda_device) for _ in range(2)]
    scores, log_probs = (torch.full((3, 7), torch.nan, device=cuda_device) for _ in range(2))
    out = (scores, *places, log_probs)
    arrived = torch.zeros(3, dtype=torch.int32, device=cuda_device)
    kernels.beam_step_forward(*out, scratch, *arguments, arrived)
    assert not arrived.any()
    for have, want in zip(out, beams(cuda_device, logits, torch.zeros(3), rows, 7), strict=True):
        assert torch.equal(have.cpu(), want)
    with pytest.raises(OfakernValueError, match="workspace"):
        kernels.beam_step_forward(*out, scratch[:64], *arguments, arrived)
    with pytest.raises(OfakernValueError, match="arrived must have an entry per sample"):
        kernels.beam_step_forward(*out, scratch, *arguments, arrived[:2])


def test_opcheck_and_compile(cuda_device: torch.device) -> None:
    generator = torch.Generator().manual_seed(31)
    logits = torch.randn(4, 60, generator=generator).to(cuda_device)
    rules = draw_rules(generator, 4, 60, 0b1111111111, tables=True)
    sums, rows = torch.zeros(4, device=cuda_device), offsets(4)
    step = registered.step_arguments(logits, rules)
    on_device = [x.to(cuda_device) if isinstance(x, Tensor) else x for x in (*step, sums, rows)]
    torch.library.opcheck(torch.ops.ofakern.beam_step_fwd.default, (*on_device, 3))

    def call(x: Tensor) -> BeamCandidates:
        return beam_step(x * 2, sums, rows, 3, rules, backend="cuda")

    torch._dynamo.reset()
    for have, want in zip(torch.compile(call, fullgraph=True, backend="aot_eager")(logits), call(logits), strict=True):
        assert torch.equal(have, want)
