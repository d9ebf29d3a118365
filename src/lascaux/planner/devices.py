"""Accelerators as facts with their sources, and what is assumed where none is known.

Rates are in base units (FLOP/s, bytes, bytes/s, watts). The table is
`facts/devices.toml`.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

from lascaux.errors import ConfigError, suggest
from lascaux.planner.facts import read_facts

PRECISIONS = ("fp32", "tf32", "bf16", "fp16", "fp8")
REACHED_SHARE_OF_PEAK = 0.8
"""of a part whose best matrix product nobody published: the middle of those that are known"""
DEVICES_PER_NODE, CHIPS_PER_HOST = 8, 4
USABLE_BYTES_PER_GB = 0.99 * 2**30
"""data sheets say GB where they mean GiB: an H100 of 80 reports 81,559 MiB, and tests of BLOOM took
75 GiB of an A100 of 80"""
ASSUMED_LINK_BYTES_PER_SECOND = {"NVIDIA": (3.2e10, 1.25e10), "AMD": (2e11, 2.5e10)}
ASSUMED_TORUS_BYTES_PER_SECOND = 7e10
"""where the table has no links: inside a node and between nodes; a TPU's torus has no nodes"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """One accelerator, or the processor of a machine."""

    id: str
    vendor: str
    year: int
    peak_flops_per_second: dict[str, float]
    """dense, by precision, as published"""
    reached_flops_per_second: dict[str, float]
    """the best matrix product anyone reached, by precision"""
    memory_bytes: float
    bandwidth_bytes_per_second: float
    power_watts: float | None
    link_bytes_per_second: float
    """to another device of the same node, one direction"""
    network_bytes_per_second: float
    """to another node, for each device, one direction"""
    devices_per_node: int
    """that are linked to each other"""
    devices_per_host: int
    """that share a machine, its disks and its failures"""
    assumed: tuple[str, ...]
    """fields that no source gives"""
    source: str

    def peak(self, precision: str) -> float:
        """The published dense peak, FLOP/s.

        Raises: ConfigError for a precision the part does not have.
        """
        return self._rate(self.peak_flops_per_second, precision)

    def reachable(self, precision: str) -> float:
        """The best rate to be expected of a large matrix product, FLOP/s."""
        known = self.reached_flops_per_second.get(precision)
        return known or REACHED_SHARE_OF_PEAK * self.peak(precision)

    def _rate(self, rates: dict[str, float], precision: str) -> float:
        if precision not in rates:
            raise ConfigError(
                f"{self.id} has no known {precision} rate; known: {', '.join(rates) or 'none'} "
                "(train.precision)"
            )
        return rates[precision]

    @property
    def generation(self) -> str:
        """The part without its memory and form: what speeds are compared within."""
        return self.id.split("-")[0] if not self.id.startswith("TPU") else self.id[:6]


def find_device(name: str) -> Device:
    """The device of this id; case does not matter.

    Raises: ConfigError with the nearest ids.
    """
    rows = device_rows()
    by_name = {row["id"].lower(): row for row in rows}
    row = by_name.get(name.lower())
    if row is None:
        ids = [str(row["id"]) for row in rows]
        nearest = [known for known in ids if known.lower().startswith(name.lower())]
        hint = f"; did you mean {' or '.join(nearest)}?" if nearest else suggest(name, ids)
        raise ConfigError(
            f"unknown device '{name}'{hint}\n`lascaux plan devices` lists the {len(ids)} known ones"
        )
    return make_device(row)


@cache
def device_rows() -> list[dict[str, Any]]:
    """The table of accelerators."""
    return read_facts("devices")["device"]


def make_device(row: dict[str, Any]) -> Device:
    """A row of the table, in base units and with what had to be assumed."""
    assumed = list(row.get("recalled", ()))
    tpu = row["id"].startswith("TPU")
    intra, inter = ASSUMED_LINK_BYTES_PER_SECOND.get(row["vendor"], (2e11, 2.5e10))
    if tpu:
        intra = inter = ASSUMED_TORUS_BYTES_PER_SECOND
    elif row.get("form") != "PCIe" and "SXM" in row["id"]:
        intra = 2.5e11
    if "link_intra_gb_s" in row:
        intra = row["link_intra_gb_s"] * 1e9 / 2  # printed for both directions
    else:
        assumed.append("link_intra_gb_s")
    if "link_inter_gb_s" in row:
        inter = row["link_inter_gb_s"] * 1e9
    else:
        assumed.append("link_inter_gb_s")
    if "bandwidth_tb_s" not in row:
        assumed.append("bandwidth_tb_s")
    peaks = {p: row[f"{p}_tflops"] * 1e12 for p in PRECISIONS if f"{p}_tflops" in row}
    reached = {p: row[f"mamf_{p}_tflops"] * 1e12 for p in PRECISIONS if f"mamf_{p}_tflops" in row}
    if "bf16" in reached and peaks.get("fp16") == peaks["bf16"]:
        reached.setdefault("fp16", reached["bf16"])  # one set of units for both
    return Device(
        id=row["id"],
        vendor=row["vendor"],
        year=row["year"],
        peak_flops_per_second=peaks,
        reached_flops_per_second=reached,
        memory_bytes=row["memory_gb"] * USABLE_BYTES_PER_GB,
        bandwidth_bytes_per_second=row.get("bandwidth_tb_s", 2.0) * 1e12,
        power_watts=row.get("tdp_w"),
        link_bytes_per_second=max(intra, inter),
        network_bytes_per_second=inter,
        devices_per_node=1 << 30 if tpu else DEVICES_PER_NODE,
        devices_per_host=CHIPS_PER_HOST if tpu else DEVICES_PER_NODE,
        assumed=tuple(assumed),
        source=row["source"],
    )


def share_of(device: Device, processes: int) -> Device:
    """What one of several processes of a machine has of its processor."""
    rates = {name: rate / processes for name, rate in device.reached_flops_per_second.items()}
    bandwidth = device.bandwidth_bytes_per_second / processes
    memory = device.memory_bytes / processes
    return processor(rates, bandwidth, memory, device.source, device.assumed)


def processor(
    rates: dict[str, float],
    bandwidth: float,
    memory_bytes: float,
    source: str = "measured on the machine",
    assumed: tuple[str, ...] = ("power_watts",),
) -> Device:
    """The cores of one machine, with rates that were measured or estimated."""
    return Device(
        id="cpu",
        vendor="CPU",
        year=0,
        peak_flops_per_second=rates,
        reached_flops_per_second=rates,
        memory_bytes=memory_bytes,
        bandwidth_bytes_per_second=bandwidth,
        power_watts=None,
        link_bytes_per_second=bandwidth / 8,
        network_bytes_per_second=1e9,
        devices_per_node=64,
        devices_per_host=64,
        assumed=assumed,
        source=source,
    )
