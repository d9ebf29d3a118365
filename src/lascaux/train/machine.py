"""What this run computes on, and how fast its matrix products can be."""

import ctypes
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch

from lascaux.config.schema import TrainConfig
from lascaux.errors import ConfigError
from lascaux.parallel.runtime import Process, threads_asked_for
from lascaux.train.precision import DTYPES
from lascaux.units import format_flops_per_second

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX, M_ARENA_MAX = -1, -2, -4, -8  # <malloc.h>
PEAK_SECONDS = 0.3
SLOW_PRODUCT_SECONDS = 0.1
WORTHWHILE = 1.5  # how many times the speed of fp32 makes bf16 the default

Precision = Literal["auto", "fp32", "bf16", "fp16"]


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


def choose_precision(device: torch.device) -> Precision:
    """bf16 where the hardware multiplies it faster than fp32, else fp32.

    Measured on a CPU: whether it has the instructions is answered differently on each kind.
    """
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    fp32 = measure_matmul_peak(device, torch.float32)
    bf16 = measure_matmul_peak(device, torch.bfloat16)
    return "bf16" if bf16 > WORTHWHILE * fp32 else "fp32"


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


def usable_cores() -> int:
    """Physical cores this process may keep busy, by affinity and by a container's quota.

    Where the system tells neither, all hardware threads.
    """
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    cores = {siblings(cpu) for cpu in os.sched_getaffinity(0)}
    quota = cpu_quota()
    return len(cores) if quota is None else max(1, min(len(cores), math.ceil(quota)))


def siblings(cpu: int) -> str:
    """The hardware threads that share the core of this one, as the kernel lists them."""
    path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
    return path.read_text().strip() if path.exists() else str(cpu)


def cpu_quota(cgroup: Path = Path("/sys/fs/cgroup")) -> float | None:
    """Cores' worth of time a container may use; None without a limit.

    Only the group seen at the root is asked: a container's own, not a service's within a machine.
    """
    unified, quota = cgroup / "cpu.max", cgroup / "cpu" / "cpu.cfs_quota_us"
    if unified.exists():
        limit, period = unified.read_text().split()
    elif quota.exists():
        limit, period = quota.read_text(), quota.with_name("cpu.cfs_period_us").read_text()
    else:
        return None
    return None if limit.strip() in ("max", "-1") else int(limit) / int(period)


def memory_bytes(device: torch.device) -> int:
    """Memory of the device; of the whole machine for a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


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


def measure_matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest of repeated square matrix products: the peak that MFU refers to.

    The fastest, because other work on a shared machine only ever slows a product down.
    """
    sizes = (8192,) if device.type == "cuda" else (1024, 2048)
    deadline = time.monotonic() + PEAK_SECONDS
    peak = 0.0
    for size in sizes:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        seconds = fastest(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), device, deadline)
        peak = max(peak, 2 * size**3 / seconds)
        if seconds > SLOW_PRODUCT_SECONDS:
            break  # no hardware for this dtype; a larger product would take seconds
        deadline = time.monotonic() + PEAK_SECONDS
    return peak


def measure_bandwidth(device: torch.device) -> float:
    """Bytes read and written in a second by a copy much larger than any cache."""
    size = 2**30 if device.type == "cuda" else 2**28
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    deadline = time.monotonic() + PEAK_SECONDS
    return 2 * size / fastest(lambda: target.copy_(source), device, deadline)


def fastest(work: Callable[[], object], device: torch.device, deadline: float) -> float:
    """Seconds of the fastest of several runs up to the deadline, the first not counted."""
    best, repetitions = math.inf, 0
    while repetitions < 3 or time.monotonic() < deadline:
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        elapsed = time.perf_counter() - started
        best = min(best, elapsed) if repetitions else best  # the first run warms up
        repetitions += 1
    return best
