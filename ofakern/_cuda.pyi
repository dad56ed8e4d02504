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

def rotation_6d(x: Tensor, /) -> Tensor: ...
def rotation_6d_gradient(dout: Tensor, x: Tensor, /) -> Tensor: ...
