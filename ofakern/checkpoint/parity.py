"""Recomputes recorded cases with our model and compares every recorded quantity."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ofakern.checkpoint.golden_case import Case, Slot
from ofakern.data.batch import PackedBatch
from ofakern.instruction.modality import Modality
from ofakern.modality.audio.adaptor import AudioFrameAdaptor
from ofakern.modality.audio.criterion import speech_loss
from ofakern.modality.motion.adaptor import MotionAdaptor
from ofakern.modality.motion.diffusion import diffusion_distance, per_motion_mean
from ofakern.model import Memory, OFAPlus
from ofakern.model.adaptors import AdaptorGroup
from ofakern.nn.loss import LossSums, label_smoothed_cross_entropy

TOLERANCE = 1e-4
# Gradients inside the vision backbone: the recording's own float32 rounding is up to 2.6e-4 there (against float64,
# measured on these cases: many ReLU and pooling switches in a row), so 1e-4 cannot be asked of anyone.
BACKBONE_TOLERANCE = 1e-3
# Key biases move all scores of a query alike: their gradient is exactly 0, and the recording holds rounding noise.
ZERO_GRADIENTS = (".k_proj.bias", "pos_k_linear.bias")


@dataclass(frozen=True)
class Check:
    """One compared quantity. rel_l2: |ours - recorded| / |recorded|; max_rel: largest error / largest value."""

    group: str
    name: str
    count: int
    rel_l2: float
    max_rel: float
    max_abs: float
    floor: float = 0.0
    tolerance: float = TOLERANCE

    @property
    def passed(self) -> bool:
        close = self.rel_l2 <= self.tolerance and self.max_rel <= self.tolerance
        return close or self.max_abs <= self.floor


@dataclass
class CaseResult:
    """A case's checks, or why it could not run."""

    name: str
    checks: list[Check] = field(default_factory=list)
    unavailable: str | None = None

    @property
    def passed(self) -> bool:
        return bool(self.checks) and all(check.passed for check in self.checks)

    def groups(self) -> dict[str, list[Check]]:
        groups: dict[str, list[Check]] = {}
        for check in self.checks:
            groups.setdefault(check.group, []).append(check)
        return groups


@dataclass
class Trace:
    """What one forward pass produced, in packed rows: per side the adaptor outputs and the layers' states."""

    embed: Tensor | None = None
    positions: Tensor | None = None
    states: list[Tensor] = field(default_factory=list)


def run_case(model: OFAPlus, case: Case) -> CaseResult:
    """All checks of a case."""
    result = CaseResult(case.name, unavailable=case.unavailable)
    if case.unavailable is not None:
        return result
    everyone = range(case.samples)
    batch = case.batch(everyone)
    model.zero_grad(set_to_none=True)
    with traced(model) as traces:
        memory = model.encode(batch.source)
        hidden, attention = model.decode_with_attention(batch.target, memory)
    add = result.checks.append
    for source, trace in ((True, traces[0]), (False, traces[1])):
        for check in _adaptor_checks(model, case, batch, source, trace):
            add(check)
        for check in _state_checks(case, source, trace):
            add(check)
    for key, value, source in (
        ("encoder.out", memory.states, True),
        ("decoder.last_hidden_state", hidden, False),
        *((key, value, False) for key, value in outputs(model, case, hidden, case.samples).items()),
    ):
        group = _output_name(case) if key == "decoder.output" else key.split(".")[0]
        for check in _packed_check(case, group, key, value, everyone, source):
            add(check)
    result.checks += _attention_checks(case, attention)
    result.checks += _loss_and_gradient_checks(model, case, batch, hidden)
    result.checks += _order_checks(model, case)
    return result


def outputs(model: OFAPlus, case: Case, hidden: Tensor, samples: int) -> dict[str, Tensor]:
    """The recorded results of the decoder's states by their keys: logits, frames of a motion, or frames of sound and
    the stop signal."""
    adaptor = model.decoder.adaptor.adaptors[case.target.adaptor]
    if isinstance(adaptor, MotionAdaptor):
        return {"decoder.output": adaptor.output(hidden, case.target.values.shape[2])}
    if not case.target.written:
        return {"decoder.output": model.logits(hidden)}
    speech = _writer(model, case).outputs(hidden, [case.target.padded] * samples)
    return {
        "decoder.output": speech.post,
        "decoder.feature_out": speech.feature,
        "decoder.eos_out": speech.stop[:, None],
    }


