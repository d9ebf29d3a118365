"""Claims as people write and read them: from a file, flags or a published run, and as a table.

A claim is what somebody states of a training run, all of it optional; `claims.py` checks it.
A file has the keys of `Claim`, and for the model `preset = "gpt3-175b"` or a table [model].
"""

import math
import typing
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, cast

from lascaux.config.check import check_model, check_ranges
from lascaux.config.load import (
    Setting,
    build_config,
    convert,
    preset_names,
    read_flags,
    read_preset,
    read_toml,
)
from lascaux.config.schema import ModelConfig
from lascaux.errors import ConfigError, suggest
from lascaux.planner.claim_words import in_words
from lascaux.planner.devices import find_device
from lascaux.planner.job import Recompute
from lascaux.planner.runs import PublishedRun, find_run, published_runs
from lascaux.planner.utilization import Numerator, why_above_one
from lascaux.units import format_count, format_duration, format_percent

Verdict = Literal["impossible", "differs", "unknown convention", "agrees", "follows"]
"""from bad to good; follows: not stated, worked out from what is"""
EXACT, ROUNDED = 0.01, 0.03
"""disagreement that arithmetic may show, and at most where figures are printed with few digits"""
COUNTS = ("devices", "steps", "tokens", "batch_tokens", "seq_len")
"""whole numbers, which nobody rounds"""
LEAST, MOST = 1e-30, 1e40
"""no figure of a run is outside"""
SHAPE = ("num_layers", "d_model", "num_heads", "d_ff", "vocab_size")
"""settings without which the FLOPs of a published run cannot be counted"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """What somebody states of a training run; None is not stated.

    Raises: ConfigError for a figure that is not above 0, a utilization above 1, an unknown device,
    a precision that it does not have, a price date without a year.
    """

    name: str = "claim"
    model: ModelConfig | None = None
    parameters: int | None = None
    active_parameters: int | None = None
    tokens: int | None = None
    steps: int | None = None
    batch_tokens: int | None = None
    seq_len: int | None = None
    device: str | None = None
    devices: int | None = None
    precision: str | None = None
    recompute: Recompute | None = None
    wall_days: float | None = None
    device_hours: float | None = None
    step_seconds: float | None = None
    tokens_per_second_per_device: float | None = None
    tflops_per_device: float | None = None
    mfu: float | None = None
    hfu: float | None = None
    counts: Numerator | None = None
    """what the stated TFLOP/s and total_flop count, and the mfu where no TFLOP/s are stated"""
    total_flop: float | None = None
    average_watts: float | None = None
    pue: float | None = None
    energy_mwh: float | None = None
    grid_kg_per_kwh: float | None = None
    co2_tonnes: float | None = None
    cost_usd: float | None = None
    price_usd_per_device_hour: float | None = None
    price_date: str | None = None
    """a year, or a date that begins with it"""

    def __post_init__(self) -> None:
        for key, value in self.figures().items():
            if not LEAST < value < MOST:
                raise ConfigError(f"{self.name}: '{key}' must be above 0; got {str(value)[:20]}")
            if key in ("mfu", "hfu") and value > 1:
                hint = why_above_one(value, "palm" if key == "mfu" else "hardware")
                raise ConfigError(f"{self.name}: '{key}' cannot be above 1; got {value:g}; {hint}")
        if self.device is not None:
            device = find_device(self.device)
            if self.precision is not None:
                device.peak(self.precision)
        if self.price_date is not None and not self.price_date[:4].isdecimal():
            raise ConfigError(
                f"{self.name}: 'price_date' must begin with a year; got '{self.price_date}'"
            )

    def figures(self) -> dict[str, float]:
        """The numbers that are stated, by key."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {key: value for key, value in values.items() if isinstance(value, (int, float))}


