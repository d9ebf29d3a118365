"""The curves of a run as SVG to stand inside a page.

Text, axes and grid take the page's own colour (`currentColor`) and the background is clear, so one
drawing serves light and dark pages.
"""

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median_high
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from lascaux.report.records import Record, elapsed_seconds
from lascaux.units import format_percent, format_rate

TRAINING, VALIDATION = "#c7752d", "#2f8f98"
INK = "#010203"  # stands for currentColor until the SVG is written
INCHES = (4.7, 2.75)
MOST_POINTS = 1500
SMOOTHING = 0.02
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": INK,
    "grid.alpha": 0.14,
    "grid.linewidth": 0.6,
    "axes.linewidth": 0.6,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
}


EXPERT_LINES = (
    ("largest_load", "Busiest expert", "Its pairs of tokens and experts; 1 is an even share."),
    ("router_entropy", "Router entropy", "Nats, mean over tokens and layers."),
    ("aux_loss", "Balance and z loss", "With their weights, summed over layers, for each token."),
)
DROPPED_LINE = ("dropped_fraction", "Dropped pairs", "Share that no expert had room for.")


@dataclass(frozen=True, slots=True)
class Plot:
    """A drawing with its heading and the unit or convention that belongs under it."""

    title: str
    note: str
    svg: str


def draw_plots(metrics: Sequence[Record], loads: Sequence[Record] = ()) -> list[Plot]:
    """Every curve that the metrics have numbers for, and the load of experts as a heat map."""
    validated = [record for record in metrics if record.get("bits_per_byte") is not None]
    plots = [_loss(metrics), _lr(metrics)]
    if validated:
        plots += [_bits_per_byte(metrics, validated), _bits_per_byte_over_time(metrics, validated)]
    plots += [_grad_norm(metrics), _speed(metrics), _mfu(metrics)]
    if loads:
        plots.append(_expert_load(loads))
    if all("largest_load" in record for record in metrics):
        plots += [_expert_line(metrics, *line) for line in EXPERT_LINES]
        if any(record["dropped_fraction"] for record in metrics):
            plots.append(_expert_line(metrics, *DROPPED_LINE))
    return plots


def _loss(metrics: Sequence[Record]) -> Plot:
    def draw(axes: Axes) -> None:
        tokens = _token_axis(axes, metrics)
        loss = _column(metrics, "loss")
        _line(axes, tokens, loss, color=TRAINING, alpha=0.35, linewidth=0.7)
        _line(axes, tokens, smooth(loss), color=TRAINING, linewidth=1.6, label="training")
        seen = [record.get("valid_loss") is not None for record in metrics]
        if any(seen):
            validated = [record for record in metrics if record.get("valid_loss") is not None]
            _points(axes, tokens[seen], _column(validated, "valid_loss"), label="validation")
        axes.legend(loc="upper right")

    note = f"Nats per token. Bold: mean of the surrounding {100 * SMOOTHING:g} % of steps."
    return make_plot("Loss", note, draw)


def _bits_per_byte(metrics: Sequence[Record], validated: Sequence[Record]) -> Plot:
    def draw(axes: Axes) -> None:
        tokens = _token_axis(axes, metrics)
        seen = [record.get("bits_per_byte") is not None for record in metrics]
        _points(axes, tokens[seen], _column(validated, "bits_per_byte"))

    note = "Validation text; comparable between tokenizers."
    return make_plot("Bits per byte", note, draw)


def _bits_per_byte_over_time(metrics: Sequence[Record], validated: Sequence[Record]) -> Plot:
    def draw(axes: Axes) -> None:
        minutes = np.array(elapsed_seconds(metrics)) / 60
        seen = [record.get("bits_per_byte") is not None for record in metrics]
        _points(axes, minutes[seen], _column(validated, "bits_per_byte"))
        axes.set_xlabel("wall time, minutes")
        axes.set_xlim(0, minutes[-1] * 1.02)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,g}"))

    note = "Validation text, against the time the run took, validation included."
    return make_plot("Bits per byte over time", note, draw)


