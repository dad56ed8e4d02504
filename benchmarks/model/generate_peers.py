"""Decoding as it is usually done, on our model's weights: keys and values expanded to every beam, caches that move.

Samples of the case have sources of one length S. Both peers search as fairseq does, with log_softmax and topk. What
they have in common is `Peer`; the difference is in what a step computes anew and how it attends.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ofakern.model import OFAPlus
from ofakern.model.stacks import Memory
from ofakern.nn.adaptor import TokenAdaptor
from ofakern.nn.attention import MultiheadAttention
from ofakern.nn.layers import DecoderLayer

BOS, PAD, EOS = 0, 1, 2


@dataclass
class PeerState:
    """R rows. tokens int64 `[R, t]`; own: each layer's keys and values `[R, H, t, K]`; source: the encoder's, expanded
    `[R, H, S, K]`; positions: what cross attention's factored term is made of."""

    tokens: Tensor
    source: list[tuple[Tensor, Tensor]]
    positions: Tensor
    states: Tensor | None = None
    own: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    own_positions: Tensor | None = None


@dataclass(frozen=True)
class _Values:
    """Whole prefixes as an adaptor sees them."""

    value: Tensor
    lengths: Tensor
    positions: Tensor
    partial: bool = False
    levels: Tensor | None = None


