"""`ofakern info`: what is installed here, what this machine has, and which backend can run which op."""

from __future__ import annotations

import argparse
import json
import os
import platform
from importlib import import_module, metadata
from typing import TypedDict

from ofakern import __version__
from ofakern.errors import OfakernError

_PACKAGES = ("torch", "triton", "numpy", "safetensors", "tokenizers", "pillow")


class Cpu(TypedDict):
    model: str
    isa: str | None
    supported: list[str]
    compiled: list[str]
    forced: str | None
    threads: int
    cores: int
    reason: str | None


class Gpu(TypedDict):
    name: str
    compute_capability: list[int]
    memory_bytes: int
    driver: str


class Gpus(TypedDict):
    devices: list[Gpu]
    reason: str | None


class Info(TypedDict):
    versions: dict[str, str | None]
    cpu: Cpu
    gpu: Gpus
    ops: dict[str, dict[str, str | None]]


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "info",
        help="what this machine can run: versions, CPU, GPU, ops by backend",
        description="Show versions, CPU instruction set, GPU, and for each op and backend: available, or why not.",
        epilog="examples:\n  ofakern info\n  ofakern info --json\n  OFAKERN_CPU_ISA=avx2 ofakern info",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    info = collect()
    print(json.dumps(info, indent=2) if args.json else render(info))
    return 0


def collect() -> Info:
    """Everything `ofakern info` shows. Never fails for something that is missing: its reason stands in its place."""
    registry = import_module("ofakern.ops.registry")
    return Info(
        versions=_versions(),
        cpu=_cpu(),
        gpu=_gpu(),
        ops={op: registry.backends(op) for op in registry.ops()},
    )


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"ofakern": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def _cpu() -> Cpu:
    import torch

    cpu = Cpu(
        model=_cpu_model(),
        isa=None,
        supported=[],
        compiled=[],
        forced=os.environ.get("OFAKERN_CPU_ISA") or None,
        threads=torch.get_num_threads(),
        cores=os.cpu_count() or 1,
        reason=None,
    )
    try:
        module = import_module("ofakern._cpu")
        cpu["compiled"] = module.compiled_isas()
        cpu["supported"] = module.supported_isas()
        cpu["isa"] = module.isa()
    except (ImportError, OfakernError) as error:
        cpu["reason"] = str(error)
    return cpu


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux: platform knows
    return platform.processor() or platform.machine()


def _gpu() -> Gpus:
    try:
        module = import_module("ofakern._cuda")
    except ImportError:
        return Gpus(devices=[], reason="ofakern._cuda is not built (no CUDA toolkit at build time)")
    try:
        if module.driver_version() == 0:
            return Gpus(devices=[], reason="no CUDA driver is installed")
        driver = _cuda_version(module.driver_version())
        devices = [
            Gpu(
                name=device["name"],
                compute_capability=list(device["compute_capability"]),
                memory_bytes=device["memory_bytes"],
                driver=driver,
            )
            for device in module.devices()
        ]
    except OfakernError as error:
        return Gpus(devices=[], reason=str(error))
    return Gpus(devices=devices, reason=None if devices else "no CUDA device")


def _cuda_version(number: int) -> str:
    """CUDA writes 13.0 as 13000."""
    return f"{number // 1000}.{number % 1000 // 10}"


def render(info: Info) -> str:
    versions = ", ".join(f"{name} {version or 'not installed'}" for name, version in info["versions"].items())
    cpu = info["cpu"]
    lines = [
        f"versions   {versions}",
        f"cpu        {cpu['model']}, {cpu['cores']} cores, {cpu['threads']} threads",
        f"isa        {cpu['isa'] or cpu['reason']}" + (" (OFAKERN_CPU_ISA)" if cpu["forced"] and cpu["isa"] else ""),
        f"           supported by this CPU: {', '.join(cpu['supported']) or '-'}",
        f"           compiled in this build: {', '.join(cpu['compiled']) or '-'}",
    ]
    lines += [f"gpu        {_render_gpu(gpu)}" for gpu in info["gpu"]["devices"]] or [
        f"gpu        {info['gpu']['reason']}"
    ]
    for op, backends in info["ops"].items():
        lines.append(op)
        lines += [f"  {name:<9}  {'available' if reason is None else reason}" for name, reason in backends.items()]
    return "\n".join(lines)


def _render_gpu(gpu: Gpu) -> str:
    major, minor = gpu["compute_capability"]
    return f"{gpu['name']}, sm_{major}{minor}, {gpu['memory_bytes'] / 2**30:.1f} GiB, driver for CUDA {gpu['driver']}"
