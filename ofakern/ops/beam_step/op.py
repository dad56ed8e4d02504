"""The registered ops `ofakern::beam_step_fwd` and `ofakern::sample_step_fwd`: plain tensors in, plain tensors out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ofakern.errors import OfakernValueError
from ofakern.ops import native
from ofakern.ops.beam_step import kernel_cuda
from ofakern.ops.beam_step.rules import InvalidLogitsError, RaggedLogits, StepRules
from ofakern.ops.library import define, ops_of
from ofakern.ops.selection import Backends

BACKENDS = Backends("beam_step", "beam_step_forward", cuda="beam_step")

#: The rules' tensors in the order of the schema, after the logits; the automaton's follow, then the vocabulary ids.
RULES = (
    "temperature",
    "live",
    "forced",
    "no_eos",
    "repetition_penalty",
    "history",
    "counted_from",
    "ngram",
    "unk_penalty",
    "adjust_first",
    "adjust_tokens",
    "adjust_values",
    "states",
)
TABLES = ("first", "tokens", "range_first", "ranges", "renormalise", "free")
_TENSORS = ("logits", "first", "tokens", *RULES, *(f"table_{name}" for name in TABLES))
NUMBERS = 4  # the vocabulary and the three ids, after the tensors
_STEP = ", ".join(
    [
        "Tensor logits, Tensor? first, Tensor? tokens",
        *(f"Tensor? {name}" for name in _TENSORS[3:]),
        "int vocabulary, int pad, int eos, int unk",
    ]
)


def step_arguments(logits: Tensor | RaggedLogits, rules: StepRules) -> tuple[Any, ...]:
    """What both ops begin with, in the order of the schema."""
    if isinstance(logits, Tensor):
        values: tuple[Any, ...] = (logits, None, None)
        vocabulary = logits.shape[1]
    else:
        values, vocabulary = (logits.values, logits.first, logits.tokens), logits.vocabulary
    tables = rules.tables
    return (
        *values,
        *(getattr(rules, name) for name in RULES),
        *(None if tables is None else getattr(tables, name) for name in TABLES),
        vocabulary,
        rules.pad,
        rules.eos,
        rules.unk,
    )


def _refuse_invalid(where: str, status: int) -> None:
    """`status`: -1, or kRowFaults * the first row at fault + its RowFault (csrc/ops/beam_step/beam_step.h)."""
    if status < 0:
        return
    row, fault = divmod(status, 4)
    if fault == 2:
        raise OfakernValueError(f"{where}: states must be states of the tables or -1, got another in row {row}")
    raise InvalidLogitsError(where, ("logits", "sums")[fault], row)


def refuse_marked(where: str, tokens: Tensor, rows: Tensor) -> None:
    """Raises for the first row whose token says that it is at fault (-2 - RowFault), as a GPU's results have it."""
    marked = (tokens < -1).nonzero()[:, 0]
    if not len(marked):
        return
    first = marked[rows[marked].argmin()]
    fault = -2 - int(tokens[first])
    if fault == 3:
        raise OfakernValueError(f"{where}: row_offsets must ascend, got others")
    _refuse_invalid(where, 4 * int(rows[first]) + fault)


def _beam_cpu(*arguments: Any) -> Any:
    results, status = native.kernels.beam_step(*arguments, torch.get_num_threads())
    _refuse_invalid("beam_step", status)
    return results


def _beam_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sums, row_offsets, width = arguments[-3:]
    shape = (row_offsets.shape[0] - 1, width)
    return (
        sums.new_empty(shape),
        sums.new_empty(shape, dtype=torch.int32),
        sums.new_empty(shape, dtype=torch.int32),
        sums.new_empty(shape),
    )


def _sample_cpu(*arguments: Any) -> Any:
    results, status = native.kernels.sample_step(*arguments, torch.get_num_threads())
    _refuse_invalid("sample_step", status)
    return results


def _sample_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    uniforms = arguments[-_FILTERS]
    return uniforms.new_empty(uniforms.shape, dtype=torch.int32), uniforms.new_empty(uniforms.shape)


_FILTERS = 5  # uniforms and the four filters

define(
    "beam_step_fwd",
    f"({_STEP}, Tensor sums, Tensor row_offsets, int width) -> (Tensor, Tensor, Tensor, Tensor)",
    cpu=_beam_cpu,
    cuda=kernel_cuda.beam,
    fake=_beam_fake,
)
define(
    "sample_step_fwd",
    f"({_STEP}, Tensor uniforms, Tensor? top_k, Tensor? top_p, Tensor? typical_p, Tensor? min_p) -> (Tensor, Tensor)",
    cpu=_sample_cpu,
    cuda=kernel_cuda.sample,
    fake=_sample_fake,
)
BEAM = ops_of("beam_step_fwd")  # `step_arguments`, then sums, row_offsets, width
SAMPLE = ops_of("sample_step_fwd")  # `step_arguments`, then uniforms, top_k, top_p, typical_p, min_p
