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
