"""The public doors of a search's step: every argument is checked here. The other half: csrc/ops/beam_step/."""

from __future__ import annotations

from types import NoneType
from typing import Any

import torch
from torch import Tensor

from ofakern.errors import OfakernError, OfakernTypeError, OfakernValueError
from ofakern.ops.beam_step import op
from ofakern.ops.beam_step.reference import InvalidRow, beam_step_reference, sample_step_reference
from ofakern.ops.beam_step.rules import AutomatonTables, BeamCandidates, InvalidLogitsError, RaggedLogits, StepRules
from ofakern.ops.library import STRAIGHT, straight

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_DEFAULT = StepRules()
_PER_ROW = {
    "temperature": torch.float32,
    "live": torch.bool,
    "forced": torch.int32,
    "no_eos": torch.bool,
    "repetition_penalty": torch.float32,
    "counted_from": torch.int32,
    "ngram": torch.int32,
    "unk_penalty": torch.float32,
    "states": torch.int32,
}
_ADJUST = {"adjust_first": torch.int32, "adjust_tokens": torch.int32, "adjust_values": torch.float32}
_TABLES = {
    "first": torch.int32,
    "tokens": torch.int32,
    "targets": torch.int32,
    "range_first": torch.int32,
    "renormalise": torch.bool,
    "free": torch.bool,
}


def beam_step(
    logits: Tensor | RaggedLogits,
    sums: Tensor,
    row_offsets: Tensor,
    width: int,
    rules: StepRules | None = None,
    backend: str = "auto",
) -> BeamCandidates:
    """The `width` best continuations of each of B samples: log-softmax, rules, selection in one pass.

    A candidate's score is its row's sum + log_softmax(logits / temperature) after the rules, in float32; the softmax is
    over the whole row, in a renormalised state over what the state allows, and over the given tokens of ragged logits.

    Args:
        logits: `[R,V]` float32, bfloat16 or float16 (rows may lie apart), or `RaggedLogits`. -inf is fine.
        sums: float32 `[R]`, the rows' scores so far; a row with -inf is not looked at.
        row_offsets: int32 `[B+1]`; sample b has the rows row_offsets[b]:row_offsets[b + 1].
        width: candidates per sample, at least 1.
        rules: see `StepRules`; None: nothing but the padding token is excluded.
        backend: "auto", "cpu", "cuda" or "reference" (plain torch, slow). Never falls back. "cuda" chooses at most 1024
            candidates; rules may be on the CPU, where they are copied from.

    Returns:
        `BeamCandidates`. The same bits for any number of threads.

    Raises:
        OfakernTypeError, OfakernValueError: an argument of the wrong type, dtype, device, shape or range.
        InvalidLogitsError (an OfakernRuntimeError): a live row with NaN or +inf, or nothing but -inf; `.row` tells it.
            "cuda" does not wait for the GPU to find out: it writes the fault into the result, and
            `refuse_invalid_candidates` raises what is found in one.
        BackendError: the backend cannot run the call, with the reason.
    """
    rules = _DEFAULT if rules is None else rules
    arguments = _plain(backend, logits, rules, sums, row_offsets)
    if arguments is not None:
        try:
            return BeamCandidates(*op.BEAM[STRAIGHT](*arguments, width))
        except InvalidLogitsError:
            raise
        except OfakernError:
            pass  # refused: the checks below say why
    chosen = op.BACKENDS.select(backend, _check("beam_step", logits, rules))
    _check_beams(_rows(logits), sums, row_offsets, width)
    if chosen == "reference":
        try:
            return BeamCandidates(*beam_step_reference(logits, sums, row_offsets, width, rules))
        except InvalidRow as error:
            raise InvalidLogitsError("beam_step", error.name, error.row) from None
    return BeamCandidates(*op.BEAM[chosen](*op.step_arguments(logits, rules), sums, row_offsets, width))


