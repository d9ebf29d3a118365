"""The claim checker: every figure of a model card recomputed from the others.

Products (tokens = steps x batch, energy = hours x watts x PUE) are solved for what is not stated
and compared where all is. Speeds go through tokens per second, so that a figure of FLOPs is held
against its own convention and, where it disagrees, against the others. Claims and findings are
defined, read and printed in `claim_text.py`.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import cast

from lascaux.model.accounting import active_parameters, count_parameters
from lascaux.planner.claim_text import (
    EXACT,
    PRODUCTS,
    ROUNDED,
    Claim,
    Finding,
    Known,
    Product,
    Verdict,
    compared,
    solve_products,
    tolerance_of,
)
from lascaux.planner.devices import find_device
from lascaux.planner.facts import read_facts
from lascaux.planner.utilization import (
    WITH_RECOMPUTATION,
    Workload,
    convention_that_explains,
    flops_by_convention,
    other_peaks,
)
from lascaux.units import format_percent

GRIDS_KG_PER_KWH = (0.005, 1.2)
"""from a grid of water power to one of brown coal"""
LEAST_GOODPUT = 0.3
"""half of the worst that was published (OPT-175B, 0.59)"""
DERIVED_LATER = ("pue", "grid_kg_per_kwh", "price_usd_per_device_hour")
"""held against what there is rather than only worked out"""
RATE = "tokens_per_second_per_device"
MODEL_FLOPS = ("6N", "palm", "causal", "all")


def check_claim(claim: Claim) -> list[Finding]:
    """Everything that follows from a claim, held against what it states.

    Raises: ConfigError where the device has no peak of any training precision.
    """
    known = {key: Known(float(value), frozenset({key})) for key, value in claim.figures().items()}
    solve_products(known)
    speeds = _speeds(claim, known)
    solve_products(known)
    findings = _size_findings(claim)
    findings += [found for product in PRODUCTS for found in _product_findings(product, known)]
    findings += _follow_findings(known)
    findings += _flop_findings(speeds) + _wall_findings(speeds)
    return findings + _site_findings(claim, known) + _price_findings(claim, known)


def _product_findings(product: Product, known: Mapping[str, Known]) -> list[Finding]:
    """A product all of whose members are known, its figure not used to derive the others."""
    if not all(key in known for key in product.keys):
        return []
    for key in product.keys:
        others = [known[other] for other in product.keys if other != key]
        stated = known[key].origins == {key}
        if stated and not any(key in other.origins for other in others):
            origins = frozenset[str]().union(*(other.origins for other in others))
            tolerance = tolerance_of(key, *origins, known=known)
            value, recomputed = known[key].value, product.solve(key, known)
            solved = "" if key == product.target else f"{product.target.replace('_', ' ')} = "
            how = solved + product.words
            if _close(value, recomputed, tolerance):
                return [compared(key, value, recomputed, tolerance, "agrees", how)]
            how += _why_apart(key, value, recomputed, known)
            return [compared(key, value, recomputed, tolerance, "differs", how)]
    return []


def _why_apart(key: str, stated: float, recomputed: float, known: Mapping[str, Known]) -> str:
    """What would explain that a product does not come out."""
    ratio = stated / recomputed
    pue = known["pue"].value if "pue" in known and key in ("energy_mwh", "co2_tonnes") else 1.0
    if _close(ratio, 1 / pue, EXACT):
        return f"; agrees without the PUE of {pue:g}"
    if _close(ratio, pue, EXACT):
        return f"; agrees if the PUE of {pue:g} is applied"
    if key == "co2_tonnes":
        return f"; agrees on a grid of {stated / known['energy_mwh'].value:.3g} kg/kWh"
    for factor in (1000.0, 100.0, 24.0, 10.0, 8.0, 2.0):
        if _close(max(ratio, 1 / ratio), factor, EXACT):
            return f"; {'larger' if ratio > 1 else 'smaller'} by a factor of {factor:g}"
    return f"; stated is {ratio:.3g} times that"


def _close(left: float, right: float, tolerance: float) -> bool:
    return abs(math.log(left / right)) <= tolerance


def _follows(
    key: str, value: float, how: str, band: Iterable[float] = (), verdict: Verdict = "follows"
) -> Finding:
    spread = [value, *band]
    return Finding(key, None, value, min(spread), max(spread), verdict, how)


def _follow_findings(known: Mapping[str, Known]) -> list[Finding]:
    """What was not stated and is now known."""
    return [
        _follows(key, each.value, f"from {', '.join(sorted(each.origins)).replace('_', ' ')}")
        for key, each in known.items()
        if key not in each.origins and key not in DERIVED_LATER
    ]


def _size_findings(claim: Claim) -> list[Finding]:
    """Parameters against the shape; names of models round."""
    if claim.model is None:
        return []
    counted, found = {"parameters": count_parameters(claim.model).total}, list[Finding]()
    if claim.model.num_experts:
        counted["active_parameters"] = active_parameters(claim.model)
    for key, total in counted.items():
        stated, how = cast(int | None, getattr(claim, key)), "counted from the shape"
        if stated is None:
            found.append(_follows(key, total, how))
        else:
            verdict: Verdict = "agrees" if _close(stated, total, ROUNDED) else "differs"
            found.append(compared(key, stated, total, ROUNDED, verdict, how))
    return found


@dataclass(frozen=True, slots=True)
class _Speeds:
    """What the findings of speed share."""

    claim: Claim
    known: Mapping[str, Known]
    table: dict[str, float]
    """FLOPs of a token by convention; empty: neither shape nor parameters are known"""
    workload: Workload
    peak: float
    source: str
    """the stated key that the tokens per second come from; empty: none; a peak of 0: no device"""

    def label(self, key: str) -> str:
        """The convention of a figure, or the one to assume."""
        wanted, other = self.claim.counts or "palm", "hardware" if key == "hfu" else "palm"
        hardware = wanted in WITH_RECOMPUTATION
        if key == "hfu":
            wanted = wanted if hardware else other
        elif hardware and getattr(self.claim, key) is None:
            wanted = other
        elif hardware and key == "mfu" and self.claim.tflops_per_device is not None:
            wanted = other
        simple = "8N-body" if wanted in WITH_RECOMPUTATION else "6N"
        return next(name for name in (wanted, simple, "6N") if name in self.table)

    def labelled(self, key: str) -> bool:
        """Whether the claim says what the figure counts."""
        if key == "hfu":
            return self.claim.recompute is not None
        return self.claim.counts == self.label(key)

    @property
    def other_peaks(self) -> dict[str, float]:
        """What may be taken for the peak, as fractions of it."""
        device = self.workload.device
        rates = other_peaks(device, self.workload.precision) if device else {}
        return {words: each / self.peak for words, each in rates.items()}


def _speeds(claim: Claim, known: dict[str, Known]) -> _Speeds:
    """The speed of the claim, from its most direct figure."""
    device, model = find_device(claim.device) if claim.device else None, claim.model
    peaks = device.peak_flops_per_second if device else {}
    usual = "fp16" if device and device.year < 2020 else "bf16"
    if any(each.verdict == "differs" for each in _size_findings(claim)):
        model = None  # its FLOPs would be those of another network
    workload = Workload(
        model=model,
        seq_len=claim.seq_len or (model.max_context if model else None),
        device=device,
        precision=claim.precision or (usual if usual in peaks else next(iter(peaks), usual)),
        recompute=claim.recompute or "full",
        stated_parameters=claim.active_parameters or claim.parameters,
    )
    table, peak = flops_by_convention(workload), workload.peak("published") if device else 0.0
    found = _Speeds(claim, known, table, workload, peak, "")
    if not table:
        return found
    if RATE in known:
        return replace(found, source=min(known[RATE].origins & {RATE, "step_seconds"}))
    for key, unit in (("tflops_per_device", 1e12), ("mfu", peak), ("hfu", peak)):
        if key in known and unit:
            rate = known[key].value * unit / table[found.label(key)]
            known[RATE] = Known(rate, frozenset({key}))
            return replace(found, source=key)
    return found


def _flop_findings(speeds: _Speeds) -> list[Finding]:
    """TFLOP/s, utilization and total FLOPs under the convention of each."""
    known, claim, scales = speeds.known, speeds.claim, dict[str, float]()
    if not speeds.table:  # TFLOP/s over the peak, whatever both count
        scale = (claim.tflops_per_device or 0.0) * 1e12 / (speeds.peak or math.inf)
        alike = replace(speeds, source="tflops_per_device", table={"6N": 1.0, "8N-body": 1.0})
        stated = [key for key in ("mfu", "hfu") if scale and getattr(claim, key)]
        return [_flop_finding(alike, key, scale) for key in stated]
    if RATE in known:
        rate = known[RATE].value
        scales = {"tflops_per_device": rate / 1e12}
        scales |= {key: rate / speeds.peak for key in ("mfu", "hfu") if speeds.peak}
    if "tokens" in known:
        scales["total_flop"] = known["tokens"].value
    found: list[Finding] = []
    for key, scale in scales.items():
        idle = key == "hfu" and claim.recompute in (None, "none") and claim.hfu is None
        if key != speeds.source and not idle:
            found.append(_flop_finding(speeds, key, scale))
    if claim.mfu and "mfu" in scales and speeds.label("mfu") != "palm" and "palm" in speeds.table:
        value = speeds.table["palm"] * scales["mfu"]
        found.append(_follows("mfu_palm", value, "the same speed as PaLM counts"))
    return found


def _flop_finding(speeds: _Speeds, key: str, scale: float) -> Finding:
    """One figure against what its convention gives and, where it differs, the others."""
    label, stated = speeds.label(key), cast(float | None, getattr(speeds.claim, key))
    recomputed = speeds.table[label] * scale
    partly = () if speeds.labelled("hfu") else ("palm", "selective", "hardware")
    names = partly if key == "hfu" else MODEL_FLOPS
    band = [speeds.table[name] * scale for name in names if name in speeds.table]
    source = speeds.source if key != "total_flop" else "tokens"
    alike = source == "tflops_per_device" and label == speeds.label(source)
    how = f"from {source.replace('_', ' ')}, counted " + ("alike" if alike else f"as '{label}'")
    if key in ("mfu", "hfu") and min([recomputed, *band]) > 1:
        how += f"; {_of_other_peaks(speeds, recomputed)}"
        return replace(_follows(key, recomputed, how, band, "impossible"), stated=stated)
    if key == "total_flop":
        counts = [name for name in (*MODEL_FLOPS, "hardware") if name in speeds.table]
        how += f" ({', '.join(f'{name} {speeds.table[name] * scale:.3g}' for name in counts)})"
    if stated is None:
        return _follows(key, recomputed, how, band)
    tolerance = tolerance_of(key, source, known=speeds.known)
    if _close(stated, recomputed, tolerance):
        return compared(key, stated, recomputed, tolerance, "agrees", how)
    ratio = stated / recomputed
    peaks = speeds.other_peaks if key in ("mfu", "hfu") else {}
    why = convention_that_explains(ratio, label, speeds.table, peaks, tolerance)
    open_label = not speeds.labelled(key)
    within = bool(band) and min(band) <= stated <= max(band)
    if why is None and key == "hfu" and open_label and within:
        share = (stated - min(band)) / (max(band) - min(band))
        why = f"{format_percent(share)} of the forward pass is computed again"
    if why:
        verdict: Verdict = "unknown convention" if open_label else "differs"
        how += f"; agrees if {why}"
        return compared(key, stated, recomputed, tolerance, verdict, how)
    if key not in ("mfu", "hfu"):
        how += f"; stated is {ratio:.3g} times that"
    else:
        needed, peak = speeds.peak / ratio / 1e12, speeds.peak / 1e12
        how += f"; would need a peak of {needed:.4g} TFLOP/s a device, not {peak:.4g}"
    return compared(key, stated, recomputed, tolerance, "differs", how)


def _of_other_peaks(speeds: _Speeds, value: float) -> str:
    higher = {words: value / each for words, each in speeds.other_peaks.items() if each > 1}
    would = [f"{format_percent(each)} of {words}" for words, each in higher.items()]
    return f"would be {' or '.join(would)}" if would else "faster than the device can be"


def _wall_findings(speeds: _Speeds) -> list[Finding]:
    """What the device hours of the whole run say of the speed."""
    known, claim, found = speeds.known, speeds.claim, list[Finding]()
    paid = known["device_hours"].value if "device_hours" in known else None
    tokens = known["tokens"].value if "tokens" in known else None
    if speeds.source and tokens:
        ideal = tokens / known[RATE].value / 3600
        words = f"steps alone, at the stated {speeds.source.replace('_', ' ')}"
        if paid is None:
            found.append(_follows("device_hours", ideal, words))
            if claim.devices:
                found.append(_follows("wall_days", ideal / claim.devices / 24, words))
        elif speeds.source not in ("mfu", "hfu"):
            found.append(_goodput(speeds, ideal / paid, words))
    if paid is None or not speeds.peak:
        return found
    whole = paid * 3600 * speeds.peak
    if tokens and speeds.table:
        label = speeds.label("mfu")
        value = speeds.table[label] * tokens / whole
        band = [speeds.table[each] * tokens / whole for each in MODEL_FLOPS if each in speeds.table]
        how = f"tokens and device hours, counted as '{label}'"
        found.append(_wall_finding(speeds, "mfu_wall", value, band, how))
    if claim.total_flop:
        value = claim.total_flop / whole
        how = "its own total of FLOPs and device hours"
        found.append(_wall_finding(speeds, "flop_utilization_wall", value, [value], how))
    return found


def _goodput(speeds: _Speeds, value: float, words: str) -> Finding:
    """Time in steps over time paid."""
    keys = ("wall_days", "device_hours", speeds.source)
    over = math.log(value) - tolerance_of(*keys, known=speeds.known)
    verdict: Verdict = "differs" if over > 0 or value < LEAST_GOODPUT else "follows"
    verdict = "impossible" if over > 0.1 else verdict
    how = f"{words}, over the time paid" + ("; steps outlast the run" if over > 0 else "")
    return _follows("goodput", value, how, verdict=verdict)


def _wall_finding(speeds: _Speeds, key: str, value: float, band: list[float], how: str) -> Finding:
    """A utilization over the whole run, against the stated one of its steps."""
    stated = speeds.claim.mfu
    if min([value, *band]) > 1:
        how += f"; {_of_other_peaks(speeds, value)}"
        return replace(_follows(key, value, how, band, "impossible"), stated=stated)
    if stated is None:
        return _follows(key, value, how, band)
    goodput, keys = value / stated, ("mfu", "device_hours", "wall_days")
    tolerance = tolerance_of(*keys, known=speeds.known)
    if _close(stated, value, tolerance):
        verdict: Verdict = "agrees"
    elif LEAST_GOODPUT <= goodput < 1:
        verdict = "unknown convention"
        how += f"; agrees if the run spent {format_percent(goodput)} of its time in steps"
    else:
        cannot = goodput > 1 and key == "mfu_wall" and speeds.labelled("mfu")
        verdict = "impossible" if cannot else "differs"
        how += f"; {goodput:.3g} times the stated one" + ("; steps outlast the run" * cannot)
    return compared(key, stated, value, tolerance, verdict, how)


def _site_findings(claim: Claim, known: Mapping[str, Known]) -> list[Finding]:
    """PUE and grid within what there is."""
    found: list[Finding] = []
    if "pue" in known and (claim.pue is None or claim.pue < 1 - ROUNDED):
        pue, how = known["pue"].value, "energy / (device hours x watts)"
        below = pue < 1 - ROUNDED
        how += "; a site cannot use less than its devices" if below else ""
        row = _follows("pue", pue, how, verdict="impossible" if below else "follows")
        found.append(replace(row, stated=claim.pue))
    stated, energies = claim.grid_kg_per_kwh, _energies(known)
    if stated is not None:
        grids, how = [stated], "stated"
    elif claim.co2_tonnes is not None and energies:
        grids, how = [claim.co2_tonnes / energy for energy in energies], "CO2 / energy"
    else:
        return found
    (least, most), middle = GRIDS_KG_PER_KWH, math.sqrt(min(grids) * max(grids))
    outside = max(grids) < least or min(grids) > most
    if outside:
        how += f"; grids have {least:g} to {most:g} kg/kWh"
        how += f"; {middle / 1000:.3g} if per MWh" if least <= middle / 1000 <= most else ""
    verdict: Verdict = "impossible" if outside else "follows"
    row = replace(_follows("grid_kg_per_kwh", middle, how, grids, verdict), stated=stated)
    return [*found, row] if outside or stated is None else found


def _energies(known: Mapping[str, Known]) -> list[float]:
    """MWh of the run, or least and most with the PUEs there are."""
    if "energy_mwh" in known:
        return [known["energy_mwh"].value]
    if "device_hours" not in known or "average_watts" not in known:
        return []
    mwh = known["device_hours"].value * known["average_watts"].value / 1e6
    return [mwh, mwh * read_facts("costs")["interval90"]["pue_other"]["high"]]


def _price_findings(claim: Claim, known: Mapping[str, Known]) -> list[Finding]:
    """The price of a device hour against what it cost to rent in the year, or in any."""
    key = "price_usd_per_device_hour"
    if key not in known or claim.device is None:
        return []
    device, year = find_device(claim.device).id, int((claim.price_date or "0")[:4])
    rows = [row for row in read_facts("prices")["price"] if device in row["covers"]]
    in_year = [row for row in rows if row["year"] <= year <= row.get("year_last", row["year"])]
    when = str(year) if in_year else "any year on record"
    keys = ("on_demand_min", "on_demand_median", "on_demand_max", "committed_1yr", "committed_3yr")
    prices = [row[key] for row in in_year or rows for key in keys if key in row]
    if not prices:
        return []
    low, high = min(prices), max(prices)
    value = known[key].value
    inside = low * (1 - ROUNDED) <= value <= high * (1 + ROUNDED)
    beyond = "; hardware of one's own costs less" if value < low else "; more than anybody paid"
    how = f"rented for {low:g} to {high:g} $ in {when}" + ("" if inside else beyond)
    verdict: Verdict = "agrees" if inside else "differs"
    return [Finding(key, claim.price_usd_per_device_hour, value, low, high, verdict, how)]
