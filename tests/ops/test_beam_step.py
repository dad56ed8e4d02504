"""beam_step and sample_step against the reference: order and ties exactly, all rules mixed row by row, every ISA."""

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
from hypothesis import given, settings
from hypothesis import strategies as st
from short import examples
from torch import Tensor

import ofakern
from ofakern.errors import BackendError, OfakernRuntimeError, OfakernTypeError, OfakernValueError
from ofakern.ops.beam_step import (
    AutomatonTables,
    BeamCandidates,
    InvalidLogitsError,
    RaggedLogits,
    StepRules,
    beam_step,
    sample_step,
)
from ofakern.ops.beam_step import op as registered
from ofakern.ops.beam_step.reference import step_log_probs

pytestmark = pytest.mark.usefixtures("cpu")


def check_beams(logits: Tensor | RaggedLogits, sums: Tensor, rows: Tensor, width: int, rules: StepRules) -> None:
    have = beam_step(logits, sums, rows, width, rules)
    assert_same(have, beam_step(logits, sums, rows, width, rules, backend="reference"), sums, rows)


@settings(max_examples=examples(60), deadline=None)
@given(case=CASES)
def test_beams_with_all_rules_mixed(case: Any) -> None:
    seed, vocabulary, samples, width, which, dtype = case
    generator = torch.Generator().manual_seed(seed)
    rows = sum(samples)
    logits = draw_logits(generator, rows, vocabulary, dtype)
    sums = -torch.randint(0, 4, (rows,), generator=generator).float() / 2
    sums[torch.rand(rows, generator=generator) < 0.1] = NEVER
    rules = draw_rules(generator, rows, vocabulary, which, tables=True)
    arguments = (logits, sums, offsets(*samples), width, rules)
    have, want = (outcome(lambda b=b: beam_step(*arguments, backend=b)) for b in ("cpu", "reference"))
    assert isinstance(have, int) == isinstance(want, int)
    if isinstance(have, int):
        assert have == want
    else:
        uneven = any(x is not None for x in (rules.repetition_penalty, rules.adjust_first, rules.unk_penalty))
        assert_same(have, want, sums, arguments[2], uneven)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set(isa: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(7)
    for vocabulary in (40, 1000, 20000):
        logits = (torch.randn(9, vocabulary, generator=generator) * 3).to(dtype)
        logits[3], sums = logits[2], torch.randn(9, generator=generator)
        sums[3] = sums[2]  # two rows that tie everywhere
        for which in (0, 0b0011110001, 0b1111111111):
            rules = draw_rules(generator, 9, vocabulary, which, tables=True)
            check_beams(logits, sums, offsets(5, 0, 4), 10, rules)
            have, want = (sample_step(logits, torch.rand(9, generator=torch.Generator().manual_seed(1)), rules,
                                      top_k=i32([0, 1, 5, 50, 0, 3, 0, 2, 9]), backend=b)
                          for b in ("cpu", "reference"))  # fmt: skip
            assert torch.equal(have[0], want[0])
            torch.testing.assert_close(have[1], want[1], rtol=3e-7, atol=3e-7)


def test_ties_take_the_smaller_row_then_the_smaller_token(isa: str) -> None:
    logits = torch.zeros(4, 1000)
    have = beam_step(logits, torch.zeros(4), offsets(4), 8, StepRules(pad=0))
    assert have.tokens.tolist() == [list(range(1, 9))] and not have.origins.any()
    logits[1:, 900:903] = 5.0
    have = beam_step(logits, torch.tensor([0.0, -9.0, 0.0, 0.0]), offsets(4), 8, StepRules(pad=901))
    assert have.tokens.tolist() == [[900, 902, 900, 902, 0, 1, 2, 3]]
    assert have.origins.tolist() == [[2, 2, 3, 3, 0, 0, 0, 0]]


def test_equal_scores_of_unequal_logits_tie_too(isa: str) -> None:
    """Rounding x - log_sum makes neighbouring logits one score; the smaller token is first, whatever its logit."""
    logits = torch.full((1, 600), -4.0)
    logits[0, 10], logits[0, 500] = 1e-3, 1e-3 + 1e-8
    logits[0, 300] = 20.0
    assert logits[0, 500] > logits[0, 10]
    have = beam_step(logits, torch.zeros(1), offsets(1), 2)
    assert have.tokens.tolist() == [[300, 10]]


def test_wide_and_empty(isa: str) -> None:
    logits = draw_logits(torch.Generator().manual_seed(1), 3, 5, torch.float32)
    check_beams(logits, torch.zeros(3), offsets(0, 2, 1), 40, StepRules())
    empty = beam_step(logits[:0], torch.zeros(0), offsets(0, 0), 3)
    assert (empty.tokens == -1).all() and empty.tokens.shape == (2, 3)
    assert beam_step(logits[:0], torch.zeros(0), i32([0]), 3).scores.shape == (0, 3)
    assert (beam_step(logits[:, :0], torch.zeros(3), offsets(3), 2).tokens == -1).all()
    assert sample_step(logits[:0], torch.zeros(0))[0].shape == (0,)
    wide = torch.randn(2, 70000, generator=torch.Generator().manual_seed(2))
    check_beams(wide, torch.zeros(2), offsets(2), 400, StepRules())


def test_rows_outside_of_all_samples_are_not_looked_at() -> None:
    logits = torch.randn(4, 30, generator=torch.Generator().manual_seed(3))
    logits[0], logits[3] = torch.nan, torch.nan
    for backend in ("cpu", "reference"):
        have = beam_step(logits, torch.zeros(4), i32([1, 2, 3]), 3, backend=backend)
        want = beam_step(logits[1:3], torch.zeros(2), offsets(1, 1), 3, backend=backend)
        assert torch.equal(have.scores, want.scores)


@settings(max_examples=examples(30), deadline=None)
@given(case=CASES)
def test_ragged(case: Any) -> None:
    seed, vocabulary, samples, width, which, dtype = case
    generator = torch.Generator().manual_seed(seed)
    rows = sum(samples)
    logits = (torch.randint(-12, 13, (rows, vocabulary), generator=generator) / 4).to(dtype)
    keep = torch.rand(rows, vocabulary, generator=generator) < 0.6
    rules = draw_rules(generator, rows, vocabulary, which, tables=False)
    sums = torch.zeros(rows)
    check_beams(ragged(logits, keep), sums, offsets(*samples), width, rules)
    uniforms = torch.rand(rows, generator=generator)
    have, want = (sample_step(ragged(logits, keep), uniforms, rules, backend=b) for b in ("cpu", "reference"))
    assert torch.equal(have[0], want[0])


def test_a_ragged_row_is_a_renormalised_state(isa: str) -> None:
    generator = torch.Generator().manual_seed(11)
    logits = torch.randn(3, 5000, generator=generator)
    allowed = torch.randperm(5000, generator=generator)[:700].sort().values.int()
    tables = AutomatonTables(
        offsets(700), allowed, torch.zeros_like(allowed), offsets(0), torch.empty(0, 3, dtype=torch.int32),
        torch.tensor([True]), torch.tensor([False]),
    )  # fmt: skip
    keep = torch.zeros(3, 5000, dtype=torch.bool)
    keep[:, allowed.long()] = True
    sums = torch.tensor([0.0, -1.0, -2.0])
    dense = beam_step(logits, sums, offsets(3), 10, StepRules(states=i32([0, 0, 0]), tables=tables))
    for have, want in zip(beam_step(ragged(logits, keep), sums, offsets(3), 10), dense, strict=True):
        assert torch.equal(have, want)
    free = step_log_probs(logits, StepRules(), torch.ones(3, dtype=torch.bool))
    assert (dense.log_probs > free.gather(1, dense.tokens[0, :3, None].long())[0]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_and_small_logits(isa: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(5)
    base = torch.randn(5, 20000, generator=generator)
    base[1] = base[1] * 1e4
    base[2] = -3e30
    base[2, 19000] = -2.9e30
    base[3, :18000] += 4e5
    base[4] = torch.linspace(-1000, 0, 20000)
    check_beams(base.to(dtype), torch.zeros(5), offsets(1, 1, 1, 1, 1), 6, StepRules())


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, NEVER])
def test_invalid_rows_are_named(backend: str, bad: float) -> None:
    for vocabulary in (7, 300, 600):
        logits = torch.zeros(4, vocabulary)
        logits[2, vocabulary - 2 if bad != NEVER else slice(None)] = bad
        for rules in (StepRules(), StepRules(repetition_penalty=torch.full((4,), 2.0), history=i32([[1]] * 4))):
            with pytest.raises(InvalidLogitsError, match="logits must be finite .* row 2") as caught:
                beam_step(logits, torch.zeros(4), offsets(2, 2), 3, rules, backend=backend)
            assert caught.value.row == 2 and isinstance(caught.value, OfakernRuntimeError)
            with pytest.raises(InvalidLogitsError, match="sample_step: .* row 2"):
                sample_step(logits, torch.zeros(4), rules, backend=backend)
        live = torch.tensor([True, True, False, True])
        others = beam_step(logits, torch.zeros(4), offsets(2, 2), 3, StepRules(live=live), backend=backend)
        assert (others.origins[1] == 1).all()
    sums = torch.tensor([0.0, bad if bad != NEVER else torch.nan, 0.0, 0.0])
    with pytest.raises(InvalidLogitsError, match="sums must be finite .* row 1"):
        beam_step(torch.zeros(4, 7), sums, offsets(2, 2), 3, backend=backend)


def test_a_constrained_state_does_not_see_what_it_renormalises_away() -> None:
    logits = torch.zeros(1, 50)
    logits[0, 40] = torch.nan
    tables = dataclasses.replace(draw_tables(torch.Generator().manual_seed(0), 30), renormalise=torch.ones(6).bool())
    state = next(s for s in range(6) if tables.first[s + 1] > tables.first[s])
    rules = StepRules(states=i32([state]), tables=tables)
    assert beam_step(logits, torch.zeros(1), offsets(1), 2, rules).tokens[0, 0] >= 0
    with pytest.raises(OfakernValueError, match="states must be states of the tables or -1, got another in row 0"):
        beam_step(logits, torch.zeros(1), offsets(1), 2, dataclasses.replace(rules, states=i32([6])))


FILTERS = st.tuples(
    st.sampled_from((0, 1, 3, 40)),
    st.sampled_from((1.0, 0.95, 0.61, 0.13, 1e-6)),
    st.sampled_from((1.0, 0.91, 0.37, 1e-6)),
    st.sampled_from((0.0, 0.013, 0.29, 1.0)),
)


@settings(max_examples=examples(60), deadline=None)
@given(seed=st.integers(0, 2**20), vocabulary=st.sampled_from((1, 3, 50, 300, 2000)),
       which=st.integers(0, 1023), filters=st.lists(FILTERS, min_size=1, max_size=4))  # fmt: skip
def test_draws(seed: int, vocabulary: int, which: int, filters: Any) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = len(filters)
    logits = torch.randn(rows, vocabulary, generator=generator) * 2
    uniforms = torch.rand(rows, generator=generator)
    rules = draw_rules(generator, rows, vocabulary, which, tables=True)
    columns = list(zip(*filters, strict=True))
    named = {
        "top_k": i32(columns[0]),
        "top_p": torch.tensor(columns[1]),
        "typical_p": torch.tensor(columns[2]),
        "min_p": torch.tensor(columns[3]),
    }
    have, want = (sample_step(logits, uniforms, rules, **named, backend=b) for b in ("cpu", "reference"))
    assert have[0].dtype == torch.int32 and torch.equal(have[0], want[0])
    torch.testing.assert_close(have[1], want[1], rtol=3e-7, atol=3e-7)


def test_draws_follow_the_distribution_and_the_uniform_number(isa: str) -> None:
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log().expand(1000, 4).contiguous()
    uniforms = torch.arange(1000) / 1000
    tokens, log_probs = sample_step(logits, uniforms, StepRules(pad=-1))
    assert torch.bincount(tokens).tolist() == pytest.approx([100, 200, 300, 400], abs=1)
    assert (tokens.diff() >= 0).all()
    torch.testing.assert_close(log_probs, logits.gather(1, tokens[:, None].long())[:, 0])
    equal, mass = torch.zeros(4, 8), torch.tensor([1.0, 0.5, 0.51, 1e-9])
    kept, _ = sample_step(equal, torch.full((4,), 0.9999), StepRules(pad=-1), top_p=mass)
    assert kept.tolist() == [7, 3, 4, 0]


def test_rows_that_are_not_live_and_states_without_tokens() -> None:
    tables = draw_tables(torch.Generator().manual_seed(0), 30)
    rules = StepRules(live=torch.tensor([False, True]), states=i32([-1, 0]), tables=tables)
    for backend in ("cpu", "reference"):
        tokens, log_probs = sample_step(torch.zeros(2, 30), torch.zeros(2), rules, backend=backend)
        assert tokens.tolist() == [-1, -1] and log_probs.tolist() == [NEVER, NEVER]


def all_results(logits: Tensor, rules: StepRules, sums: Tensor) -> list[Tensor]:
    rows = len(sums)
    p = torch.linspace(0.3, 0.9, rows)
    candidates = beam_step(logits, sums, offsets(3, rows - 3), 6, rules)
    return [*candidates, *sample_step(logits, p, rules, top_p=p, typical_p=p)]


@pytest.mark.parametrize("vocabulary", [90, 40000])
def test_bits_do_not_depend_on_threads(vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(21)
    logits = torch.randn(7, vocabulary, generator=generator)
    rules = draw_rules(generator, 7, vocabulary, 0b1111111001, tables=True)
    first = all_results(logits, rules, torch.zeros(7))
    torch.set_num_threads(3)
    for _ in range(3):
        for have, want in zip(all_results(logits, rules, torch.zeros(7)), first, strict=True):
            assert torch.equal(have, want)


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    generator = torch.Generator().manual_seed(22)
    logits, sums = torch.randn(6, 3000, generator=generator), torch.randn(6, generator=generator)
    whole = beam_step(logits, sums, offsets(3, 3), 5)
    for have, want in zip(beam_step(logits[3:], sums[3:], offsets(3), 5), whole, strict=True):
        assert torch.equal(have[0], want[1])


def test_views() -> None:
    generator = torch.Generator().manual_seed(23)
    logits, history = torch.randn(12, 80, generator=generator), torch.randint(0, 9, (12, 20), dtype=torch.int32)
    ngram, penalty, sums = torch.full((12,), 2, dtype=torch.int32), torch.full((12,), 1.5), torch.zeros(12)
    for x in (logits[::2, :40], logits[:6, ::2], logits[:6, 40:], logits.T[:40].T[:6]):
        for past in (history[::2, 3:9], history[:6, ::2]):
            rules = StepRules(history=past, ngram=ngram[::2], repetition_penalty=penalty[::2])
            whole = StepRules(
                history=past.contiguous(), ngram=ngram[:6].clone(), repetition_penalty=penalty[:6].clone()
            )
            strided, plain = all_results(x, rules, sums[::2]), all_results(x.contiguous(), whole, sums[:6].clone())
            assert all(torch.equal(have, want) for have, want in zip(strided, plain, strict=True))


def test_logits_are_not_written() -> None:
    logits = torch.randn(3, 600, generator=torch.Generator().manual_seed(1))
    before = logits.clone()
    rules = StepRules(repetition_penalty=torch.full((3,), 2.0), history=i32([[4, 5]] * 3))
    for backend in ("cpu", "reference"):
        beam_step(logits, torch.zeros(3), offsets(3), 3, rules, backend=backend)
        sample_step(logits, torch.zeros(3), rules, backend=backend)
    assert torch.equal(logits, before)


def test_poisoned_outputs_are_all_written(cpu: Any) -> None:
    logits, rows = torch.randn(3, 600, generator=torch.Generator().manual_seed(1)), offsets(2, 0, 1)
    step = registered.step_arguments(logits, StepRules())
    arguments = (*step, torch.zeros(3), rows)
    scratch = torch.full((cpu.beam_step_workspace(*arguments, 7, 1),), 255, dtype=torch.uint8)
    places = [torch.full((3, 7), -99, dtype=torch.int32) for _ in range(2)]
    out = [torch.full((3, 7), torch.nan), *places, torch.full((3, 7), torch.nan)]
    assert cpu.beam_step_forward(*out, scratch, *arguments, 1) == -1
    for have, want in zip(out, beam_step(logits, torch.zeros(3), rows, 7), strict=True):
        assert torch.equal(have, want)
    with pytest.raises(OfakernValueError, match="workspace"):
        cpu.beam_step_forward(*out, scratch[:64], *arguments, 1)
    draws = (*step, torch.full((3,), 0.5), None, None, None, None)
    scratch = torch.full((cpu.sample_step_workspace(*draws, 1),), 255, dtype=torch.uint8)
    tokens, log_probs = torch.full((3,), -99, dtype=torch.int32), torch.full((3,), torch.nan)
    assert cpu.sample_step_forward(tokens, log_probs, scratch, *draws, 1) == -1
    assert (tokens >= 0).all() and (log_probs <= 0).all()
    with pytest.raises(OfakernValueError, match="row_offsets must ascend"):
        cpu.beam_step_workspace(*step, torch.zeros(3), i32([0, 2, 1]), 7, 1)


def test_offsets_that_lie_are_not_followed(cpu: Any) -> None:
    """Kernels stay inside the tensors whatever their contents are; the api's callers build them right."""
    tables = AutomatonTables(i32([-7, 9]), i32([3, 99, -2]), i32([0, 0, 0]), i32([0, 5]), i32([[-4, 99, 0], [8, 2, 0]]),
                             torch.tensor([False]), torch.tensor([True]))  # fmt: skip
    for renormalise in (False, True):
        tables = dataclasses.replace(tables, renormalise=torch.tensor([renormalise]))
        rules = StepRules(states=i32([0, 0]), tables=tables, adjust_first=i32([-3, 50, 2]), adjust_tokens=i32([70, -1]),
                          adjust_values=torch.ones(2), history=i32([[99], [-5]]), ngram=i32([1, 100]))  # fmt: skip
        assert (beam_step(torch.zeros(2, 10), torch.zeros(2), offsets(2), 3, rules).tokens >= 0).all()
        assert (sample_step(torch.zeros(2, 10), torch.zeros(2), rules)[0] >= 0).all()
    lying = RaggedLogits(torch.zeros(3), i32([2, 77, 1]), i32([1, 5, 500]), 10)
    assert beam_step(lying, torch.zeros(2), offsets(1, 1), 2).tokens.tolist() == [[-1, -1], [-1, -1]]


def test_opcheck_and_compile() -> None:
    generator = torch.Generator().manual_seed(31)
    logits = torch.randn(4, 60, generator=generator)
    rules = draw_rules(generator, 4, 60, 0b1111111111, tables=True)
    step = registered.step_arguments(logits, rules)
    torch.library.opcheck(torch.ops.ofakern.beam_step_fwd.default, (*step, torch.zeros(4), offsets(4), 3))
    filters = (torch.rand(4), i32([3] * 4), torch.rand(4) + 0.1, None, None)
    bare = registered.step_arguments(logits, StepRules())
    torch.library.opcheck(torch.ops.ofakern.sample_step_fwd.default, (*bare, *filters))

    def call(x: Tensor) -> BeamCandidates:
        return beam_step(x * 2, torch.zeros(4), offsets(4), 3, rules)

    torch._dynamo.reset()
    for have, want in zip(torch.compile(call, fullgraph=True, backend="aot_eager")(logits), call(logits), strict=True):
        assert torch.equal(have, want)
    with pytest.raises(OfakernRuntimeError, match="under vmap"):
        torch.vmap(lambda x: beam_step(x, torch.zeros(4), offsets(4), 3))(logits.expand(2, 4, 60))


def test_explain_names_the_backend() -> None:
    text = ofakern.explain("beam_step", torch.zeros(2, 9), torch.zeros(2), offsets(2), 3)
    assert "runs on 'cpu'" in text and "cuda" in text


X = torch.zeros(2, 9)
TABLES = draw_tables(torch.Generator().manual_seed(0), 9)
REFUSED: list[tuple[str, type[Exception], dict[str, Any]]] = [
    ("logits must be a tensor or RaggedLogits", OfakernTypeError, {"logits": [1]}),
    ("logits must be float32 or bfloat16 or float16", OfakernTypeError, {"logits": X.double()}),
    ("logits must have shape \\[\\*, \\*\\]", OfakernValueError, {"logits": X[0]}),
    ("sums must have shape \\[2\\]", OfakernValueError, {"sums": torch.zeros(3)}),
    ("sums must be float32", OfakernTypeError, {"sums": torch.zeros(2).half()}),
    ("row_offsets must be int32", OfakernTypeError, {"row_offsets": torch.tensor([0, 2])}),
    ("row_offsets must have shape \\[B\\+1\\]", OfakernValueError, {"row_offsets": i32([])}),
    ("row_offsets must ascend within 0..2", OfakernValueError, {"row_offsets": i32([0, 3])}),
    ("width must be in 1..65536, got 0", OfakernValueError, {"width": 0}),
    ("width must be an integer", OfakernTypeError, {"width": 2.0}),
    ("rules must be StepRules", OfakernTypeError, {"rules": {}}),
    ("temperature must be a tensor", OfakernTypeError, {"rules": StepRules(temperature=1.0)}),  # type: ignore[arg-type]
    ("live must be bool", OfakernTypeError, {"rules": StepRules(live=torch.ones(2))}),
    ("forced must have shape \\[2\\]", OfakernValueError, {"rules": StepRules(forced=i32([1]))}),
    ("history must be given where ngram is", OfakernValueError, {"rules": StepRules(ngram=i32([1, 1]))}),
    ("history must have shape \\[2, \\*\\]", OfakernValueError, {"rules": StepRules(history=i32([[1]]))}),
    ("must come together, got only adjust_first", OfakernValueError, {"rules": StepRules(adjust_first=i32([0, 0, 0]))}),
    (
        "states and tables must come together, got no tables",
        OfakernValueError,
        {"rules": StepRules(states=i32([0, 0]))},
    ),
    ("tables must be AutomatonTables", OfakernTypeError, {"rules": StepRules(states=i32([0, 0]), tables=3)}),  # type: ignore[arg-type]
    (
        "tables.first must have shape \\[7\\]",
        OfakernValueError,
        {"rules": StepRules(states=i32([0, 0]), tables=dataclasses.replace(TABLES, first=i32([0])))},
    ),
    (
        "states must be None for ragged logits",
        OfakernValueError,
        {
            "logits": RaggedLogits(torch.zeros(1), i32([0, 0, 1]), i32([1]), 9),
            "rules": StepRules(states=i32([0, 0]), tables=TABLES),
        },
    ),
    (
        "values must have shape \\[2\\]",
        OfakernValueError,
        {"logits": RaggedLogits(X[0, :1], i32([0, 1, 2]), i32([1, 2]), 9)},
    ),
    ("vocabulary must be in", OfakernValueError, {"logits": RaggedLogits(X[0, :2], i32([0, 1, 2]), i32([1, 2]), -1)}),
    ("backend 'cuda' cannot run this call", BackendError, {"backend": "cuda"}),
]


@pytest.mark.parametrize(("message", "error", "changes"), REFUSED)
def test_refusals(message: str, error: type[Exception], changes: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        beam_step(**({"logits": X, "sums": torch.zeros(2), "row_offsets": offsets(2), "width": 3} | changes))


def test_refused_filters() -> None:
    with pytest.raises(OfakernTypeError, match="sample_step: top_k must be int32"):
        sample_step(X, torch.zeros(2), top_k=torch.ones(2))
    with pytest.raises(OfakernValueError, match="sample_step: uniforms must have shape"):
        sample_step(X, torch.zeros(3))
