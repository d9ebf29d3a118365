"""What this run computes on, and how fast its matrix products can be."""

import ctypes
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from lascaux.config.schema import TrainConfig
from lascaux.errors import ConfigError

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX, M_ARENA_MAX = -1, -2, -4, -8  # <malloc.h>
PEAK_SECONDS = 0.6
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """The device of a run with its measured peak; written to RUN/environment.json."""

    device: str
    device_name: str
    cores: int
    threads: int
    memory_bytes: int
    precision: str
    matmul_peak_flops_per_second: float
    lascaux: str
    torch: str
    python: str
    platform: str
    git: str | None


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


def describe_machine(device: torch.device, precision: str) -> Machine:
    """Versions, device and measured matrix-multiply peak in `precision`."""
    return Machine(
        device=device.type,
        device_name=torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        cores=usable_cores(),
        threads=torch.get_num_threads(),
        memory_bytes=memory_bytes(device),
        precision=precision,
        matmul_peak_flops_per_second=measure_matmul_peak(device, DTYPES[precision]),
        lascaux=version("lascaux"),
        torch=torch.__version__,
        python=sys.version.split()[0],
        platform=platform.platform(),
        git=git_commit(),
    )


def reuse_freed_memory() -> None:
    """Have the C library keep freed memory for the next step instead of returning it.

    A step frees and asks again for the same large tensors; fresh pages cost a fifth of the step
    (docs/decisions.md). Only glibc knows these settings; elsewhere nothing happens.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    for parameter, value in (
        (M_MMAP_MAX, 0),
        (M_TRIM_THRESHOLD, 2**31 - 1),
        (M_TOP_PAD, 256 * 2**20),
        (M_ARENA_MAX, 1),
    ):
        libc.mallopt(parameter, value)


def usable_cores() -> int:
    """Cores this process may run on; all of them where the system does not tell."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_bytes(device: torch.device) -> int:
    """Memory of the device; of the whole machine for a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


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


def measure_matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest of repeated square matrix products: the peak that MFU refers to.

    The fastest, because other work on a shared machine only ever slows a product down.
    """
    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device, dtype=dtype)
    b = torch.randn(size, size, device=device, dtype=dtype)
    out = torch.empty(size, size, device=device, dtype=dtype)
    best = float("inf")
    deadline = time.monotonic() + PEAK_SECONDS
    repetitions = 0
    while repetitions < 3 or time.monotonic() < deadline:
        started = time.perf_counter()
        torch.mm(a, b, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        elapsed = time.perf_counter() - started
        best = min(best, elapsed) if repetitions else best  # the first product warms up
        repetitions += 1
    return 2 * size**3 / best
