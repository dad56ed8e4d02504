"""The CPU kernels. Arguments are positional; C++ checks every tensor again (csrc/ops/<op>/<op>.h has the contract)."""

from collections.abc import Sequence

from torch import Tensor

def isa() -> str: ...
def compiled_isas() -> list[str]: ...
def supported_isas() -> list[str]: ...
def set_isa(name: str, /) -> None: ...
def describe(tensor: Tensor | None, /) -> str: ...
def kept_bytes(bytes: int, /) -> Tensor | None: ...
def kept_memory() -> int: ...
def give_back_memory() -> None: ...
def keep_memory_for(seconds: float, /) -> float: ...
def attention_forward(
    out: Tensor,
    lse: Tensor,
    workspace: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_pos: Tensor | None,
    k_pos: Tensor | None,
    table0: Tensor | None,
    q_coord0: Tensor | None,
    k_coord0: Tensor | None,
    same0: Tensor | None,
    table1: Tensor | None,
    q_coord1: Tensor | None,
    k_coord1: Tensor | None,
    same1: Tensor | None,
    head_scale: Tensor | None,
    dropout_seed: Tensor | None,
    visible: Tensor,
    q_offsets: Tensor,
    k_offsets: Tensor,
    key_seen: Tensor,
    k_range: Tensor,
    shared_sets: Tensor | None,
    shared_members: Tensor | None,
    scale: float,
    dropout_p: float,
    threads: int,
    /,
) -> None: ...
def attention_backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dq_pos: Tensor | None,
    dk_pos: Tensor | None,
    dtable0: Tensor | None,
    dtable1: Tensor | None,
    dhead_scale: Tensor | None,
    workspace: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_pos: Tensor | None,
    k_pos: Tensor | None,
    table0: Tensor | None,
    q_coord0: Tensor | None,
    k_coord0: Tensor | None,
    same0: Tensor | None,
    table1: Tensor | None,
    q_coord1: Tensor | None,
    k_coord1: Tensor | None,
    same1: Tensor | None,
    head_scale: Tensor | None,
    dropout_seed: Tensor | None,
    visible: Tensor,
    q_offsets: Tensor,
    k_offsets: Tensor,
    key_seen: Tensor,
    k_range: Tensor,
    shared_sets: Tensor | None,
    shared_members: Tensor | None,
    scale: float,
    dropout_p: float,
    threads: int,
    /,
) -> None: ...

