"""Utilization as a typed quantity: which FLOPs over which peak by which clock.

A fraction without these three labels cannot be compared: GPT-3's 21 % counts what the model needs,
OPT-175B's 47 % recomputation as well. Here a value carries its labels, converts to others for a
stated workload, and refuses what exceeds 1. Our own ruler is "palm" over "published".
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from lascaux.config.schema import ModelConfig
from lascaux.errors import ConfigError, suggest
from lascaux.model.accounting import (
    active_matmul_parameters,
    active_parameters,
    count_parameters,
    flops_per_token,
)
from lascaux.planner.devices import Device
from lascaux.planner.job import Recompute

Numerator = Literal["6N", "palm", "causal", "all", "hardware", "megatron", "8N-body"]
Clock = Literal["best_step", "mean_step", "wall"]

NUMERATORS: dict[Numerator, str] = {
    "6N": "6 FLOPs for each parameter, attention left out",
    "palm": "model FLOPs: weights of products with the head, and attention in full",
    "causal": "model FLOPs with attention halved for the causal mask",
    "all": "model FLOPs with every parameter counted, embeddings too",
    "hardware": "hardware FLOPs: model FLOPs and what is recomputed",
    "megatron": "hardware FLOPs by Megatron's formula",
    "8N-body": "8 FLOPs for each parameter but the embeddings, attention left out",
}
DENOMINATORS = {
    "published": "the published dense peak",
    "reached": "the best matrix product anyone reached",
    "sparse": "the sparse peak, twice the dense one",
    "fp8": "the published dense fp8 peak",
}
CLOCKS: dict[Clock, str] = {
    "best_step": "of the best step",
    "mean_step": "of the mean step",
    "wall": "over the wall time of the whole run",
}
WITH_RECOMPUTATION = ("hardware", "megatron", "8N-body")
EXPLAINED_BY = {
    "6N": "attention is left out (6N)",
    "palm": "attention is counted and recomputation is not",
    "causal": "attention is halved for the causal mask",
    "all": "all parameters are counted, embeddings too",
    "hardware": "recomputation is counted",
    "megatron": "recomputation is counted",
    "selective": "the recomputation of attention alone is counted",
    "8N-body": "recomputation is counted, as 8 FLOPs for each parameter of the body",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """What is trained on what: all that a conversion needs to know."""

    model: ModelConfig | None
    """None: only parameters are known, and only "6N" and "8N-body" can be counted"""
    seq_len: int | None
    device: Device | None
    """None: only FLOPs can be counted"""
    precision: str
    recompute: Recompute = "none"
    stated_parameters: float | None = None
    """the N of "6N", "all" and "8N-body" where the source names one; of a mixture the active"""

    def flops_per_token(self, numerator: Numerator) -> float:
        """Work of one trained token under a numerator."""
        return counted_flops_per_token(
            numerator, self.model, self.seq_len, self.recompute, self.stated_parameters
        )

    def peak(self, denominator: str | float) -> float:
        """FLOP/s of a device that count as 1."""
        if self.device is None:
            raise ConfigError("a utilization needs the device whose peak it is a fraction of")
        return peak_flops_per_second(denominator, self.device, self.precision)


def _check_label(what: str, label: object, known: Iterable[str]) -> None:
    names = list(known)
    if label not in names:
        raise ConfigError(
            f"the {what} of a utilization must be one of {', '.join(map(repr, names))}; "
            f"got {label!r}{suggest(str(label), names)}"
        )


@dataclass(frozen=True, slots=True)
class Labels:
    """The three labels without a value; ours unless named otherwise."""

    numerator: Numerator = "palm"
    denominator: str | float = "published"
    clock: Clock = "mean_step"

    def __post_init__(self) -> None:
        _check_label("numerator", self.numerator, NUMERATORS)
        _check_label("clock", self.clock, CLOCKS)
        if isinstance(self.denominator, str):
            _check_label("denominator", self.denominator, DENOMINATORS)


OURS = Labels()


@dataclass(frozen=True, slots=True)
class Utilization:
    """A fraction of a peak with its three labels.

    Raises: ConfigError for an unknown label, and for a value that is not in (0, 1], with the
    conventions that would explain it.
    """

    value: float
    numerator: Numerator
    denominator: str | float
    """a key of DENOMINATORS, or the FLOP/s of a device that the source states as its peak"""
    clock: Clock

    def __post_init__(self) -> None:
        Labels(self.numerator, self.denominator, self.clock)
        if not (math.isfinite(self.value) and self.value > 0):
            raise ConfigError(f"a utilization must lie above 0 and up to 1; got {self.value:g}")
        if self.value > 1:
            hint = why_above_one(self.value, self.numerator)
            raise ConfigError(f"a utilization of {_percent(self.value)} cannot be; {hint}")

    def describe(self) -> str:
        """The value and all three labels in words."""
        if isinstance(self.denominator, str):
            over = DENOMINATORS[self.denominator]
        else:
            over = f"a stated peak of {self.denominator / 1e12:g} TFLOP/s"
        counted = NUMERATORS[self.numerator]
        return f"{_percent(self.value)} of {over} {CLOCKS[self.clock]} ({counted})"


def counted_flops_per_token(
    numerator: Numerator,
    model: ModelConfig | None,
    seq_len: int | None,
    recompute: Recompute = "none",
    stated_parameters: float | None = None,
) -> float:
    """Work of one trained token as a convention counts it.

    "hardware" adds to "palm" (Chowdhery et al. 2022, appendix B) the forward pass of the body, or
    with selective recomputation that of attention alone; the head is never computed again.
    "megatron" is 96 L h^2 (1 + s/6h + V/16Lh), without recomputation 72 L h^2 (1 + s/6h + V/12Lh)
    (Narayanan et al. 2021): for the shape that it assumes the same as "hardware".

    Raises: ConfigError where the shape, the sequence length or the parameters are not known, and
    for "megatron" of a network it was not made for.
    """
    if numerator in ("6N", "8N-body"):
        return _parameters_alone(numerator, model, stated_parameters)
    if model is None or seq_len is None:
        missing = "the shape of the model" if model is None else "'seq_len'"
        raise ConfigError(f"counting FLOPs as '{numerator}' needs {missing}; '6N' does not")
    core = 4 * model.num_layers * model.attention_width * seq_len
    palm = flops_per_token(model, seq_len)
    body = active_matmul_parameters(model) - model.vocab_rows * model.d_model
    again = {"none": 0, "selective": core, "full": 2 * body + core}[recompute]
    match numerator:
        case "palm":
            return palm
        case "causal":
            return palm - 1.5 * core
        case "all":
            return 6 * (stated_parameters or active_parameters(model)) + 3 * core
        case "hardware":
            return palm + again
        case "megatron":
            return _megatron(model, seq_len, recompute)


def _parameters_alone(
    numerator: str, model: ModelConfig | None, stated_parameters: float | None
) -> float:
    if model is None and stated_parameters is None:
        raise ConfigError("counting FLOPs needs the parameters or the shape of the model")
    total = stated_parameters or (active_parameters(model) if model else 0)
    if numerator == "6N":
        return 6 * total
    body = total - (count_parameters(model).embedding if model else 0)
    if body <= 0:
        raise ConfigError(f"{total:g} parameters are fewer than those of the embedding alone")
    return 8 * body


def _megatron(model: ModelConfig, seq_len: int, recompute: Recompute) -> float:
    layers, h, vocab = model.num_layers, model.d_model, model.vocab_rows
    gated, mixture = model.activation == "swiglu", model.num_experts > 0
    usual = model.ffn_width == 4 * h and model.attention_width == h
    if gated or mixture or not usual or model.kv_heads != model.num_heads:
        raise ConfigError(
            "counting FLOPs as 'megatron' is for networks with d_ff = 4 d_model, as many key-value "
            "heads as heads, no gate and no experts; use 'hardware', which is the same for those"
        )
    s = seq_len
    if recompute == "full":
        return 96 * layers * h**2 * (1 + s / (6 * h) + vocab / (16 * layers * h))
    once = 72 * layers * h**2 * (1 + s / (6 * h) + vocab / (12 * layers * h))
    return once + (4 * layers * s * h if recompute == "selective" else 0)


def peak_flops_per_second(denominator: str | float, device: Device, precision: str) -> float:
    """FLOP/s of one device that a denominator means.

    Raises: ConfigError for what is no denominator, and for a peak that the device does not have.
    """
    if not isinstance(denominator, str):
        if not (math.isfinite(denominator) and denominator > 0):
            raise ConfigError(f"a stated peak must be above 0 FLOP/s; got {denominator:g}")
        return denominator
    _check_label("denominator", denominator, DENOMINATORS)
    match denominator:
        case "reached":
            return device.reachable(precision)
        case "sparse":
            if not has_sparse_peak(device):
                raise ConfigError(
                    f"{device.id} has no sparse peak; use the denominator 'published'"
                )
            return 2 * device.peak(precision)
        case "fp8":
            return device.peak("fp8")
        case _:
            return device.peak(precision)


def convert(
    given: Utilization,
    workload: Workload,
    *,
    numerator: Numerator | None = None,
    denominator: str | float | None = None,
    clock: Clock | None = None,
    goodput: float | None = None,
) -> Utilization:
    """The same speed under other labels; a label not named stays.

    goodput: time on the faster clock over time on the slower one, for example ideal over paid time.

    Raises: ConfigError for another clock without a goodput in (0, 1], and for a result above 1.
    """
    wanted = Labels(
        given.numerator if numerator is None else numerator,
        given.denominator if denominator is None else denominator,
        given.clock if clock is None else clock,
    )
    rate = given.value * workload.peak(given.denominator)
    rate *= workload.flops_per_token(wanted.numerator) / workload.flops_per_token(given.numerator)
    if wanted.clock != given.clock:
        if goodput is None or not 0 < goodput <= 1:
            raise ConfigError(
                f"from a utilization {CLOCKS[given.clock]} to one {CLOCKS[wanted.clock]} needs the "
                f"goodput between them, above 0 and up to 1; got {goodput}"
            )
        order = list(CLOCKS)  # from fast to slow
        rate *= goodput ** (1 if order.index(wanted.clock) > order.index(given.clock) else -1)
    return _of_rate(rate, workload, wanted)


def utilization_of_tokens_per_second(
    tokens_per_second_per_device: float, workload: Workload, labels: Labels = OURS
) -> Utilization:
    """From the tokens a device trains in a second; ConfigError above the peak, naming others."""
    counted = workload.flops_per_token(labels.numerator)
    return _of_rate(tokens_per_second_per_device * counted, workload, labels)


def utilization_of_tflops(
    tflops_per_device: float, workload: Workload, labels: Labels = OURS
) -> Utilization:
    """From TFLOP/s of a device that were counted by the same numerator; errors as above."""
    return _of_rate(tflops_per_device * 1e12, workload, labels)


def utilization_of_step_seconds(
    step_seconds: float,
    batch_tokens: float,
    devices: int,
    workload: Workload,
    labels: Labels = OURS,
) -> Utilization:
    """From the seconds of an optimizer step; errors as above."""
    if not step_seconds > 0 or devices < 1:
        raise ConfigError(
            f"a step needs more than 0 s and at least one device; got {step_seconds:g} s, {devices}"
        )
    rate = batch_tokens / (step_seconds * devices)
    return utilization_of_tokens_per_second(rate, workload, labels)


def tokens_per_second_per_device(given: Utilization, workload: Workload) -> float:
    """Tokens that a device trains in a second at this utilization."""
    rate = given.value * workload.peak(given.denominator)
    return rate / workload.flops_per_token(given.numerator)


def tflops_per_device(given: Utilization, workload: Workload) -> float:
    """TFLOP/s of a device, counted by the numerator of the utilization."""
    return given.value * workload.peak(given.denominator) / 1e12


def step_seconds(
    given: Utilization, workload: Workload, batch_tokens: float, devices: int
) -> float:
    """Seconds of an optimizer step of this many tokens on this many devices."""
    return batch_tokens / (devices * tokens_per_second_per_device(given, workload))


def has_sparse_peak(device: Device) -> bool:
    """Whether data sheets of the part print rates for 2:4 sparsity, from A100 and MI300X on."""
    return device.year >= {"NVIDIA": 2020, "AMD": 2023}.get(device.vendor, 9999)


def other_peaks(device: Device, precision: str) -> dict[str, float]:
    """FLOP/s that people have taken for the peak of this precision, by what they are in words."""
    peak = device.peak(precision)
    found = {"the sparse peak": 2 * peak} if has_sparse_peak(device) else {}
    for other, rate in device.peak_flops_per_second.items():
        if math.isclose(rate, 2 * peak, rel_tol=0.01):
            found.pop("the sparse peak", None)
            found[f"the sparse or the {other} peak"] = rate
        elif rate != peak:
            found[f"the {other} peak"] = rate
    if device.reached_flops_per_second.get(precision):
        found["the best matrix product anyone reached"] = device.reachable(precision)
    if device.id.startswith(("TPU-v2", "TPU-v3", "TPU-v4", "TPU-v5p")):
        found["the peak of one core, half a chip,"] = peak / 2
    return found


def flops_by_convention(workload: Workload) -> dict[str, float]:
    """FLOPs of a token under every numerator that can be counted, and with attention recomputed."""
    found: dict[str, float] = {}
    for numerator in NUMERATORS:
        try:
            found[numerator] = workload.flops_per_token(numerator)
        except ConfigError:
            continue  # needs a shape that is not known, or another kind of network
    if "hardware" in found:
        found["selective"] = replace(workload, recompute="selective").flops_per_token("hardware")
    return found


def convention_that_explains(
    ratio: float, counted: str, table: dict[str, float], peaks: dict[str, float], tolerance: float
) -> str | None:
    """Which one other convention makes a figure `ratio` times what its own gives: in words.

    table: FLOPs of a token by convention; peaks: other peaks as fractions of the published one.
    """
    factors = {EXPLAINED_BY[name]: each / table[counted] for name, each in table.items()}
    factors |= {f"{words} is taken for the peak": 1 / each for words, each in peaks.items()}
    apart = {words: abs(math.log(ratio / factor)) for words, factor in factors.items()}
    nearest = min(apart, key=lambda words: apart[words])
    return nearest if apart[nearest] <= tolerance else None


def _of_rate(flops_per_second: float, workload: Workload, labels: Labels) -> Utilization:
    value = flops_per_second / workload.peak(labels.denominator)
    if value > 1 and labels.denominator == "published" and workload.device:
        peaks = other_peaks(workload.device, workload.precision)
        parts = {words: flops_per_second / rate for words, rate in peaks.items()}
        fitting = [f"{_percent(part)} of {words}" for words, part in parts.items() if part <= 1]
        would = f"it would be {' or '.join(fitting)}; " if fitting else ""
        raise ConfigError(
            f"{_percent(value)} of the dense {workload.precision} peak of {workload.device.id} "
            f"cannot be; {would}or check time, batch and number of devices"
        )
    return Utilization(value, labels.numerator, labels.denominator, labels.clock)


def why_above_one(value: float, numerator: str) -> str:
    """Which convention would bring a value that is too high below 1."""
    if value >= 2:
        return f"a fraction is wanted, {value / 100:g} for {value:g} %"
    half = _percent(value / 2)
    hints = [f"{half} of a peak twice as high (sparse, fp8, a chip of two cores, another dtype)"]
    if numerator in WITH_RECOMPUTATION and 0.75 * value <= 1:
        hints.append(f"about {_percent(0.75 * value)} without full recomputation")
    return f"it would be {' or '.join(hints)}; or check time, batch and number of devices"


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f} %"