def sample_step(
    logits: Tensor | RaggedLogits,
    uniforms: Tensor,
    rules: StepRules | None = None,
    *,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    typical_p: Tensor | None = None,
    min_p: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """One token of each row, drawn from what the rules and filters leave, without sorting the vocabulary.

    The filters follow each other as in transformers, each over the renormalised rest: top_k, top_p, min_p, typical_p.
    Equally probable tokens count in the order of their ids; at least one token is always left. The drawn token is the
    first, in the order of ids, whose cumulative probability exceeds the row's uniform number.

    Args:
        logits: as for `beam_step`.
        uniforms: float32 `[R]` in [0, 1).
        rules: see `StepRules`.
        top_k: int32 `[R]`, how many of the most probable tokens stay; 0: all.
        top_p: float32 `[R]`; the most probable tokens stay whose predecessors hold less than this; 1: all.
        typical_p: float32 `[R]`; the same, in the order of |surprise - entropy|; 1: all.
        min_p: float32 `[R]`; tokens stay that are at least this times as probable as the best; 0: all.
        backend: "auto", "cpu", "cuda" or "reference".

    Returns:
        tokens int32 `[R]` and their log-probabilities float32 `[R]` after the rules, before the filters; -1 and -inf in
        rows that are not live or where nothing may follow.

    Raises:
        As `beam_step`; "cuda" gives a row at fault NaN, for `refuse_invalid_draws` to find.

    Source: Holtzman et al., arXiv 1904.09751 (top_p); Meister et al., arXiv 2202.00666 (typical_p); Nguyen et al.,
    arXiv 2407.01082 (min_p).
    """
    rules = _DEFAULT if rules is None else rules
    filters = (top_k, top_p, typical_p, min_p)
    arguments = _plain(backend, logits, rules, uniforms, *filters)
    drawn: tuple[Tensor, Tensor]
    if arguments is not None:
        try:
            drawn = op.SAMPLE[STRAIGHT](*arguments)
            return drawn
        except InvalidLogitsError:
            raise
        except OfakernError:
            pass  # refused: the checks below say why
    chosen = op.BACKENDS.select(backend, _check("sample_step", logits, rules))
    rows = _rows(logits)
    _check_tensor("sample_step", "uniforms", uniforms, torch.float32, [rows])
    for name, tensor in zip(("top_k", "top_p", "typical_p", "min_p"), filters, strict=True):
        if tensor is not None:
            _check_tensor("sample_step", name, tensor, torch.int32 if name == "top_k" else torch.float32, [rows])
    if chosen == "reference":
        try:
            return sample_step_reference(logits, uniforms, rules, *filters)
        except InvalidRow as error:
            raise InvalidLogitsError("sample_step", error.name, error.row) from None
    drawn = op.SAMPLE[chosen](*op.step_arguments(logits, rules), uniforms, *filters)
    return drawn


def refuse_invalid_candidates(candidates: BeamCandidates, row_offsets: Tensor) -> None:
    """Raises what `beam_step` would have raised had it waited: for results of backend "cuda", once they are needed.

    Waits for the GPU when they are there. OfakernValueError for states and offsets, else InvalidLogitsError.
    """
    if candidates.tokens.numel() == 0:
        return
    faults = candidates.tokens[:, 0].cpu()
    rows = row_offsets[:-1].cpu() + candidates.origins[:, 0].cpu()
    op.refuse_marked("beam_step", faults, rows)


def refuse_invalid_draws(tokens: Tensor) -> None:
    """The same of `sample_step`'s tokens."""
    op.refuse_marked("sample_step", tokens.cpu(), torch.arange(len(tokens)))


def refusals(
    logits: Tensor | RaggedLogits,
    sums: Tensor,
    row_offsets: Tensor,
    width: int,
    rules: StepRules | None = None,
    backend: str = "auto",
) -> tuple[str, dict[str, str | None]]:
    """What `ofakern.explain` prints of a call of `beam_step`."""
    values = _check("beam_step", logits, _DEFAULT if rules is None else rules)
    _check_beams(_rows(logits), sums, row_offsets, width)
    return op.BACKENDS.reasons(backend, values)


def _plain(backend: str, logits: object, rules: object, *others: object) -> tuple[Any, ...] | None:
    """The op's arguments, `others` last, where the call may go straight to the kernel; else None."""
    if not isinstance(rules, StepRules) or not isinstance(logits, (Tensor, RaggedLogits)):
        return None
    if not isinstance(rules.tables, (AutomatonTables, NoneType)) or (isinstance(logits, Tensor) and logits.ndim != 2):
        return None
    step = op.step_arguments(logits, rules)
    return (*step, *others) if straight(backend, *step[: -op.NUMBERS], *others) else None


def _rows(logits: Tensor | RaggedLogits) -> int:
    return logits.shape[0] if isinstance(logits, Tensor) else logits.first.shape[0] - 1


def _check(where: str, logits: Tensor | RaggedLogits, rules: StepRules) -> Tensor:
    """The tensor of logits, when they and the rules fit each other."""
    values = _check_logits(where, logits)
    if not isinstance(rules, StepRules):
        raise OfakernTypeError(f"{where}: rules must be StepRules, got {type(rules).__name__}")
    rows = _rows(logits)
    for name, dtype in _PER_ROW.items():
        tensor = getattr(rules, name)
        if tensor is not None:
            _check_tensor(where, name, tensor, dtype, [rows])
    if rules.history is not None:
        _check_tensor(where, "history", rules.history, torch.int32, [rows, None])
    for name in ("ngram", "repetition_penalty"):
        if getattr(rules, name) is not None and rules.history is None:
            raise OfakernValueError(f"{where}: history must be given where {name} is, got None")
    _check_adjustments(where, rules, rows)
    if (rules.states is None) != (rules.tables is None):
        missing = "states" if rules.states is None else "tables"
        raise OfakernValueError(f"{where}: states and tables must come together, got no {missing}")
    if rules.tables is not None:
        _check_tables(where, rules.tables)
        if not isinstance(logits, Tensor):
            raise OfakernValueError(f"{where}: states must be None for ragged logits, got an automaton's")
    return values


def _check_logits(where: str, logits: Tensor | RaggedLogits) -> Tensor:
    if isinstance(logits, RaggedLogits):
        _check_tensor(where, "first", logits.first, torch.int32, [None])
        _check_tensor(where, "tokens", logits.tokens, torch.int32, [None])
        _check_tensor(where, "values", logits.values, _FLOATS, [logits.tokens.shape[0]])
        if logits.first.shape[0] < 1:
            raise OfakernValueError(f"{where}: first must have shape [R+1], got [0]")
        if not 0 <= logits.vocabulary < 2**31:
            raise OfakernValueError(f"{where}: vocabulary must be in [0, 2**31), got {logits.vocabulary}")
        return logits.values
    if not isinstance(logits, Tensor):
        raise OfakernTypeError(f"{where}: logits must be a tensor or RaggedLogits, got {type(logits).__name__}")
    _check_tensor(where, "logits", logits, _FLOATS, [None, None])
    return logits


def _check_beams(rows: int, sums: Tensor, row_offsets: Tensor, width: int) -> None:
    _check_tensor("beam_step", "sums", sums, torch.float32, [rows])
    _check_tensor("beam_step", "row_offsets", row_offsets, torch.int32, [None])
    if row_offsets.shape[0] < 1:
        raise OfakernValueError("beam_step: row_offsets must have shape [B+1], got [0]")
    if isinstance(width, bool) or not isinstance(width, int):
        raise OfakernTypeError(f"beam_step: width must be an integer, got {type(width).__name__}")
    if not 1 <= width <= 65536:
        raise OfakernValueError(f"beam_step: width must be in 1..65536, got {width}")


def _check_adjustments(where: str, rules: StepRules, rows: int) -> None:
    given = [name for name in _ADJUST if getattr(rules, name) is not None]
    if not given:
        return
    if len(given) < len(_ADJUST):
        raise OfakernValueError(f"{where}: {', '.join(_ADJUST)} must come together, got only {', '.join(given)}")
    _check_tensor(where, "adjust_first", rules.adjust_first, torch.int32, [rows + 1])
    _check_tensor(where, "adjust_tokens", rules.adjust_tokens, torch.int32, [None])
    entries = rules.adjust_tokens.shape[0] if rules.adjust_tokens is not None else 0
    _check_tensor(where, "adjust_values", rules.adjust_values, torch.float32, [entries])


def _check_tables(where: str, tables: AutomatonTables) -> None:
    if not isinstance(tables, AutomatonTables):
        raise OfakernTypeError(f"{where}: tables must be AutomatonTables, got {type(tables).__name__}")
    for name, dtype in _TABLES.items():
        _check_tensor(where, f"tables.{name}", getattr(tables, name), dtype, [None])
    _check_tensor(where, "tables.ranges", tables.ranges, torch.int32, [None, 3])
    states = tables.renormalise.shape[0]
    for name, size in (("free", states), ("first", states + 1), ("range_first", states + 1)):
        _check_tensor(where, f"tables.{name}", getattr(tables, name), _TABLES[name], [size])


def _check_tensor(
    where: str, name: str, tensor: object, dtype: torch.dtype | tuple[torch.dtype, ...], shape: list[int | None]
) -> None:
    if not isinstance(tensor, Tensor):
        raise OfakernTypeError(f"{where}: {name} must be a tensor, got {type(tensor).__name__}")
    allowed = dtype if isinstance(dtype, tuple) else (dtype,)
    if tensor.dtype not in allowed:
        names = " or ".join(str(each).removeprefix("torch.") for each in allowed)
        raise OfakernTypeError(f"{where}: {name} must be {names}, got {tensor.dtype}")
    fits = tensor.ndim == len(shape) and all(
        want is None or want == have for want, have in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("*" if size is None else str(size) for size in shape)
        raise OfakernValueError(f"{where}: {name} must have shape [{wanted}], got {list(tensor.shape)}")
