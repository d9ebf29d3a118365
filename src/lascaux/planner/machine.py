"""This machine as a device, without torch: its GPU by name, or its processor, measured shortly.

`lascaux plan --probe` and `lascaux train` note what they measure in a file of the user's cache; it
is used as long as the machine has the same processor and cores.
"""

import json
import os
import platform
import re
import subprocess
import time
from dataclasses import asdict, dataclass, field
from datetime import date
from functools import cache
from pathlib import Path

import numpy as np

from lascaux.errors import ConfigError
from lascaux.parallel.runtime import cache_folder
from lascaux.planner.devices import Device, device_rows, find_device, processor

PRODUCT_SIDE = 1024
PRODUCT_SECONDS = 0.25
BUSY_LOAD_PER_CORE = 0.4
"""waiting processes for each core, above which what is measured is not what the machine can do"""
BF16_SPEEDUP = {"amx_bf16": 8.0, "avx512_bf16": 4.0}
"""over fp32, by the processor's flag; of the second we measured 4.4"""
COPY_BYTES = 1 << 26
MOST_OUTCOMES = 50


@dataclass(frozen=True, slots=True)
class Outcome:
    """A finished run beside the plan that was made before it."""

    work: str
    """model, batch and layout, as `job_key` writes them"""
    precision: str
    ln_ratio: float
    """ln(step seconds / predicted by the formulas alone)"""
    memory_ln_ratio: float
    """ln(bytes / ledger)"""
    when: str


@dataclass(slots=True)
class Known:
    """What was measured on this machine."""

    processor: str
    """or the GPU, where there is one"""
    cores: int
    rates: dict[str, float] = field(default_factory=dict)
    """FLOP/s of matrix products, by precision"""
    bandwidth_bytes_per_second: float | None = None
    when: str = ""
    outcomes: list[Outcome] = field(default_factory=list)


def this_machine() -> Device:
    """The GPU of this machine, else its processor.

    Raises: ConfigError for a GPU that is not in the table.
    """
    gpu = _gpu_name()
    if gpu is not None:
        return gpu_device(gpu)
    known = read_known()
    if known.rates and known.bandwidth_bytes_per_second:
        return processor(
            known.rates,
            known.bandwidth_bytes_per_second,
            memory_bytes(),
            source=f"measured on this machine by Lascaux, {known.when}",
        )
    rates = {"fp32": _product_rate()}
    flags = _flags()
    for flag, speedup in BF16_SPEEDUP.items():
        if flag in flags:
            rates["bf16"] = rates["fp32"] * speedup
            break
    return processor(
        rates,
        copy_rate(),
        memory_bytes(),
        source="a product and a copy by numpy, measured now; bf16 by the processor's flags",
        assumed=("bf16 rate", "power_watts"),
    )


def is_busy() -> bool:
    """Whether other processes have kept the cores of this machine busy in the last minute."""
    try:
        load = os.getloadavg()[0]
    except OSError:
        return False
    return load > BUSY_LOAD_PER_CORE * len(os.sched_getaffinity(0))


def known_path() -> Path:
    """Where measurements of this machine are kept."""
    return cache_folder() / "machine.json"


def read_known() -> Known:
    """What was measured before on this processor, or nothing."""
    here = Known(processor=_gpu_name() or _processor_name(), cores=len(os.sched_getaffinity(0)))
    try:
        saved = json.loads(known_path().read_text(encoding="utf-8"))
        outcomes = [Outcome(**each) for each in saved.pop("outcomes")]
        known = Known(**saved, outcomes=outcomes)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return here
    same = (known.processor, known.cores) == (here.processor, here.cores)
    return known if same else here


def note_rates(rates: dict[str, float], bandwidth: float | None) -> None:
    """Keep measured rates for the next plan; where the cache cannot be written nothing is kept."""
    known = read_known()
    known.rates = known.rates | rates
    known.bandwidth_bytes_per_second = bandwidth or known.bandwidth_bytes_per_second
    known.when = date.today().isoformat()
    write_known(known)


def note_outcome(outcome: Outcome) -> None:
    """Keep how a run turned out beside its plan, for the next one."""
    known = read_known()
    known.outcomes = [*known.outcomes, outcome][-MOST_OUTCOMES:]
    write_known(known)


def write_known(known: Known) -> None:
    """Replace the file at once."""
    path = known_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps(asdict(known), indent=1) + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError:
        return  # a cache that cannot be written costs the next plan its precision, nothing else


def memory_bytes() -> float:
    """Memory of this machine."""
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


@cache
def _gpu_name() -> str | None:
    """What the driver calls the first GPU; None without driver or GPU."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip().splitlines()[0] if found.stdout.strip() else None


def gpu_device(name: str) -> Device:
    """The row of the table that a driver's name means."""
    words = name.replace(",", " ").replace("-", " ").upper().split()
    form = "PCIE" if "PCIE" in words else "SXM"
    printed = re.search(r"(\d+) ?GB", name)
    listed = re.search(r"(\d+) MiB", name)
    gigabytes = int(printed[1]) if printed else int(listed[1]) / 1024 if listed else 0
    candidates = [
        row
        for row in device_rows()
        if row["vendor"] == "NVIDIA"
        and set(row["id"].upper().split("-")[: 2 if row["id"].startswith("RTX") else 1])
        <= set(words)
    ]
    fitting = [row for row in candidates if form in row["id"].upper() or "RTX" in row["id"]]
    rows = fitting or candidates
    if not rows:
        raise ConfigError(
            f"this machine's GPU, '{name}', is not in the table; plan for a device of "
            "`lascaux plan devices` with --device"
        )
    return find_device(min(rows, key=lambda row: abs(row["memory_gb"] - gigabytes))["id"])


def _processor_name() -> str:
    for line in _cpuinfo():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _flags() -> set[str]:
    for line in _cpuinfo():
        if line.startswith("flags"):
            return set(line.split(":", 1)[1].split())
    return set()


def _cpuinfo() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def _product_rate() -> float:
    """The best of some fp32 products, FLOP/s."""
    a = np.ones((PRODUCT_SIDE, PRODUCT_SIDE), np.float32)
    best, until = 0.0, time.perf_counter() + PRODUCT_SECONDS
    while time.perf_counter() < until:
        started = time.perf_counter()
        _ = a @ a
        best = max(best, 2 * PRODUCT_SIDE**3 / (time.perf_counter() - started))
    return best


def copy_rate() -> float:
    """The best of three copies, bytes read and written together."""
    source = np.zeros(COPY_BYTES, np.uint8)
    target = np.zeros_like(source)
    best = 0.0
    for _ in range(3):
        started = time.perf_counter()
        np.copyto(target, source)
        best = max(best, 2 * COPY_BYTES / (time.perf_counter() - started))
    return best