# Both take what follows the workspace of attention_forward.
def attention_forward_workspace(*inputs: Tensor | float | None) -> int: ...
def attention_backward_workspace(*inputs: Tensor | float | None) -> int: ...
def log_mel_forward(
    out: Tensor,
    workspace: Tensor,
    wave: Tensor,
    bounds: Tensor,
    window: Tensor,
    roots: Tensor,
    first: Tensor,
    offsets: Tensor,
    weights: Tensor,
    hop: int,
    first_sample: int,
    mirror_repeats_edge: bool,
    remove_dc: bool,
    preemphasis: float,
    power: int,
    whisper: bool,
    floor: float,
    threads: int,
    /,
) -> None: ...
def log_mel_workspace(
    wave: Tensor,
    bounds: Tensor,
    window: Tensor,
    roots: Tensor,
    first: Tensor,
    offsets: Tensor,
    weights: Tensor,
    hop: int,
    first_sample: int,
    mirror_repeats_edge: bool,
    remove_dc: bool,
    preemphasis: float,
    power: int,
    whisper: bool,
    floor: float,
    threads: int,
    /,
) -> int: ...
def patch_embed_forward(
    out: Tensor,
    workspace: Tensor,
    images: list[Tensor],
    weight: Tensor,
    normalise: Tensor,
    bias: Tensor | None,
    type_embedding: Tensor | None,
    position: Tensor | None,
    position_index: Tensor | None,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    eps: float,
    threads: int,
    /,
) -> None: ...
def patch_embed_backward(
    dweight: Tensor,
    dbias: Tensor,
    dposition: Tensor | None,
    dln_weight: Tensor | None,
    dln_bias: Tensor | None,
    workspace: Tensor,
    dout: Tensor,
    images: list[Tensor],
    weight: Tensor,
    normalise: Tensor,
    bias: Tensor | None,
    type_embedding: Tensor | None,
    position: Tensor | None,
    position_index: Tensor | None,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    eps: float,
    threads: int,
    /,
) -> None: ...
def patch_embed_forward_workspace(
    images: list[Tensor],
    weight: Tensor,
    normalise: Tensor,
    bias: Tensor | None,
    type_embedding: Tensor | None,
    position: Tensor | None,
    position_index: Tensor | None,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    eps: float,
    threads: int,
    /,
) -> int: ...
def patch_embed_backward_workspace(
    images: list[Tensor],
    weight: Tensor,
    normalise: Tensor,
    bias: Tensor | None,
    type_embedding: Tensor | None,
    position: Tensor | None,
    position_index: Tensor | None,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    eps: float,
    threads: int,
    /,
) -> int: ...
def rms_norm_backward_workspace(rows: int, width: int, /) -> int: ...
def rms_norm_forward(out: Tensor, rstd: Tensor, x: Tensor, weight: Tensor, eps: float, threads: int, /) -> None: ...
def rms_norm_backward(
    dx: Tensor, dweight: Tensor, workspace: Tensor, dout: Tensor, x: Tensor, rstd: Tensor, weight: Tensor, threads: int
) -> None: ...
def layer_norm_forward_workspace(width: int, threads: int, /) -> int: ...
def layer_norm_backward_workspace(rows: int, width: int, heads: int, threads: int, /) -> int: ...
def embed_layer_norm_backward_workspace(rows: int, width: int, entries: int, threads: int, /) -> int: ...
def add_layer_norm_forward(
    out: Tensor,
    total: Tensor,
    stats: Tensor,
    workspace: Tensor,
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dropout_seed: Tensor | None,
    dropout_p: float,
    threads: int,
    /,
) -> None: ...
def add_layer_norm_backward(
    dx: Tensor | None,
    dresidual: Tensor,
    dweight: Tensor,
    dbias: Tensor,
    workspace: Tensor,
    dout: Tensor,
    dtotal: Tensor | None,
    total: Tensor,
    stats: Tensor,
    weight: Tensor,
    dropout_seed: Tensor | None,
    dropout_p: float,
    threads: int,
    /,
) -> None: ...
def gelu_layer_norm_forward(
    out: Tensor,
    stats: Tensor,
    workspace: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    threads: int,
    /,
) -> None: ...
def gelu_layer_norm_backward(
    dx: Tensor,
    dweight: Tensor,
    dbias: Tensor,
    workspace: Tensor,
    dout: Tensor,
    x: Tensor,
    stats: Tensor,
    weight: Tensor,
    threads: int,
    /,
) -> None: ...
def head_scale_layer_norm_forward(
    out: Tensor,
    stats: Tensor,
    workspace: Tensor,
    x: Tensor,
    head_scale: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    threads: int,
    /,
) -> None: ...
def head_scale_layer_norm_backward(
    dx: Tensor,
    dhead_scale: Tensor,
    dweight: Tensor,
    dbias: Tensor,
    workspace: Tensor,
    dout: Tensor,
    x: Tensor,
    head_scale: Tensor,
    stats: Tensor,
    weight: Tensor,
    threads: int,
    /,
) -> None: ...
def embed_layer_norm_forward(
    out: Tensor,
    stats: Tensor,
    workspace: Tensor,
    tokens: Tensor,
    table: Tensor,
    types: Tensor | None,
    type_table: Tensor | None,
    scale: float,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    threads: int,
    /,
) -> None: ...
def embed_layer_norm_backward(
    dtable: Tensor,
    dtype_table: Tensor | None,
    dweight: Tensor,
    dbias: Tensor,
    workspace: Tensor,
    dout: Tensor,
    tokens: Tensor,
    table: Tensor,
    types: Tensor | None,
    type_table: Tensor | None,
    scale: float,
    stats: Tensor,
    weight: Tensor,
    threads: int,
    /,
) -> None: ...
def rotation_6d_forward(out: Tensor, x: Tensor, threads: int, /) -> None: ...
def rotation_6d_backward(dx: Tensor, dout: Tensor, x: Tensor, threads: int, /) -> None: ...
def cross_entropy_forward(
    loss: Tensor,
    nll: Tensor,
    lse: Tensor,
    best: Tensor | None,
    dhidden: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    workspace: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    offsets: Tensor | None,
    ids: Tensor | None,
    allowed_range: Tensor | None,
    always_allowed: int,
    epsilon: float,
    threads: int,
    /,
) -> None: ...
def cross_entropy_backward(
    dhidden: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    workspace: Tensor,
    dloss: Tensor,
    token_lse: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    offsets: Tensor | None,
    ids: Tensor | None,
    allowed_range: Tensor | None,
    always_allowed: int,
    epsilon: float,
    threads: int,
    /,
) -> None: ...
def cross_entropy_forward_workspace(
    loss: Tensor,
    nll: Tensor,
    lse: Tensor,
    best: Tensor | None,
    dhidden: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    offsets: Tensor | None,
    ids: Tensor | None,
    allowed_range: Tensor | None,
    always_allowed: int,
    epsilon: float,
    threads: int,
    /,
) -> int: ...
def cross_entropy_backward_workspace(
    dhidden: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    offsets: Tensor | None,
    ids: Tensor | None,
    allowed_range: Tensor | None,
    always_allowed: int,
    epsilon: float,
    threads: int,
    /,
) -> int: ...
def decode_attention_project(
    keys: Tensor,
    values: Tensor,
    states: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    runs: Tensor,
    heads: int,
    key_width: int,
    value_width: int,
    threads: int,
) -> None: ...
def decode_attention_pack(
    keys: Tensor, values: Tensor, k: Tensor, v: Tensor, runs: Tensor, threads: int, /
) -> None: ...
def decode_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
    row_offsets: Tensor,
    runs: Tensor | None,
    slots: Tensor | None,
    counts: Tensor | None,
    bias: Tensor | None,
    head_scale: Tensor | None,
    value_width: int,
    scale: float,
    threads: int,
    /,
) -> tuple[Tensor, Tensor]: ...
def decode_attention_workspace(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
    row_offsets: Tensor,
    runs: Tensor | None,
    slots: Tensor | None,
    counts: Tensor | None,
    bias: Tensor | None,
    head_scale: Tensor | None,
    value_width: int,
    scale: float,
    threads: int,
    /,
) -> int: ...
def decode_attention_forward(
    out: Tensor,
    lse: Tensor,
    workspace: Tensor,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
    row_offsets: Tensor,
    runs: Tensor | None,
    slots: Tensor | None,
    counts: Tensor | None,
    bias: Tensor | None,
    head_scale: Tensor | None,
    value_width: int,
    scale: float,
    threads: int,
    /,
) -> None: ...
def gathered_linear(
    hidden: Tensor, weight: Tensor, states: Tensor, first: Tensor, tokens: Tensor, threads: int, /
) -> tuple[Tensor, Tensor, Tensor]: ...
def gathered_linear_count(states: Tensor, first: Tensor, /) -> int: ...
def gathered_linear_workspace(
    hidden: Tensor, weight: Tensor, states: Tensor, first: Tensor, tokens: Tensor, /
) -> int: ...
def gathered_linear_forward(
    values: Tensor,
    row_first: Tensor,
    row_tokens: Tensor,
    workspace: Tensor,
    hidden: Tensor,
    weight: Tensor,
    states: Tensor,
    first: Tensor,
    tokens: Tensor,
    threads: int,
    /,
) -> None: ...
def decode_linear_packed_bytes(weight: Tensor, like: Tensor, /) -> int: ...
def decode_linear_pack(packed: Tensor, weight: Tensor, like: Tensor, threads: int, /) -> None: ...
def decode_linear_workspace(
    x: Tensor, packed: Tensor, scale: Tensor | None, bias: Tensor | None, threads: int, /
) -> int: ...
def decode_linear_forward(
    out: Tensor,
    workspace: Tensor,
    x: Tensor,
    packed: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    threads: int,
    /,
) -> None: ...
def linear_backward_workspace(dy: Tensor, x: Tensor, threads: int, /) -> int: ...
def linear_backward(
    dweight: Tensor, dbias: Tensor | None, workspace: Tensor, dy: Tensor, x: Tensor, threads: int, /
) -> None: ...
def linear_gradients(dy: Tensor, x: Tensor, with_bias: bool, threads: int, /) -> tuple[Tensor, Tensor]: ...
def routed_linear_forward(
    y: Tensor,
    workspace: Tensor,
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    counts: Sequence[int],
    source: Tensor | None,
    target: Tensor | None,
    threads: int,
    /,
) -> None: ...
def routed_linear_backward(
    dx: Tensor | None,
    dweights: list[Tensor],
    dbiases: list[Tensor],
    workspace: Tensor,
    dy: Tensor,
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    counts: Sequence[int],
    source: Tensor | None,
    target: Tensor | None,
    threads: int,
    /,
) -> None: ...
def routed_linear_forward_workspace(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    counts: Sequence[int],
    source: Tensor | None,
    target: Tensor | None,
    threads: int,
    /,
) -> int: ...
def routed_linear_backward_workspace(
    dx: Tensor | None,
    dweights: list[Tensor],
    dbiases: list[Tensor],
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    counts: Sequence[int],
    source: Tensor | None,
    target: Tensor | None,
    threads: int,
    /,
) -> int: ...

