"""What this machine can do at most: matrix products in each dtype, and moving memory."""

from dataclasses import dataclass, field

import torch

from lascaux.parallel.hardware import (
    measure_bandwidth,
    measure_matmul_peak,
    measure_read_bandwidth,
)
from lascaux.train.precision import DTYPES


@dataclass(slots=True)
class Peaks:
    """The best of all measurements so far, since other work only slows a machine down."""

    matmul_flops_per_second: dict[str, float] = field(default_factory=dict)
    """by precision; square products of 1,024 or 2,048, on a GPU 8,192"""
    bandwidth_bytes_per_second: float = 0.0
    """of a copy, bytes read and written together"""
    read_bytes_per_second: float = 0.0
    """of a sum; measured for generation alone"""

    def measure_products(self, device: torch.device) -> dict[str, float]:
        """Measure matrix products once more, keep what is better, return what was found now."""
        now: dict[str, float] = {}
        for precision, dtype in DTYPES.items():
            if precision == "fp16" and device.type == "cpu":
                continue  # some hundred times slower than fp32, and nothing trains in it
            now[precision] = measure_matmul_peak(device, dtype)
            before = self.matmul_flops_per_second.get(precision, 0.0)
            self.matmul_flops_per_second[precision] = max(before, now[precision])
        return now

    def measure_bandwidth(self, device: torch.device) -> None:
        """Measure a copy once more and keep what is better; takes half a GiB, on a GPU two."""
        bandwidth = measure_bandwidth(device)
        self.bandwidth_bytes_per_second = max(self.bandwidth_bytes_per_second, bandwidth)

    def measure_reading(self, device: torch.device) -> None:
        """Measure a sum over memory once more and keep what is better."""
        found = measure_read_bandwidth(device)
        self.read_bytes_per_second = max(self.read_bytes_per_second, found)
