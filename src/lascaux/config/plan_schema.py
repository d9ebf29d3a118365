"""The section `plan` of the settings: circumstances that `lascaux plan` reckons with.

Strings below fields are help texts, as in `schema.py`.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanConfig:
    """What a run is planned for: hardware, prices and circumstances."""

    device: str | None = None
    """accelerator, as `lascaux plan devices` lists them; unset: this machine"""
    devices: int | None = None
    """how many; unset: what the axes of `parallel` need"""
    stack: str = "lascaux"
    """code that trains, as `lascaux plan scorecard` lists them; "unknown": any"""
    recompute: Literal["as_trained", "none", "selective", "full"] = "as_trained"
    """activations made again in the backward pass: as train.recompute says, none, the attention core, or all of a block"""
    zero: int | None = None
    """what data parallelism shards: 0 nothing, 1 optimizer, 2 and gradients, 3 and weights; unset: as dp_shard and dp_replicate say"""
    sequence_parallel: bool | None = None
    """tp splits the residual stream along the sequence too; unset: yes, but for other code that recomputes all of a block"""
    attention: Literal["fused", "unfused"] | None = None
    """unfused: attention keeps its T x T matrices; unset: fused, but for other code that recomputes attention, or blocks under tp"""
    year: int | None = None
    """rental prices of this year; unset: the newest known"""
    price_usd_per_device_hour: float | None = None
    """a price you were offered, instead of the table's; needs plan.price_date"""
    price_date: str | None = None
    """when that price was offered, YYYY-MM"""
    power_watts: float | None = None
    """average draw of a device with its share of the server; unset: from its rated power"""
    pue: float | None = None
    """energy of the building over that of the machines; unset: 1.05 to 1.4"""
    grid_kg_per_kwh: float | None = None
    """CO2 of a kilowatt-hour; unset: 0.07 to 1.0"""
    device_hours_between_failures: float | None = None
    """device-hours to a failure that stops the run; unset: 5,000 to 150,000"""
    experiment_factor: float | None = None
    """all compute of the project over the final run; unset: 1 to 6"""
    staff_usd: float | None = None
    """salaries, beside the compute; unset: left out"""
    budget_usd: float | None = None
    """most that the final run may cost on demand; layouts are held against it"""
    scenario: str | None = None
    """for `plan deploy`: a stated use, as its error lists them"""
    tokens_per_day: float | None = None
    """for `plan deploy`: tokens to generate each day"""
    years_ahead: int = 10
    """for `plan capability`: how far to go"""
    seed: int = 0
    """of the draws behind every interval"""