# The registered op's arguments in its order (ofakern/ops/beam_step/op.py), then threads; in front of them outputs and
# the workspace where they are given. Status: -1, or the first row at fault.
def beam_step(*arguments: Tensor | int | None) -> tuple[tuple[Tensor, ...], int]: ...
def beam_step_workspace(*arguments: Tensor | int | None) -> int: ...
def beam_step_forward(*arguments: Tensor | int | None) -> int: ...
def sample_step(*arguments: Tensor | int | None) -> tuple[tuple[Tensor, ...], int]: ...
def sample_step_workspace(*arguments: Tensor | int | None) -> int: ...
def sample_step_forward(*arguments: Tensor | int | None) -> int: ...

# With results and a workspace that torch makes, and copies of tensors that are not row-major. Arguments: those of
# <name>_forward or <name>_backward that follow the workspace; cross_entropy's flags: what is wanted of best and, of the
# sums, the three gradients; patch_embed and log_mel: the registered op's arguments in its order, then threads.
def attention(*inputs: Tensor | float | None) -> tuple[Tensor, Tensor]: ...
def attention_gradients(
    out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None, /, *inputs: Tensor | float | None
) -> tuple[Tensor | None, ...]: ...

# A layout, its values checked once: q_coord, k_coord and same of two terms, then visible, q_offsets, k_offsets,
# key_seen, k_range, shared.sets and shared.members; rows: of the tables, -1 without the term.
def attention_layout(
    tensors: tuple[Tensor | None, ...], rows0: int, rows1: int, q_rows: int, k_rows: int, /
) -> object: ...

