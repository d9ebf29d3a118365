"""What this run computes on, and how fast its matrix products can be."""

import ctypes
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from lascaux.config.schema import TrainConfig
from lascaux.errors import ConfigError
from lascaux.parallel.hardware import (
    measure_matmul_peak,
    memory_bytes,
    usable_cores,
)
from lascaux.parallel.runtime import Process, threads_asked_for
from lascaux.train.precision import DTYPES
from lascaux.units import format_flops_per_second

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX, M_ARENA_MAX = -1, -2, -4, -8  # <malloc.h>


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """The device of a run with its measured peak; written to RUN/environment.json."""

    device: str
    device_name: str
    cores: int
    threads: int
    memory_bytes: int
    precision: str
    allocator: str
    matmul_peak_flops_per_second: float
    lascaux: str
    torch: str
    python: str
    platform: str
    git: str | None


def prepare_device(train: TrainConfig, process: Process | None = None) -> torch.device:
    """The device of a run, with threads and memory set up as the config says.

    Processes of one machine share its cores, and take a GPU each. Deterministic training has one
    thread unless `train.threads` says otherwise, since sums are cut by the number of threads.

    Raises: ConfigError for a GPU that is not there, and for fp16 without one.
    """
    process = process or Process()
    device = choose_device(train)
    if device.type == "cuda" and process.world_size > 1:
        device = torch.device("cuda", process.local_rank)
        torch.cuda.set_device(device)
    if train.threads is not None or train.deterministic:
        torch.set_num_threads(train.threads or 1)
    elif hasattr(os, "sched_getaffinity") and not threads_asked_for():
        torch.set_num_threads(max(1, usable_cores() // process.processes_here))
    if keeps_freed_memory(train, device):
        keep_freed_memory()
    return device


def choose_device(train: TrainConfig) -> torch.device:
    """The device `train.device` asks for.

    Raises: ConfigError for a GPU that is not there, and for fp16 without one.
    """
    available = torch.cuda.is_available()
    if train.device == "cuda" and not available:
        raise ConfigError(
            "'train.device' is 'cuda' but torch sees no GPU; use --train.device=cpu, or check the "
            "driver and that torch was installed with CUDA"
        )
    device = torch.device("cuda" if available and train.device != "cpu" else "cpu")
    if train.precision == "fp16" and device.type == "cpu":
        raise ConfigError(
            "'train.precision' fp16 needs a GPU (CPUs compute fp16 some hundred times slower than "
            "fp32); use --train.precision=fp32 or bf16"
        )
    return device


def describe_machine(device: torch.device, train: TrainConfig) -> Machine:
    """Versions, device and measured matrix-multiply peak in the precision of the run."""
    assert train.precision != "auto", "train() settles it"
    return Machine(
        device=device.type,
        device_name=device_name(device),
        cores=usable_cores(),
        threads=torch.get_num_threads(),
        memory_bytes=memory_bytes(device),
        precision=train.precision,
        allocator="keep" if keeps_freed_memory(train, device) else "system",
        matmul_peak_flops_per_second=measure_matmul_peak(device, DTYPES[train.precision]),
        lascaux=version("lascaux"),
        torch=torch.__version__,
        python=sys.version.split()[0],
        platform=platform.platform(),
        git=git_commit(),
    )


def describe_choices(machine: Machine) -> str:
    """The device and what was chosen for it, in one line."""
    peak = format_flops_per_second(machine.matmul_peak_flops_per_second)
    parts = [machine.device_name]
    if machine.device == "cpu":
        parts.append(f"{machine.threads} threads")
    parts.append(f"{machine.precision}, measured matrix-multiply peak {peak}")
    if machine.device == "cpu":
        kept = "kept for the next step" if machine.allocator == "keep" else "given back"
        parts.append(f"freed memory {kept}")
    return ", ".join(parts)


def keeps_freed_memory(train: TrainConfig, device: torch.device) -> bool:
    """Whether the config asks for it and the C library, glibc alone, can be told."""
    glibc = platform.libc_ver()[0] == "glibc"
    return train.allocator == "keep" and device.type == "cpu" and glibc


def keep_freed_memory() -> None:
    """Have glibc keep freed memory for the next step instead of returning it.

    A step frees and asks again for the same large tensors; fresh pages cost up to a fifth of it
    (docs/performance.md).
    """
    libc = ctypes.CDLL(None)
    for parameter, value in (
        (M_MMAP_MAX, 0),
        (M_TRIM_THRESHOLD, -1),
        (M_TOP_PAD, 256 * 2**20),
        (M_ARENA_MAX, 1),
    ):
        libc.mallopt(parameter, value)


def device_name(device: torch.device) -> str:
    """The name of the GPU or processor."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def cpu_name() -> str:
    """The processor's name as the kernel gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def git_commit() -> str | None:
    """The commit of the package's own checkout; None where it was installed without one."""
    try:
        result = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=5,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None