def _output_name(case: Case) -> str:
    return "frames" if case.target.modality is Modality.MOTION else "logits"


def _writer(model: OFAPlus, case: Case) -> AudioFrameAdaptor:
    adaptor = model.decoder.adaptor.adaptors[case.target.adaptor]
    assert isinstance(adaptor, AudioFrameAdaptor)
    return adaptor


def compare(
    group: str,
    name: str,
    ours: Tensor | np.ndarray,
    recorded: np.ndarray,
    floor: float = 0.0,
    tolerance: float = TOLERANCE,
) -> Check:
    """Compares in float64; a NaN never passes."""
    a = np.asarray(ours.detach().cpu().double() if isinstance(ours, Tensor) else ours, dtype=np.float64)
    b = np.asarray(recorded, dtype=np.float64)
    if a.shape != b.shape:
        return Check(group, f"{name} (shape {a.shape}, recorded {b.shape})", b.size, np.inf, np.inf, np.inf)
    if b.size == 0:
        return Check(group, name, 0, 0.0, 0.0, 0.0)
    difference = np.abs(a - b)
    tiny = np.finfo(np.float64).tiny
    rel_l2 = float(np.linalg.norm(difference) / max(float(np.linalg.norm(b)), tiny))
    largest = float(difference.max())
    max_rel = largest / max(float(np.abs(b).max()), tiny)
    return Check(group, name, b.size, rel_l2, max_rel, largest, floor, tolerance)


@contextmanager
def traced(model: OFAPlus) -> Iterator[tuple[Trace, Trace]]:
    """Records adaptor outputs and layer states of the forward passes inside."""
    traces = Trace(), Trace()
    handles = []
    stacks: tuple[nn.Module, nn.Module] = (model.encoder, model.decoder)
    for trace, stack in zip(traces, stacks, strict=True):
        handles.append(stack.get_submodule("adaptor").register_forward_hook(_adaptor_hook(trace)))
        layers = list(stack.get_submodule("layers").children())
        handles.append(layers[0].register_forward_pre_hook(_input_hook(trace)))
        handles += [layer.register_forward_hook(_output_hook(trace)) for layer in layers]
    try:
        yield traces
    finally:
        for handle in handles:
            handle.remove()


def _adaptor_hook(trace: Trace) -> Callable[[nn.Module, Any, Any], None]:
    def hook(module: nn.Module, args: Any, out: tuple[Tensor, Tensor]) -> None:
        trace.embed, trace.positions = out

    return hook


def _input_hook(trace: Trace) -> Callable[[nn.Module, Any], None]:
    def hook(module: nn.Module, args: Any) -> None:
        trace.states.append(args[0])

    return hook


def _output_hook(trace: Trace) -> Callable[[nn.Module, Any, Tensor], None]:
    def hook(module: nn.Module, args: Any, out: Tensor) -> None:
        trace.states.append(out)

    return hook


def _adaptor_checks(model: OFAPlus, case: Case, batch: PackedBatch, source: bool, trace: Trace) -> Iterator[Check]:
    side = "encoder" if source else "decoder"
    assert trace.embed is not None and trace.positions is not None
    for name, value in (("embed", trace.embed), ("pos_embed", trace.positions)):
        yield from _packed_check(case, "adaptors", f"{side}.concat.{name}", value, range(case.samples), source)
        for prefix, slot in case.calls(source):
            key = f"{prefix}.{name}"
            if key in case.arrays:
                rows = [case.slot_rows(slot, source, b) for b in range(case.samples)]
                recorded = [case.arrays[key][b, : slot.kept(b)] for b in range(case.samples)]
                yield compare("adaptors", key, torch.cat([value[r] for r in rows]), np.concatenate(recorded))
    group = model.encoder.adaptor if source else model.decoder.adaptor
    yield from _bias_checks(model, case, batch, source, group, trace.positions)