@dataclass(frozen=True, slots=True)
class Finding:
    """One quantity recomputed from the others, in the units of its key in `Claim`."""

    quantity: str
    stated: float | None
    recomputed: float
    low: float
    high: float
    """the band in which a stated figure agrees; of one that is not, what the conventions span"""
    verdict: Verdict
    how: str


@dataclass(frozen=True, slots=True)
class Known:
    """A value, stated or derived, and the stated keys it comes from."""

    value: float
    origins: frozenset[str]


@dataclass(frozen=True, slots=True)
class Product:
    """target = factor x members, each to its power."""

    target: str
    factor: float
    powers: Mapping[str, int]
    words: str

    @property
    def keys(self) -> list[str]:
        """The target, then the members."""
        return [self.target, *self.powers]

    def solve(self, key: str, known: Mapping[str, Known]) -> float:
        """The value of one key from the others."""
        powers = {**self.powers, self.target: -1}
        rest = math.prod(known[other].value ** powers[other] for other in powers if other != key)
        return (self.factor * rest) ** (-1 / powers[key])


PRODUCTS = (
    Product("tokens", 1, {"steps": 1, "batch_tokens": 1}, "steps x batch"),
    Product("device_hours", 24, {"wall_days": 1, "devices": 1}, "days x 24 x devices"),
    Product(
        "step_seconds",
        1,
        {"batch_tokens": 1, "tokens_per_second_per_device": -1, "devices": -1},
        "batch / (tokens per second x devices)",
    ),
    Product(
        "energy_mwh",
        1e-6,
        {"device_hours": 1, "average_watts": 1, "pue": 1},
        "device hours x watts x PUE",
    ),
    Product("co2_tonnes", 1, {"energy_mwh": 1, "grid_kg_per_kwh": 1}, "energy x grid"),
    Product(
        "cost_usd", 1, {"device_hours": 1, "price_usd_per_device_hour": 1}, "device hours x price"
    ),
)


def solve_products(known: dict[str, Known]) -> None:
    """Derive what single products determine, until nothing is new."""
    new = True
    while new:
        new = False
        for product in PRODUCTS:
            missing = [key for key in product.keys if key not in known]
            if len(missing) == 1:
                rest = [known[key].origins for key in product.keys if key in known]
                origins = frozenset[str]().union(*rest)
                known[missing[0]] = Known(product.solve(missing[0], known), origins)
                new = True


def tolerance_of(*keys: str, known: Mapping[str, Known]) -> float:
    """Relative disagreement that the printed digits allow, from 1 to 3 %."""
    rounded = (key for key in set(keys) if key in known and key not in COUNTS)
    halves = sum(_half_digit(known[key].value) for key in rounded)
    return min(ROUNDED, max(EXACT, halves))


def _half_digit(value: float) -> float:
    """Half a unit of the last digit that a number is printed with, relative to it."""
    digits = f"{value:.11e}".split("e")[0].replace(".", "").rstrip("0")
    leading = float(f"{value:e}".split("e")[0])
    return 0.5 * 10.0 ** (1 - len(digits)) / leading


def compared(
    key: str, stated: float, recomputed: float, tolerance: float, verdict: Verdict, how: str
) -> Finding:
    """A stated figure beside what it should be."""
    low, high = recomputed * math.exp(-tolerance), recomputed * math.exp(tolerance)
    return Finding(key, stated, recomputed, low, high, verdict, how)


# ------------------------------------------------------------------------------------ reading


def claim_of_run(run: PublishedRun) -> Claim:
    """What a row of the table of published runs states."""
    row, published = run.row, run.published
    values: dict[str, Any] = {"name": run.name}
    for key in [field.name for field in fields(Claim) if field.name not in ("name", "model")]:
        value = published.get(key, row.get(key))
        if value is not None and not (key == "device" and value == "cpu"):
            values[key] = value
    if set(SHAPE) <= set(row.get("model", {})):
        shape = row["model"] | {"max_context": row["seq_len"]}
        values["model"] = _model({f"model.{key}": Setting(v, run.name) for key, v in shape.items()})
    if "batch_tokens" not in values and "batch_seqs" in row:
        values["batch_tokens"] = row["batch_seqs"] * row["seq_len"]
    if "counts" not in values and published.get("recomputation_counted"):
        values["counts"] = "hardware"
    return Claim(**values)


