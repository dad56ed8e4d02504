"""The CUDA kernels; absent from a build without the toolkit. Results are made on the device of the inputs."""

from typing import TypedDict

from torch import Tensor

class DeviceInfo(TypedDict):
    name: str
    compute_capability: tuple[int, int]
    memory_bytes: int
    multiprocessors: int

def devices() -> list[DeviceInfo]: ...
def driver_version() -> int: ...
def runtime_version() -> int: ...

architectures: str  # "80, 90a, 100"

def log_mel(
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
    /,
) -> Tensor: ...
def patch_embed(
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
    /,
) -> Tensor: ...
def patch_embed_gradients(
    dout: Tensor,
    order: Tensor | None,
    offsets: Tensor | None,
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
    /,
) -> tuple[Tensor | None, ...]: ...
def rotation_6d(x: Tensor, /) -> Tensor: ...
def rotation_6d_gradient(dout: Tensor, x: Tensor, /) -> Tensor: ...
def attention(*inputs: Tensor | float | None) -> tuple[Tensor, Tensor]: ...
def attention_gradients(*inputs: Tensor | float | None) -> tuple[Tensor | None, ...]: ...

# As ofakern._cpu has them, without the number of threads. decode_attention's last argument is `longest`; beam_step's
# are width (none where the results are given) and `arrived`, int32 zeros, one for each sample.
def decode_attention(*args: Tensor | float | None) -> tuple[Tensor, Tensor]: ...
def decode_attention_workspace(*args: Tensor | float | None) -> int: ...
def decode_attention_forward(*args: Tensor | float | None) -> None: ...
def beam_step(*args: Tensor | int | None) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...
def beam_step_workspace(*args: Tensor | int | None) -> int: ...
def beam_step_forward(*args: Tensor | int | None) -> None: ...
def sample_step(*args: Tensor | int | None) -> tuple[Tensor, Tensor]: ...