def _lr(metrics: Sequence[Record]) -> Plot:
    lr = _column(metrics, "lr")
    exponent = int(np.floor(np.log10(lr.max()))) if lr.max() > 0 else 0

    def draw(axes: Axes) -> None:
        _line(axes, _step_axis(axes, metrics), lr, color=TRAINING, linewidth=1.6)
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y / 10**exponent:g}"))

    return make_plot("Learning rate", f"In units of 10{superscript(exponent)}.", draw)


def _grad_norm(metrics: Sequence[Record]) -> Plot:
    def draw(axes: Axes) -> None:
        steps, norm = _step_axis(axes, metrics), _column(metrics, "grad_norm")
        axes.set_yscale("log")
        _line(axes, steps, norm, color=TRAINING, alpha=0.35, linewidth=0.7)
        _line(axes, steps, smooth(norm), color=TRAINING, linewidth=1.6)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())

    note = "Of the whole gradient, before clipping; logarithmic."
    return make_plot("Gradient norm", note, draw)


def _speed(metrics: Sequence[Record]) -> Plot:
    speed = _column(metrics, "tokens_per_second")

    def draw(axes: Axes) -> None:
        _with_median(axes, metrics, speed)
        unit, word = _scale(np.nanmax(speed))
        axes.yaxis.set_major_formatter(
            FuncFormatter(lambda y, _: f"{y / unit:g} {word[:1] if y else ''}")
        )

    note = f"Each step, without validation. Median: {format_rate(median_high(speed), 'tokens')}."
    return make_plot("Tokens per second", note, draw)


def _mfu(metrics: Sequence[Record]) -> Plot:
    mfu = _column(metrics, "mfu")

    def draw(axes: Axes) -> None:
        _with_median(axes, metrics, mfu)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:g} %"))

    note = f"Model FLOPs utilisation of each step. Median: {format_percent(median_high(mfu))}."
    return make_plot("MFU", note, draw)


def _expert_load(loads: Sequence[Record]) -> Plot:
    """Rows are experts, those of a layer together, the first layer on top."""
    shares = np.array([record["load"] for record in loads])  # record, layer, expert
    _, layers, experts = shares.shape
    rows = np.log2(np.clip(shares, 0.25, 4)).reshape(len(shares), -1).T

    def draw(axes: Axes) -> None:
        axes.grid(visible=False)
        _step_axis(axes, loads)
        extent = (0, loads[-1]["step"], layers * experts, 0)
        axes.imshow(rows, cmap="RdBu_r", vmin=-2, vmax=2, aspect="auto", extent=extent)
        axes.set_xlim(0, loads[-1]["step"])
        axes.set_yticks([experts * (i + 0.5) for i in range(layers)])
        axes.set_yticklabels([f"{i + 1}" for i in range(layers)])
        for i in range(1, layers):
            axes.axhline(experts * i, color="white", linewidth=1)
        axes.set_ylabel("mixture layer")

    note = "Red: up to four times an even share of the pairs; white: even; blue: down to a quarter."
    return make_plot("Load of each expert", note, draw)


def _expert_line(metrics: Sequence[Record], key: str, title: str, note: str) -> Plot:
    def draw(axes: Axes) -> None:
        steps, values = _step_axis(axes, metrics), _column(metrics, key)
        _line(axes, steps, values, color=TRAINING, alpha=0.35, linewidth=0.7)
        _line(axes, steps, smooth(values), color=TRAINING, linewidth=1.6)

    return make_plot(title, note, draw)