def read_claim(target: str | None, flags: Sequence[str] = ()) -> Claim:
    """The claim of a published run, a TOML file or a preset, under `--claim.key=value` flags.

    Flags may also change the model: `--claim.preset=NAME`, `--model.num_layers=96`.

    Raises: ConfigError naming the key, where it was given, what is accepted and the nearest key.
    """
    settings = _target_settings(target)
    flagged = read_flags(flags)
    if "claim.preset" in flagged:
        settings = {key: each for key, each in settings.items() if not key.startswith("model.")}
    for key in flagged:
        if not key.startswith(("claim.", "model.")):
            raise ConfigError(f"flag --{key}: a claim is stated by --claim.KEY=VALUE{_near(key)}")
    settings |= flagged
    settings = _preset_settings(settings) | settings
    values: dict[str, Any] = {} if target is None else {"name": Path(target).stem}
    shape = {key: each for key, each in settings.items() if key.startswith("model.")}
    if shape:
        values["model"] = _model(shape)
    hints = typing.get_type_hints(Claim)
    for key, setting in settings.items():
        leaf = key.removeprefix("claim.")
        if key in shape or leaf == "preset":
            continue
        if leaf == "model":
            raise ConfigError(f"{setting.origin}: the model is 'preset' or a table [model]")
        if leaf not in hints:
            known = ", ".join(field.name for field in fields(Claim))
            raise ConfigError(
                f"{setting.origin}: unknown key '{leaf}'{_near(leaf)}\nknown: {known}"
            )
        value = str(setting.value) if leaf == "price_date" else setting.value
        values[leaf] = convert(value, hints[leaf], leaf, setting.origin)
    if not values.keys() - {"name"}:
        raise ConfigError(
            "the claim states nothing; name a run or a file, or add --claim.KEY=VALUE"
        )
    return Claim(**values)


def _target_settings(target: str | None) -> dict[str, Setting]:
    """`claim.key` and `model.key` settings of a file, a published run or a preset."""
    if target is None:
        return {}
    runs = [run.name for run in published_runs()]
    if target in runs:
        claim, origin = claim_of_run(find_run(target)), f"run {target}"
        stated = {key: v for key in hints_of_claim() if (v := getattr(claim, key)) is not None}
        model = cast(ModelConfig | None, stated.pop("model", None))
        settings = {f"claim.{key}": Setting(value, origin) for key, value in stated.items()}
        shape = {key: v for key, v in asdict(model).items() if v is not None} if model else {}
        return settings | {f"model.{key}": Setting(v, origin) for key, v in shape.items()}
    if target in preset_names():
        return {"claim.preset": Setting(target, target)}
    path = Path(target)
    if path.suffix != ".toml" and not path.exists():
        raise ConfigError(
            f"no published run, preset or file '{target}'{suggest(target, runs + preset_names())}"
        )
    settings: dict[str, Setting] = {}
    for key, value in read_toml(path).items():
        if key == "model" and isinstance(value, dict):
            table = cast(dict[str, Any], value)
            settings |= {f"model.{leaf}": Setting(v, target) for leaf, v in table.items()}
        else:
            settings[f"claim.{key}"] = Setting(value, target)
    return settings


def hints_of_claim() -> list[str]:
    """The keys of a claim."""
    return [field.name for field in fields(Claim)]


def _near(key: str) -> str:
    """The nearest key of a claim."""
    return suggest(key.split(".")[-1], [*hints_of_claim(), "preset"])