def _bias_checks(
    model: OFAPlus, case: Case, batch: PackedBatch, source: bool, group: AdaptorGroup, positions: Tensor
) -> Iterator[Check]:
    """The dense bias that coordinates, tables and factored positions stand for, against the recorded matrices."""
    side = batch.source if source else batch.target
    plan = group.plan(side)
    tables = group.tables(plan.blocks, plan.second_blocks)
    q_pos, k_pos = group.factored(positions)
    stack = model.encoder if source else model.decoder
    scale = float(stack.get_submodule("layers.0.self_attn").scale)  # type: ignore[arg-type]
    prefix = "encoder" if source else "decoder"
    owner, position = case.rows(range(case.samples), source)
    everything = source or not group.adaptors[case.target.adaptor].ordered
    for layer, layer_tables in enumerate(tables):
        relative = RelativeBias(plan.layout, layer_tables)
        for key, slot in case.calls(source):
            name = f"{key}.self_attn_bias.{layer}"
            if name in case.arrays:
                yield _slot_bias_check(case, name, slot, source, relative, everything)
        name = f"{prefix}.concat.self_attn_bias.{layer}"
        if name not in case.arrays:
            continue
        ours, recorded = [], []
        for b in range(case.samples):
            rows = np.flatnonzero(owner == b)
            at = position[rows]
            bias = relative.dense(slice(int(rows[0]), int(rows[-1]) + 1))
            if q_pos is not None and k_pos is not None:
                bias = bias + scale * torch.einsum("ihp,jhp->hij", q_pos[rows], k_pos[rows])
            seen = _seen(len(rows), everything)
            ours.append(bias[:, seen].flatten())
            recorded.append(case.arrays[name][b][:, at[:, None], at[None, :]][:, seen].ravel())
        yield compare("adaptors", name, torch.cat(ours), np.concatenate(recorded))


class RelativeBias:
    """The relative term of a layer as a dense matrix, for comparison only."""

    def __init__(self, layout: Any, tables: tuple[Tensor, ...]) -> None:
        self.terms = list(zip(layout.terms, tables, strict=True))

    def dense(self, rows: slice) -> Tensor:
        """`[H, n, n]` between the tokens of a run of packed rows; 0 outside a term's own interval."""
        total = torch.zeros(())
        count = rows.stop - rows.start
        for term, table in self.terms:
            key = torch.arange(rows.start, rows.stop)
            same = term.same[rows]
            inside = (same[:, :1] <= key) & (key < same[:, 1:])
            difference = term.q_coord[rows].long()[:, None] - term.k_coord[rows].long()[None, :]
            index = difference.where(inside, 0).clamp(0, table.shape[1] - 1)
            total = total + table[:, index.flatten()].view(-1, count, count).where(inside, 0.0)
        return total if total.dim() else torch.zeros(1, count, count)


def _slot_bias_check(
    case: Case, name: str, slot: Slot, source: bool, relative: RelativeBias, everything: bool
) -> Check:
    ours, recorded = [], []
    for b in range(case.samples):
        array = case.arrays[name]
        kept = slot.kept(b)
        seen = _seen(kept, everything)
        ours.append(relative.dense(case.slot_rows(slot, source, b))[:, seen].flatten())
        recorded.append(array[b % array.shape[0]][:, :kept, :kept][:, seen].ravel())
    return compare("adaptors", name, torch.cat(ours), np.concatenate(recorded))


def _seen(count: int, everything: bool) -> np.ndarray:
    """Pairs whose bias can matter: all, or the causal half of a target that is written in order."""
    pairs = np.ones((count, count), dtype=bool)
    return pairs if everything else np.tril(pairs)


def _state_checks(case: Case, source: bool, trace: Trace) -> Iterator[Check]:
    side = "encoder" if source else "decoder"
    for number, state in enumerate(trace.states):
        yield from _packed_check(case, side, f"{side}.state.{number}", state, range(case.samples), source)