# Past pybind11's dispatcher; None of what is refused. Arguments: q, k, v, q_pos, k_pos, two tables, head_scale,
# dropout_seed, dropout_p, threads, scale (None: K**-0.5), what attention_layout made; of the first then two flags: True
# instead of results where an input asks for a gradient; lse beside out.
def attention_of(*arguments: Tensor | float | object) -> Tensor | tuple[Tensor, Tensor] | bool | None: ...
def attention_gradients_of(
    out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None, /, *arguments: Tensor | float | object
) -> tuple[Tensor | None, ...] | None: ...
def add_layer_norm(*inputs: Tensor | float | None) -> tuple[Tensor, Tensor, Tensor]: ...
def add_layer_norm_gradients(*inputs: Tensor | float | None) -> tuple[Tensor | None, ...]: ...
def gelu_layer_norm(*inputs: Tensor | float) -> tuple[Tensor, Tensor]: ...
def gelu_layer_norm_gradients(*inputs: Tensor | float) -> tuple[Tensor, ...]: ...
def head_scale_layer_norm(*inputs: Tensor | float) -> tuple[Tensor, Tensor]: ...
def head_scale_layer_norm_gradients(*inputs: Tensor | float) -> tuple[Tensor, ...]: ...
def embed_layer_norm(*inputs: Tensor | float | None) -> tuple[Tensor, Tensor]: ...
def embed_layer_norm_gradients(*inputs: Tensor | float | None) -> tuple[Tensor | None, ...]: ...
def rms_norm(*inputs: Tensor | float) -> tuple[Tensor, Tensor]: ...
def rms_norm_gradients(*inputs: Tensor | int) -> tuple[Tensor, Tensor]: ...
def cross_entropy(*inputs_and_flags: Tensor | float | None) -> tuple[Tensor, ...]: ...
def cross_entropy_sums(threads: int, /, *inputs_and_flags: Tensor | float | None) -> tuple[Tensor | None, ...]: ...
def cross_entropy_gradients(
    dloss: Tensor, lse: Tensor, /, *inputs_and_flags: Tensor | float | None
) -> tuple[Tensor, ...]: ...
def routed_linear(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    counts: Sequence[int],
    source: Tensor | None,
    target: Tensor | None,
    threads: int,
    /,
) -> Tensor: ...
def routed_linear_gradients(
    dy: Tensor,
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    counts: Sequence[int],
    source: Tensor | None,
    target: Tensor | None,
    threads: int,
    wants_x: bool,
    wants_weights: bool,
    with_bias: bool,
    /,
) -> tuple[Tensor, ...]: ...
def patch_embed(*arguments: object) -> Tensor: ...
def patch_embed_gradients(*arguments: object) -> tuple[Tensor, ...]: ...
def log_mel(*arguments: object) -> Tensor: ...
def rotation_6d(x: Tensor, threads: int, /) -> Tensor: ...
def rotation_6d_gradient(dout: Tensor, x: Tensor, threads: int, /) -> Tensor: ...
def decode_linear(
    x: Tensor, packed: Tensor, scale: Tensor | None, bias: Tensor | None, width: int, threads: int, /
) -> Tensor: ...

class PreparedLayers: ...

def decode_layers_prepare(
    layers: list[tuple[Tensor | float | None, ...]],
    finish: tuple[Tensor | None, Tensor | None, float],
    like: Tensor,
    width: int,
    hidden: int,
    heads: int,
    norm_first: bool,
    gelu: bool,
    /,
) -> PreparedLayers: ...
def decode_layers(
    prepared: PreparedLayers, x: Tensor, caches: list[Tensor], /, *inputs_and_threads: Tensor | int | None
) -> Tensor: ...
def decode_layers_workspace(
    prepared: PreparedLayers, x: Tensor, caches: list[Tensor], /, *inputs_and_threads: Tensor | int | None
) -> int: ...
def decode_layers_forward(
    prepared: PreparedLayers,
    out: Tensor,
    workspace: Tensor,
    x: Tensor,
    caches: list[Tensor],
    /,
    *inputs_and_threads: Tensor | int | None,
) -> None: ...
