"""The registered ops `ofakern::beam_step_fwd` and `ofakern::sample_step_fwd`: plain tensors in, plain tensors out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ofakern.errors import OfakernValueError
from ofakern.ops import native
from ofakern.ops.beam_step.rules import InvalidLogitsError, RaggedLogits, StepRules
from ofakern.ops.library import define, kernel_ready
from ofakern.ops.selection import Backends

BACKENDS = Backends("beam_step", "beam_step")

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
_STRIDED = ("logits", "history")  # rows may lie apart: a part of a larger buffer is not copied
_TENSORS = ("logits", "first", "tokens", *RULES, *(f"table_{name}" for name in TABLES))
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


def _ready(step: tuple[Any, ...]) -> list[Any]:
    """Every tensor as the kernels take it: contiguous, or only its rows where the kernels know a row stride."""
    ready = list(step)
    for place, name in enumerate(_TENSORS):
        tensor = step[place]
        if tensor is None:
            continue
        rows_only = name in _STRIDED and tensor.ndim == 2 and tensor.stride(1) == 1
        ready[place] = tensor.resolve_neg() if rows_only else kernel_ready(tensor)
    return ready


def _refuse_invalid(where: str, status: int) -> None:
    """`status`: -1, or kRowFaults * the first row at fault + its RowFault (csrc/ops/beam_step/beam_step.h)."""
    if status < 0:
        return
    row, fault = divmod(status, 4)
    if fault == 2:
        raise OfakernValueError(f"{where}: states must be states of the tables or -1, got another in row {row}")
    raise InvalidLogitsError(where, ("logits", "sums")[fault], row)


def _beam_cpu(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *step, sums, row_offsets, width = arguments
    module, threads = _module(), torch.get_num_threads()
    ready = [*_ready(tuple(step)), kernel_ready(sums), kernel_ready(row_offsets)]
    out = _beam_fake(*arguments)
    workspace = torch.empty(module.beam_step_workspace(*ready, width, threads), dtype=torch.uint8)
    _refuse_invalid("beam_step", module.beam_step(*out, workspace, *ready, threads))
    return out


def _beam_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sums, row_offsets, width = arguments[-3:]
    shape = (row_offsets.shape[0] - 1, width)
    return (
        sums.new_empty(shape),
        sums.new_empty(shape, dtype=torch.int32),
        sums.new_empty(shape, dtype=torch.int32),
        sums.new_empty(shape),
    )


def _sample_cpu(*arguments: Any) -> tuple[Tensor, Tensor]:
    step, filters = arguments[:-_FILTERS], arguments[-_FILTERS:]
    module, threads = _module(), torch.get_num_threads()
    ready = [*_ready(step), *(None if x is None else kernel_ready(x) for x in filters)]
    out = _sample_fake(*arguments)
    workspace = torch.empty(module.sample_step_workspace(*ready, threads), dtype=torch.uint8)
    _refuse_invalid("sample_step", module.sample_step(*out, workspace, *ready, threads))
    return out


def _sample_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    uniforms = arguments[-_FILTERS]
    return uniforms.new_empty(uniforms.shape, dtype=torch.int32), uniforms.new_empty(uniforms.shape)


def _module() -> Any:
    return native.cpu


_FILTERS = 5  # uniforms and the four filters

_BEAM = define(
    "beam_step_fwd",
    f"({_STEP}, Tensor sums, Tensor row_offsets, int width) -> (Tensor, Tensor, Tensor, Tensor)",
    cpu=_beam_cpu,
    fake=_beam_fake,
)
_SAMPLE = define(
    "sample_step_fwd",
    f"({_STEP}, Tensor uniforms, Tensor? top_k, Tensor? top_p, Tensor? typical_p, Tensor? min_p) -> (Tensor, Tensor)",
    cpu=_sample_cpu,
    fake=_sample_fake,
)


def beam_step(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op: `step_arguments`, then sums, row_offsets, width."""
    result: tuple[Tensor, Tensor, Tensor, Tensor] = _BEAM(*arguments)
    return result


def sample_step(*arguments: Any) -> tuple[Tensor, Tensor]:
    """The op: `step_arguments`, then uniforms, top_k, top_p, typical_p, min_p."""
    result: tuple[Tensor, Tensor] = _SAMPLE(*arguments)
    return result