def _preset_settings(settings: dict[str, Setting]) -> dict[str, Setting]:
    """The model of the preset that a claim names, and the sequence length it is trained on."""
    if "claim.preset" not in settings:
        return {}
    name, origin = str(settings["claim.preset"].value), settings["claim.preset"].origin
    if name not in preset_names():
        raise ConfigError(f"{origin}: unknown preset '{name}'{suggest(name, preset_names())}")
    preset = read_preset(name)
    found = {key: each for key, each in preset.items() if key.startswith("model.")}
    if "train.seq_len" in preset:
        found["claim.seq_len"] = preset["train.seq_len"]
    return found


def _model(settings: dict[str, Setting]) -> ModelConfig:
    config = build_config(settings)
    check_ranges(config)
    check_model(config.model)
    return config.model


# ------------------------------------------------------------------------------------ printing

PERCENT = ("mfu", "mfu_palm", "mfu_wall", "hfu", "flop_utilization_wall", "goodput")
UNITS = {
    "average_watts": "W",
    "co2_tonnes": "t",
    "cost_usd": "$",
    "device_hours": "h",
    "energy_mwh": "MWh",
    "grid_kg_per_kwh": "kg/kWh",
    "price_usd_per_device_hour": "$/h",
    "tflops_per_device": "TFLOP/s",
    "tokens_per_second_per_device": "/s",
    "total_flop": "FLOP",
    "wall_days": "d",
}


def describe_claim(claim: Claim, findings: Sequence[Finding]) -> str:
    """A table with one finding a line, what cannot be first."""
    order = typing.get_args(Verdict)
    ranked = sorted(findings, key=lambda each: order.index(each.verdict))
    rows = [("verdict", "quantity", "stated", "recomputed", "how")]
    for each in ranked:
        stated = "-" if each.stated is None else _shown(each.quantity, each.stated)
        words = each.quantity.replace("_", " ")
        recomputed = _shown(each.quantity, each.recomputed)
        rows.append((each.verdict, words, stated, recomputed, each.how))
    if not findings:
        return f"{_headline(claim)}\nnothing follows from what is stated"
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [
        f"{row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]:>{widths[2]}}  "
        f"{row[3]:>{widths[3]}}  {row[4]}"
        for row in rows
    ]
    return "\n".join([_headline(claim), in_words(findings), *lines])


def claim_figures(claim: Claim, findings: Sequence[Finding]) -> dict[str, Any]:
    """What is stated and every finding, for JSON; units are in the keys."""
    stated = {key: value for key, value in asdict(claim).items() if value is not None}
    found = [asdict(each) for each in findings]
    return {"claim": stated, "findings": found, "verdicts": _count(findings)}


def _headline(claim: Claim) -> str:
    where = f"{claim.devices or ''} x {claim.device}".lstrip(" x") if claim.device else ""
    size = f"{format_count(claim.parameters)} parameters" if claim.parameters else ""
    tokens = f"{format_count(claim.tokens)} tokens" if claim.tokens else ""
    words = ", ".join(each for each in (size, tokens, where) if each)
    return f"{claim.name}: {words}" if words else claim.name


def _count(findings: Sequence[Finding]) -> dict[str, int]:
    """Findings of each verdict there is."""
    found = [each.verdict for each in findings]
    return {word: found.count(word) for word in typing.get_args(Verdict) if word in found}


def _shown(quantity: str, value: float) -> str:
    if quantity in PERCENT:
        return format_percent(value)
    if quantity == "step_seconds":
        return format_duration(value) if value >= 60 else f"{value:.4g} s"
    if quantity in ("tokens", "parameters", "active_parameters", "batch_tokens"):
        return format_count(value)
    decimals = max(0, 3 - math.floor(math.log10(value)))
    number = f"{value:.3g}" if value >= 1e12 or value < 0.01 else f"{value:,.{decimals}f}"
    return f"{number} {UNITS.get(quantity, '')}".rstrip()
