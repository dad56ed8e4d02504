"""What the CUDA toolkit was there to build. Absent from a build without it."""

from typing import TypedDict

class DeviceInfo(TypedDict):
    name: str
    compute_capability: tuple[int, int]
    memory_bytes: int
    multiprocessors: int

def devices() -> list[DeviceInfo]: ...
def driver_version() -> int: ...
def runtime_version() -> int: ...
