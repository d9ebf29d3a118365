"""The hardware beneath a process: cores, memory, and how fast it multiplies and copies."""

import math
import os
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Literal

import torch

PEAK_SECONDS = 0.3
SLOW_PRODUCT_SECONDS = 0.1
WORTHWHILE = 1.5  # how many times the speed of fp32 makes bf16 the default

Precision = Literal["auto", "fp32", "bf16", "fp16"]


def choose_precision(device: torch.device) -> Precision:
    """bf16 where the hardware multiplies it faster than fp32, else fp32.

    Measured on a CPU: whether it has the instructions is answered differently on each kind.
    """
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    fp32 = measure_matmul_peak(device, torch.float32)
    bf16 = measure_matmul_peak(device, torch.bfloat16)
    return "bf16" if bf16 > WORTHWHILE * fp32 else "fp32"


@cache
def has_bf16_products(device: torch.device, cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the hardware multiplies bf16 itself, by what it says; False where it says nothing.

    Not measured, so that the same machine always answers alike.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if not cpuinfo.exists():
        return False
    words = set(cpuinfo.read_text().split())
    return not words.isdisjoint({"avx512_bf16", "amx_bf16", "bf16"})


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


def free_bytes(
    device: torch.device,
    meminfo: Path = Path("/proc/meminfo"),
    cgroup: Path = Path("/sys/fs/cgroup"),
) -> int:
    """Memory that may be taken without putting other programs out; all where none can tell.

    At most what a container's limit leaves.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = memory_bytes(device)
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
    limit, used = cgroup / "memory.max", cgroup / "memory.current"
    if limit.exists() and used.exists() and limit.read_text().strip() != "max":
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return free


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


def measure_read_bandwidth(device: torch.device) -> float:
    """Bytes read in a second by a sum over memory much larger than any cache."""
    size = 2**30 if device.type == "cuda" else 2**28
    source = torch.zeros(size // 4, dtype=torch.float32, device=device)
    return size / fastest(source.sum, device, time.monotonic() + PEAK_SECONDS)


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
