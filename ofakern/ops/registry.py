"""The static table of ops and their backends: what can run here, and why the rest cannot."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from ofakern.errors import OfakernValueError
from ofakern.ops.attention import api as attention_api
from ofakern.ops.attention.backends import BACKENDS as ATTENTION_BACKENDS
from ofakern.ops.beam_step import api as beam_step_api
from ofakern.ops.beam_step import op as beam_step_op
from ofakern.ops.cross_entropy import api as cross_entropy_api
from ofakern.ops.cross_entropy import backends as cross_entropy_backends
from ofakern.ops.decode_attention import api as decode_attention_api
from ofakern.ops.decode_attention import op as decode_attention_op
from ofakern.ops.decode_layers import api as decode_layers_api
from ofakern.ops.decode_layers import op as decode_layers_op
from ofakern.ops.decode_linear import api as decode_linear_api
from ofakern.ops.decode_linear import op as decode_linear_op
from ofakern.ops.gathered_linear import api as gathered_linear_api
from ofakern.ops.gathered_linear import op as gathered_linear_op
from ofakern.ops.layer_norm import api as layer_norm_api
from ofakern.ops.linear import api as linear_api
from ofakern.ops.log_mel import api as log_mel_api
from ofakern.ops.patch_embed import api as patch_embed_api
from ofakern.ops.patch_embed import op as patch_embed_op
from ofakern.ops.rms_norm import api as rms_norm_api
from ofakern.ops.rotation_6d import api as rotation_6d_api
from ofakern.ops.routed_ffn import api as routed_ffn_api
from ofakern.ops.routed_ffn import backends as routed_ffn_backends


class _Op(NamedTuple):
    unavailable: dict[str, str | None]
    refusals: Callable[..., tuple[str, dict[str, str | None]]]


_OPS: dict[str, _Op] = {
    "attention": _Op(ATTENTION_BACKENDS.unavailable, attention_api.refusals),
    "beam_step": _Op(beam_step_op.BACKENDS.unavailable, beam_step_api.refusals),
    "cross_entropy": _Op(cross_entropy_backends.BACKENDS.unavailable, cross_entropy_api.refusals),
    "decode_attention": _Op(decode_attention_op.BACKENDS.unavailable, decode_attention_api.refusals),
    "decode_layers": _Op(decode_layers_op.BACKENDS.unavailable, decode_layers_api.refusals),
    "decode_linear": _Op(decode_linear_op.BACKENDS.unavailable, decode_linear_api.refusals),
    "gathered_linear": _Op(gathered_linear_op.BACKENDS.unavailable, gathered_linear_api.refusals),
    "linear": _Op(linear_api.BACKENDS.unavailable, linear_api.refusals),
    "log_mel": _Op(log_mel_api.BACKENDS.unavailable, log_mel_api.refusals),
    "patch_embed": _Op(patch_embed_op.BACKENDS.unavailable, patch_embed_api.refusals),
    **{
        name: _Op(backends.unavailable, layer_norm_api.refusals(name))
        for name, backends in layer_norm_api.BACKENDS.items()
    },
    "rms_norm": _Op(rms_norm_api.BACKENDS.unavailable, rms_norm_api.refusals),
    "rotation_6d": _Op(rotation_6d_api.BACKENDS.unavailable, rotation_6d_api.refusals),
    "routed_ffn": _Op(routed_ffn_backends.BACKENDS.unavailable, routed_ffn_api.refusals),
}


def ops() -> tuple[str, ...]:
    """The names of all ops."""
    return tuple(_OPS)


def backends(op: str) -> dict[str, str | None]:
    """Each backend of an op: None when it is available, else the reason why not."""
    return dict(_entry("backends", op).unavailable)


def explain(op: str, *args: object, **kwargs: object) -> str:
    """Prints and returns which backend would run `op(*args, **kwargs)`, and why each other would not.

    Raises what the op itself would raise for wrong arguments; a backend that cannot run is told, not raised.
    """
    wanted, reasons = _entry("explain", op).refusals(*args, **kwargs)
    lines = [
        f"{op}: runs on {wanted!r}" if reasons[wanted] is None else f"{op}: {wanted!r} was asked for and cannot run"
    ]
    for name, reason in reasons.items():
        state = reason
        if reason is None:
            state = "chosen" if name == wanted else "can run, not chosen"
            if name in ("cuda", "triton") and name != wanted:
                state += ": 'auto' takes it only where a kept GPU result shows it faster (ofakern/ops/dispatch.py)"
        lines.append(f"  {name:<10} {state}")
    text = "\n".join(lines)
    print(text)
    return text


def _entry(where: str, op: str) -> _Op:
    if op not in _OPS:
        raise OfakernValueError(f"{where}: op must be one of {', '.join(_OPS)}, got {op!r}")
    return _OPS[op]