def smooth(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean of the surrounding fiftieth of the run; near the start of as many on both sides.

    A steep start is followed closely and one outlier at the end does not bend the curve. Values
    that are not finite are left out.
    """
    places = np.arange(len(values))
    reach = np.minimum(round(SMOOTHING * len(values) / 2), places)
    finite = np.isfinite(values)
    sums = np.append(0.0, np.cumsum(np.where(finite, values, 0.0)))
    counts = np.append(0, np.cumsum(finite))
    first, end = places - reach, np.minimum(places + reach + 1, len(values))
    count = counts[end] - counts[first]
    return np.where(count > 0, (sums[end] - sums[first]) / np.maximum(count, 1), np.nan)


def _column(records: Sequence[Record], key: str) -> NDArray[np.float64]:
    """Numbers of all records; what is not finite (a skipped fp16 step) becomes a gap."""
    values = np.array([record[key] for record in records], dtype=np.float64)
    return np.where(np.isfinite(values), values, np.nan)


def _token_axis(axes: Axes, metrics: Sequence[Record]) -> NDArray[np.float64]:
    """Tokens seen at each step, in the unit that the axis now names."""
    tokens = _column(metrics, "tokens_seen")
    unit, word = _scale(tokens[-1])
    axes.set_xlabel(f"{word} tokens".strip())
    axes.set_xlim(0, tokens[-1] / unit * 1.02)
    return tokens / unit


def _step_axis(axes: Axes, metrics: Sequence[Record]) -> NDArray[np.float64]:
    steps = _column(metrics, "step")
    axes.set_xlabel("step")
    axes.set_xlim(0, steps[-1] * 1.02)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    return steps


def _scale(largest: float) -> tuple[float, str]:
    """A power of thousand in which the largest value is readable, and its name."""
    names = {1e12: "trillion", 1e9: "billion", 1e6: "million", 1e3: "k"}
    return next(((unit, word) for unit, word in names.items() if largest >= unit), (1.0, ""))


def _with_median(axes: Axes, metrics: Sequence[Record], values: NDArray[np.float64]) -> None:
    steps = _step_axis(axes, metrics)
    _line(axes, steps, values, color=TRAINING, alpha=0.6, linewidth=0.8)
    axes.axhline(median_high(values), color=VALIDATION, linewidth=1.4, linestyle=(0, (4, 3)))
    axes.set_ylim(0, np.nanmax(values) * 1.1 or 1)


def _line(axes: Axes, x: NDArray[np.float64], y: NDArray[np.float64], **style: Any) -> None:
    """A curve of at most some thousand points, the last one included."""
    stride = -(-len(x) // MOST_POINTS)
    kept = np.unique(np.append(np.arange(0, len(x), stride), len(x) - 1))
    axes.plot(x[kept], y[kept], marker="o" if len(x) == 1 else None, **style)


def _points(
    axes: Axes, x: NDArray[np.float64], y: NDArray[np.float64], label: str | None = None
) -> None:
    marker = "o" if len(x) <= 60 else None
    axes.plot(x, y, color=VALIDATION, linewidth=1.6, marker=marker, markersize=3, label=label)


def superscript(number: int) -> str:
    """The digits of an exponent."""
    return str(number).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def make_plot(title: str, note: str, draw: Callable[[Axes], None]) -> Plot:
    """Draw on fresh axes; keep the `<svg>` element alone, its ids unlike those of other plots."""
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": title}):
        figure = Figure(figsize=INCHES, layout="constrained")
        axes = figure.add_subplot()
        axes.grid(axis="y")
        axes.spines[["top", "right", "left"]].set_visible(False)
        draw(axes)
        buffer = io.StringIO()
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].strip().replace(INK, "currentColor")
    svg = re.sub(r' id="[\w.]+_\d+"', "", svg)  # names of groups that nothing refers to
    width, height = (f"{72 * inches:g}" for inches in INCHES)
    svg = re.sub(
        r"<svg [^>]*>",
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{title}" '
        'xmlns:xlink="http://www.w3.org/1999/xlink">',
        svg,
        count=1,
    )
    return Plot(title, note, svg)