def _attention_checks(case: Case, attention: list[Tensor]) -> list[Check]:
    """The last cross attention, mean over the heads: what each target token gives to each source token."""
    key = "decoder.attn_avg_last_layer"
    if key not in case.arrays:
        return []
    recorded = case.arrays[key]
    if case.target.written:  # there the recording has the source first
        recorded = recorded.transpose(0, 2, 1)
    sides = [case.rows(range(case.samples), source) for source in (False, True)]
    expected = []
    for b in range(case.samples):
        rows, columns = (position[owner == b] for owner, position in sides)
        expected.append(recorded[b][rows[:, None], columns].ravel())
    ours = torch.cat([one.flatten() for one in attention])
    return [compare("cross attention", key, ours, np.concatenate(expected))]


def _packed_check(
    case: Case, group: str, key: str, value: Tensor, samples: Sequence[int], source: bool, label: str = ""
) -> Iterator[Check]:
    """A packed result `[N, ...]` against a padded recording (`[B, T, ...]`, or `[T, B, ...]` for layer states)."""
    if key not in case.arrays:
        return
    owner, position = case.rows(samples, source)
    time_first = ".state." in key or key == "encoder.out"
    recorded = case.arrays[key][position, owner] if time_first else case.arrays[key][owner, position]
    yield compare(group, label or key, value, recorded)


def _loss_and_gradient_checks(model: OFAPlus, case: Case, batch: PackedBatch, hidden: Tensor) -> list[Check]:
    meta = case.meta
    if "loss" not in meta:
        return []
    sums, scalars = _loss(model, case, batch, hidden)
    told = {**(meta.get("loss_parts") or {}), **meta}
    checks = [compare("loss", k, v.detach(), np.array(told[k])) for k, v in scalars.items() if k in told]
    norms: dict[str, float] = meta.get("grad_norms") or {}
    recorded = {key.removeprefix("grad."): key for key in case.arrays if key.startswith("grad.")}
    if not norms and not recorded:
        return checks
    (sums.loss / float(sums.tokens)).backward()  # type: ignore[no-untyped-call]
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    noise = 1e-7 * max([*norms.values(), *(float(np.abs(case.arrays[k]).max()) for k in recorded.values())])
    for name, key in recorded.items():
        ours = gradients.get(name)
        value = np.zeros_like(case.arrays[key]) if ours is None else ours
        checks.append(gradient_check("gradients", name, value, case.arrays[key], noise))
    checks += _norm_checks(norms, gradients, noise)
    model.zero_grad(set_to_none=True)
    return checks


def _loss(model: OFAPlus, case: Case, batch: PackedBatch, hidden: Tensor) -> tuple[LossSums, dict[str, Tensor]]:
    """The case's loss, and what the recording has of it by name."""
    if case.target.modality is Modality.MOTION:
        return _motion_loss(model, case, hidden)
    if batch.frames is not None:
        speech = _writer(model, case).outputs(hidden, [case.target.padded] * case.samples)
        sums = speech_loss(speech, batch.frames, batch.labels)
        means = {"l1_loss": "l1", "mse_loss": "mse", "eos_loss": "stop"}
        found = {name: sums.parts[ours] / sums.tokens for name, ours in means.items()}
        return sums, {**found, "loss": sums.loss / sums.tokens, "ntokens": sums.tokens}
    epsilon = float(case.meta.get("label_smoothing", 0.0))
    sums = label_smoothed_cross_entropy(hidden, model.output_weight, batch.labels, epsilon, batch.allowed)
    scalars = {"loss": sums.loss, "nll_loss": sums.nll, "sample_size": sums.tokens}
    return sums, scalars if batch.allowed is not None else {**scalars, "cross_entropy_sum": sums.nll}


def _motion_loss(model: OFAPlus, case: Case, hidden: Tensor) -> tuple[LossSums, dict[str, Tensor]]:
    """Per sample the mean distance of the frames, predicted from a noised motion, to the clean ones."""
    owner, position = case.rows(range(case.samples), source=False)
    clean = torch.from_numpy(case.arrays["diffusion_input.slot0.MOTION.value_0"][owner, position])
    predicted = outputs(model, case, hidden, case.samples)["decoder.output"]
    distance = diffusion_distance(predicted, clean, torch.ones(clean.shape[0]))
    loss = per_motion_mean(distance, [case.target.kept(b) for b in range(case.samples)]).mean()
    return LossSums(loss, loss.detach(), torch.ones(())), {"loss": loss}