class Peer(ABC):
    """Decoding with expanded caches. adaptor: of what is written."""

    def __init__(self, model: OFAPlus, adaptor: str = "text") -> None:
        self.model, self.decoder = model, model.decoder
        found = self.decoder.adaptor.adaptors[adaptor]
        assert isinstance(found, TokenAdaptor)
        self.adaptor, self.heads = found, model.config.heads
        self.layers = self.decoder.decoder_layers()
        self.scale = self.layers[0].self_attn.scale

    def begin(self, memory: Memory, beams: int, length: int) -> PeerState:
        """length: the most tokens that will be fed."""
        self.block = self.adaptor.block_of_length(length, causal=True)
        self.q_coord, self.k_coord = self.adaptor.step_coordinates(length)
        batch = memory.samples
        source = []
        for layer in self.layers:
            parts = (layer.encoder_attn.k_proj(memory.states), layer.encoder_attn.v_proj(memory.states))
            k, v = (self.split(part.view(batch, -1, part.shape[1])) for part in parts)
            source.append((k.repeat_interleave(beams, 0), v.repeat_interleave(beams, 0)))
        return self.start(memory, beams, source)

    @abstractmethod
    def start(self, memory: Memory, beams: int, source: list[tuple[Tensor, Tensor]]) -> PeerState: ...

    @abstractmethod
    def embed(self, state: PeerState) -> Tensor:
        """The newest tokens `[R, D]`."""

    @abstractmethod
    def biases(self, state: PeerState) -> tuple[list[Tensor], Tensor]:
        """Of the newest position: each layer's for self-attention `[R, H, 1, t]`, cross attention's `[R, H, 1, S]`."""

    @abstractmethod
    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor: ...

    def reorder(self, state: PeerState, rows: Tensor) -> None:
        state.tokens = state.tokens[rows]
        state.own = [(k.index_select(0, rows), v.index_select(0, rows)) for k, v in state.own]

    def step(self, state: PeerState, tokens: Tensor) -> Tensor:
        """tokens int64 `[R]`: the next token's logits `[R, V]`."""
        state.tokens = torch.cat([state.tokens, tokens[:, None]], 1)
        x = self.embed(state)
        own_bias, cross_bias = self.biases(state)
        for number, layer in enumerate(self.layers):
            y = self.own(layer, number, state, layer.self_attn_layer_norm(x), own_bias[number])
            x = x + self.normed(layer.self_attn_ln, y)
            seen = layer.encoder_attn_layer_norm(x)
            y = self.heads_of(layer.encoder_attn, seen, *state.source[number], cross_bias)
            x = x + self.normed(layer.cross_attn_ln, y)
            y = self.gelu(layer.fc1(layer.final_layer_norm(x)))
            x = x + layer.fc2(self.normed(layer.ffn_layernorm, y))
        return F.linear(self.decoder.finish(x), self.model.output_weight)

    def own(self, layer: DecoderLayer, number: int, state: PeerState, y: Tensor, bias: Tensor) -> Tensor:
        attention = layer.self_attn
        k, v = (self.split(part(y)[:, None]) for part in (attention.k_proj, attention.v_proj))
        if len(state.own) > number:
            k, v = (torch.cat([old, new], 2) for old, new in zip(state.own[number], (k, v), strict=True))
            state.own[number] = (k, v)
        else:
            state.own.append((k, v))
        return self.heads_of(attention, y, k, v, bias)

    def heads_of(self, attention: MultiheadAttention, y: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        out = self.attend(self.split(attention.q_proj(y)[:, None]), k, v, bias)
        if attention.c_attn is not None:
            out = torch.einsum("rhtd,h->rhtd", out, attention.c_attn)
        out = attention.out_proj(out.transpose(1, 2).flatten(1))
        return out

    def split(self, x: Tensor) -> Tensor:
        """`[R, t, D]` to `[R, H, t, K]`, contiguous."""
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2).contiguous()

    def values(self, tokens: Tensor, first: int) -> _Values:
        """tokens `[R, n]` that stand at first .. first + n - 1, as one run of values."""
        rows, count = tokens.shape
        places = torch.arange(first, first + count).repeat(rows)
        return _Values(tokens.flatten(), torch.full((rows,), first + count, dtype=torch.int32), places)

    def tables(self) -> list[Tensor]:
        return [
            weight for weight in self.adaptor.tables() for _ in range(len(self.layers) // len(self.adaptor.tables()))
        ]

    @staticmethod
    def normed(norm: nn.Module | None, x: Tensor) -> Tensor:
        y: Tensor = x if norm is None else norm(x)
        return y

    def gelu(self, x: Tensor) -> Tensor:
        return F.gelu(x)


class Ofasys(Peer):
    """OFASys's algorithm: every step embeds the whole prefix, makes its T x T bias for every layer and takes the last
    row, projects the source's positions again for every beam; bmm and a float32 softmax; the encoder's output is copied
    when beams change places."""

    def start(self, memory: Memory, beams: int, source: list[tuple[Tensor, Tensor]]) -> PeerState:
        batch = memory.samples
        expand = [x.view(batch, -1, x.shape[1]).repeat_interleave(beams, 0) for x in (memory.states, memory.positions)]
        tokens = torch.empty((batch * beams, 0), dtype=torch.int64)
        return PeerState(tokens, source, expand[1], expand[0])

    def embed(self, state: PeerState) -> Tensor:
        rows, length = state.tokens.shape
        embed, positions = self.adaptor(self.values(state.tokens, 0), self.decoder.adaptor.embed_tokens)
        state.own_positions = positions.view(rows, length, -1)
        return embed.view(rows, length, -1)[:, -1]

    def biases(self, state: PeerState) -> tuple[list[Tensor], Tensor]:
        positions, group = state.own_positions, self.decoder.adaptor
        assert positions is not None and group.pos_q_linear is not None and group.pos_k_linear is not None
        absolute = self._term(group.pos_q_linear(positions), group.pos_k_linear(positions))
        length = positions.shape[1]
        rows = (self.q_coord[:length, None] - self.k_coord[:length]).clamp(min=0)
        index = self.block.index[rows]
        own = []
        for table in self.tables():
            bias = absolute.clone()
            bias += F.embedding(index, table).permute(2, 0, 1)[None]
            own.append(bias[:, :, -1:])
        q_linear, k_linear = self.decoder.cross_pos_q_linear, self.decoder.cross_pos_k_linear
        assert q_linear is not None and k_linear is not None
        return own, self._term(q_linear(positions[:, -1:]), k_linear(state.positions))

    def _term(self, q: Tensor, k: Tensor) -> Tensor:
        return torch.matmul(self.split(q) * self.scale, self.split(k).transpose(2, 3))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        scores = torch.bmm((q * self.scale).flatten(0, 1), k.flatten(0, 1).transpose(1, 2)).view(bias.shape)
        probabilities = torch.softmax(scores + bias, -1, dtype=torch.float32).type_as(scores)
        return torch.bmm(probabilities.flatten(0, 1), v.flatten(0, 1)).view(q.shape)

    def gelu(self, x: Tensor) -> Tensor:
        return F.gelu(x.float()).type_as(x)

    def reorder(self, state: PeerState, rows: Tensor) -> None:
        super().reorder(state, rows)
        assert state.states is not None
        state.states, state.positions = state.states.index_select(0, rows), state.positions.index_select(0, rows)


class Expanded(Peer):
    """What transformers does, with SDPA: position terms from cached projections, once per sample and for the newest
    position only; everything else as in `Ofasys`."""

    def start(self, memory: Memory, beams: int, source: list[tuple[Tensor, Tensor]]) -> PeerState:
        k_pos = self.decoder.cross_keys(memory.positions)
        assert k_pos is not None
        positions = k_pos.view(memory.samples, -1, *k_pos.shape[1:]).permute(0, 2, 3, 1).contiguous()
        self.beams = beams
        return PeerState(torch.empty((memory.samples * beams, 0), dtype=torch.int64), source, positions)

    def embed(self, state: PeerState) -> Tensor:
        last = state.tokens.shape[1] - 1
        embed, positions = self.adaptor(self.values(state.tokens[:, -1:], last), self.decoder.adaptor.embed_tokens)
        state.own_positions = positions[:1]
        return embed

    def biases(self, state: PeerState) -> tuple[list[Tensor], Tensor]:
        positions, last = state.own_positions, state.tokens.shape[1] - 1
        assert positions is not None
        q_pos, k_pos = self.decoder.adaptor.factored(positions)
        cross = self.decoder.cross_queries(positions)
        assert q_pos is not None and k_pos is not None and cross is not None
        self.keys = k_pos if last == 0 else torch.cat([self.keys[:last], k_pos])
        absolute = torch.einsum("hp,shp->hs", q_pos[0] * self.scale, self.keys)
        index = self.block.index[(self.q_coord[last] - self.k_coord[: last + 1]).clamp(min=0)]
        own = [
            (absolute + table[index].t())[None, :, None].expand(len(state.tokens), -1, -1, -1)
            for table in self.tables()
        ]
        term = torch.matmul((cross[0] * self.scale)[None, :, None], state.positions)
        return own, term.repeat_interleave(self.beams, 0)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=self.scale)


