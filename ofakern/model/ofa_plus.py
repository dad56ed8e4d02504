"""OFA+: the generalist encoder-decoder on packed batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ofakern.data.batch import PackedBatch, PackedSide
from ofakern.errors import OfakernRuntimeError, OfakernValueError
from ofakern.model.config import OFAConfig
from ofakern.model.decode import DecodeState, SegmentKind, WeightCache
from ofakern.model.initialise import initialise
from ofakern.model.stacks import Decoder, Encoder, Memory
from ofakern.nn.adaptor import FrameAdaptor
from ofakern.nn.attention import Positions, dense_probabilities

# Keys of a state dict that name one tensor: alias -> owner.
TIED_KEYS = {"decoder.adaptor.embed_tokens.weight": "encoder.adaptor.embed_tokens.weight"}


class OFAPlus(nn.Module):
    """The model. State-dict keys are those OFASys writes (without its integer buffers); embeddings are tied.

    config: `OFAConfig`. backend: of every attention, "auto" unless a test or a measurement wants one in particular.
    seed: of the initialisation (None: torch's default generator).
    """

    def __init__(self, config: OFAConfig, backend: str = "auto", seed: int | None = None) -> None:
        super().__init__()
        self.config = config
        embed_tokens = nn.Embedding(config.vocab_size, config.dim)
        self.encoder = Encoder(config, embed_tokens, backend)
        self.decoder = Decoder(config, embed_tokens, backend)
        self._decode_weights = WeightCache()
        initialise(self, config.pad_id, seed, config.init_std)

    @property
    def device(self) -> torch.device:
        return self.encoder.adaptor.embed_tokens.weight.device

    def train(self, mode: bool = True) -> OFAPlus:
        """As every module's; a model in training keeps no packed weights."""
        if mode:
            self._decode_weights.clear()
        return super().train(mode)

    def prepare(self, batch: PackedBatch, share_positions: bool = True) -> PackedBatch:
        """Builds the batch's layouts now, e.g. before it moves to a device, instead of at its first use.

        share_positions: let samples share position embeddings where it pays; False: the layouts' sizes then follow from
        the numbers of tokens alone.
        """
        source = self.encoder.adaptor.plan(batch.source, share_positions)
        self.decoder.adaptor.plan(batch.target, share_positions)
        self.decoder.cross_layout(batch.target, batch.source.lengths_cpu, source.sets)
        return batch

    def encode(self, side: PackedSide) -> Memory:
        """The encoder over a source side of N packed tokens; the result is opaque and serves `decode`, `begin_decode`.

        Raises OfakernValueError when the side has values of an adaptor that the model was built without.
        """
        memory: Memory = self.encoder(side)
        return memory

    def decode(self, side: PackedSide, memory: Memory) -> Tensor:
        """The decoder over a target side (decoder inputs) of the same samples, all tokens at once: `[Nt, D]`."""
        hidden: Tensor = self.decoder(side, memory)
        return hidden

    def decode_with_attention(self, side: PackedSide, memory: Memory) -> tuple[Tensor, list[Tensor]]:
        """`decode`, and per sample what its tokens' last cross attention gives to the source, f32 `[Tt, Ts]`.

        The mean over the heads, dense and with a gradient; everything else runs as in `decode`.
        """
        layer = self.decoder.decoder_layers()[-1].encoder_attn
        seen: list[tuple[Tensor, Positions, Tensor]] = []

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.append((args[0], args[1], kwargs["keys_values"][0]))

        handle = layer.register_forward_pre_hook(note, with_kwargs=True)
        try:
            hidden = self.decode(side, memory)
        finally:
            handle.remove()
        x, positions, keys = seen[0]
        found = dense_probabilities(layer, x, positions, keys, side.lengths_cpu, memory.lengths)
        return hidden, [probabilities.mean(0) for probabilities in found]

    def logits(self, hidden: Tensor) -> Tensor:
        """Text output: `[Nt, D]` to `[Nt, V]`, by the tied embeddings."""
        return F.linear(hidden, self.output_weight)

    @property
    def output_weight(self) -> Tensor:
        """`[V, D]`; with `hidden` what a chunked loss needs instead of `logits`."""
        weight: Tensor = self.decoder.adaptor.embed_tokens.weight
        return weight

    def frame_adaptor(self, name: str) -> FrameAdaptor:
        """The decoder's adaptor that writes frames. OfakernValueError when the model was built without it."""
        adaptors = self.decoder.adaptor.adaptors
        adaptor = adaptors.get(name)
        if not isinstance(adaptor, FrameAdaptor):
            known = sorted(key for key, one in adaptors.items() if isinstance(one, FrameAdaptor))
            raise OfakernValueError(f"OFAPlus: adaptor of frames must be one of {known}, got {name!r}")
        return adaptor

    def forward(self, batch: PackedBatch) -> Tensor:
        """Hidden states `[Nt, D]` of a batch: `decode(target, encode(source))`."""
        return self.decode(batch.target, self.encode(batch.source))

    def quantize(self, kind: str | None) -> OFAPlus:
        """Incremental decoding on rounded weights: kind "int8", or None for the model's own again. Returns the model.

        The decoder's projections and the output's are kept as int8 with one float32 scale per output, a half (float32:
        a quarter) of the bytes that a step reads; products have float32 sums. A weight is off by at most 1/254 of its
        row's largest magnitude m, so an output by at most m / 254 * sum |x| of its inputs x. Everything else (encoder,
        attention, norms, `decode`, the loss) keeps the model's weights, which stay in memory.

        Raises:
            OfakernValueError: another kind.
            OfakernRuntimeError: the model is in training mode; so does `begin_decode` of a quantized model.
            BackendError: no kernel for this device or dtype.
        """
        if kind is not None and self.training:
            raise OfakernRuntimeError("OFAPlus.quantize: model must not be in training mode, got it\nTry: model.eval()")
        self._decode_weights.quantize(kind, self.output_weight)
        return self

    @torch.inference_mode()
    def begin_decode(
        self,
        memory: Memory,
        rows_per_sample: int | Sequence[int],
        max_length: int,
        target_slot: int = 0,
        modality: int = 1,
        adaptor: str = "text",
        cuda_graphs: bool = False,
    ) -> DecodeState:
        """Starts incremental decoding of one segment of tokens: rows_per_sample hypotheses (beams) per sample.

        max_length: the most tokens that will be fed (begin token and prefix included). Rows of a sample stand together.
        modality: of the segment, as in a batch's `modality_id` (models with `modal_ffn` choose their experts by it).
        adaptor: of the segment, "text" or "image_vqgan". The decoder's weights are packed for steps of a few rows at
        the first call in evaluation mode and again when a parameter has changed: a second copy of them in memory.
        cuda_graphs: steps run as CUDA graphs (docs/GPU.md), on a GPU and by our CUDA kernels: OfakernValueError on
        other devices, BackendError where there are none. `state.graph_use` tells which steps went without.
        """
        if self.training and self._decode_weights.kind is not None:
            raise OfakernRuntimeError(
                "OFAPlus.begin_decode: a quantized model must not be in training mode, got it\n"
                "Try: model.eval(), or quantize(None)"
            )
        weights = self._decode_weights.of(self.decoder, self.output_weight, keep=not self.training)
        kind = SegmentKind(adaptor, modality, target_slot, max_length)
        return DecodeState(self.decoder, weights, memory, rows_per_sample, kind, cuda_graphs)

    def decode_hidden(self, state: DecodeState, tokens: Tensor) -> Tensor:
        """Feeds one token per row, int64 `[rows]`; returns the decoder's output `[rows, D]`."""
        return state.step(tokens)

    @torch.inference_mode()
    def step_logits(self, state: DecodeState, hidden: Tensor, ids: tuple[int, int] | None = None) -> Tensor:
        """`logits` of a step's `[rows, D]` by the state's weights: `[rows, V]`, or those of the ids in a range only.

        ids: (lo, hi), hi not included: `[rows, hi - lo]`. A range's weights are a copy, of which the last few are kept.
        """
        if ids is None:
            return state.weights.output(hidden)
        if not 0 <= ids[0] < ids[1] <= self.config.vocab_size:
            raise OfakernValueError(
                f"OFAPlus.step_logits: ids must be a range in [0, {self.config.vocab_size}], got {ids}"
            )
        return state.weights.output_of(ids)(hidden)

    def decode_step(self, state: DecodeState, tokens: Tensor) -> Tensor:
        """Feeds one token per row, int64 `[rows]`; returns the next token's logits `[rows, V]`."""
        return self.step_logits(state, self.decode_hidden(state, tokens))


class SegmentWriter:
    """A model as a search sees it, which writes a segment of this adaptor and modality."""

    def __init__(self, model: OFAPlus, adaptor: str, modality: int) -> None:
        self._model, self._adaptor, self._modality = model, adaptor, modality

    def begin_decode(
        self, memory: Memory, rows_per_sample: int | Sequence[int], max_length: int, cuda_graphs: bool = False
    ) -> DecodeState:
        return self._model.begin_decode(
            memory,
            rows_per_sample,
            max_length,
            modality=self._modality,
            adaptor=self._adaptor,
            cuda_graphs=cuda_graphs,
        )

    def decode_step(self, state: DecodeState, tokens: Tensor) -> Tensor:
        return self._model.decode_step(state, tokens)

    def decode_hidden(self, state: DecodeState, tokens: Tensor) -> Tensor:
        return self._model.decode_hidden(state, tokens)

    def step_logits(self, state: DecodeState, hidden: Tensor, ids: tuple[int, int] | None = None) -> Tensor:
        return self._model.step_logits(state, hidden, ids)

    @property
    def output_weight(self) -> Tensor:
        return self._model.output_weight


class FrameWriter:
    """A model as `generate_frames` sees it, which writes a segment of this adaptor and modality."""

    def __init__(self, model: OFAPlus, adaptor: str, modality: int) -> None:
        self._model, self._name, self._modality = model, adaptor, modality
        self._adaptor = model.frame_adaptor(adaptor)

    @property
    def frame_dim(self) -> int:
        return self._adaptor.step_shape[0]

    def begin_decode(self, memory: Memory, rows_per_sample: int, max_length: int) -> DecodeState:
        return self._model.begin_decode(
            memory, rows_per_sample, max_length, modality=self._modality, adaptor=self._name
        )

    def decode_frame(self, state: DecodeState, frames: Tensor) -> tuple[Tensor, Tensor]:
        frame, stop = self._adaptor.frames(state.step(frames))
        return frame, stop.sigmoid()

    def refine(self, frames: Tensor, lengths: Sequence[int]) -> Tensor:
        return self._adaptor.refine(frames, lengths)