def gradient_check(group: str, name: str, ours: Tensor | np.ndarray, recorded: np.ndarray, noise: float) -> Check:
    backbone = ".embed_images." in name
    floor = noise if name.endswith(ZERO_GRADIENTS) else 0.0
    tolerance = BACKBONE_TOLERANCE if backbone else TOLERANCE
    return compare(f"backbone {group}" if backbone else group, name, ours, recorded, floor, tolerance)


def gradient_norm_checks(norms: dict[str, float], gradients: dict[str, Tensor]) -> list[Check]:
    """Every recorded gradient norm, and that no parameter has a gradient the recording does not know."""
    return _norm_checks(norms, gradients, 1e-7 * max(norms.values(), default=0.0))


def _norm_checks(norms: dict[str, float], gradients: dict[str, Tensor], noise: float) -> list[Check]:
    """Every recorded gradient norm, and that no parameter has a gradient the recording does not know."""
    if not norms:
        return []
    checks = []
    for name in sorted(set(norms) | set(gradients)):
        ours = gradients[name].double().norm() if name in gradients else torch.zeros(())
        checks.append(gradient_check("gradient norms", name, ours, np.array(norms.get(name, 0.0)), noise))
    return checks


@torch.no_grad()
def _order_checks(model: OFAPlus, case: Case) -> list[Check]:
    """The same numbers in another order of the batch, for each sample alone, and one step at a time."""
    checks: list[Check] = []
    orders = {f"alone {b}": [b] for b in range(case.samples)}
    if case.samples > 1:
        orders["reversed"] = list(reversed(range(case.samples)))
    for label, samples in orders.items():
        batch = case.batch(samples)
        memory = model.encode(batch.source)
        hidden = model.decode(batch.target, memory)
        group = "any order"
        checks += _packed_check(case, group, "encoder.out", memory.states, samples, True, f"encoder.out, {label}")
        for key, value in outputs(model, case, hidden, len(samples)).items():
            name = _output_name(case) if key == "decoder.output" else key
            checks += _packed_check(case, group, key, value, samples, False, f"{name}, {label}")
    if (case.target.values.ndim == 2 or case.target.written) and "decoder.output" in case.arrays:
        checks.append(_incremental_check(model, case))
    return checks


def _incremental_check(model: OFAPlus, case: Case) -> Check:
    samples = range(case.samples)
    memory = model.encode(case.batch(samples).source)
    if case.target.written:
        return _incremental_frames_check(model, case, memory)
    tokens = torch.from_numpy(case.target.values)
    longest = max(case.target.kept(b) for b in samples)
    state = model.begin_decode(memory, 1, longest, modality=int(case.target.modality), adaptor=case.target.adaptor)
    steps = torch.stack([model.decode_step(state, tokens[:, t]) for t in range(longest)], dim=1)
    owner, position = case.rows(samples, source=False)
    return compare("incremental", "logits", steps[owner, position], case.arrays["decoder.output"][owner, position])


def _incremental_frames_check(model: OFAPlus, case: Case, memory: Memory) -> Check:
    """Up to each sample's own last frame: the recording's padding is no key of a later step."""
    values = torch.from_numpy(case.target.values)
    longest = max(case.target.frames)
    state = model.begin_decode(memory, 1, longest, modality=int(case.target.modality), adaptor=case.target.adaptor)
    writer = _writer(model, case)
    steps = torch.stack([writer.frames(state.step(values[:, t]))[0] for t in range(longest)], dim=1)
    owner = np.repeat(np.arange(case.samples), case.target.frames)
    position = np.concatenate([np.arange(n) for n in case.target.frames])
    recorded = case.arrays["decoder.feature_out"][owner, position]
    return compare("incremental", "frames", steps[owner, position], recorded)