PEERS: dict[str, Callable[..., Peer]] = {"ofasys": Ofasys, "expanded": Expanded}


@torch.inference_mode()
def beam_search(peer: Peer, memory: Memory, beams: int, length: int) -> Tensor:
    """Scores f32 `[B]` of the best answers of `length` tokens and an end of sequence, by fairseq's search."""
    batch = memory.samples
    state = peer.begin(memory, beams, length + 1)
    tokens, sums = torch.full((batch * beams,), BOS), torch.zeros(batch, beams)
    first = torch.arange(batch)[:, None] * beams
    for step in range(length):
        scores = F.log_softmax(peer.step(state, tokens), -1, dtype=torch.float32).view(batch, beams, -1)
        scores[scores != scores] = -torch.inf
        scores[:, :, [PAD, EOS]] = -torch.inf
        scores = scores[:, :1] if step == 0 else scores + sums[:, :, None]
        found, places = scores.flatten(1).topk(2 * beams, 1)
        sums = found[:, :beams]
        origins = torch.div(places[:, :beams], scores.shape[2], rounding_mode="floor")
        tokens = (places[:, :beams] % scores.shape[2]).flatten()
        peer.reorder(state, (first + origins).flatten())
    ends = F.log_softmax(peer.step(state, tokens), -1, dtype=torch.float32)[:, EOS].view(batch, beams)
    return (sums + ends).amax(1)


@torch.inference_mode()
def prepared(peer: Peer, memory: Memory, length: int, fed: int) -> PeerState:
    """A state of one row per sample to which `fed` tokens seem to have been fed: its own keys are random."""
    state = peer.begin(memory, 1, length)
    config = peer.model.config
    width, rows = config.dim // config.heads, memory.samples
    dtype = memory.states.dtype
    state.tokens = torch.full((rows, fed), BOS)
    if fed:
        state.own = [
            tuple(torch.randn(rows, config.heads, fed, width, dtype=dtype) for _ in range(2)) for _ in peer.layers
        ]  # type: ignore[misc]
    if isinstance(peer, Expanded):
        peer.keys = torch.randn(fed, config.heads, width, dtype=dtype)
    return state
