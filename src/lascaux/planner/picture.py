"""A plan in one picture: where bytes, hours and dollars go, and when it will be done."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from lascaux.errors import ConfigError
from lascaux.units import format_count

Figures = Mapping[str, Any]
INCHES, DOTS_PER_INCH = (12, 4.6), 130
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}
PLANNED, ACTUAL = "#2f8f98", "#c7752d"
LEAST_SHARE, LEAST_LABELLED = 0.015, 0.06
WORDS = {
    "products": "matrix products",
    "lost": "failures",
    "other": "waits",
    "launches": "starting kernels",
}
TIME_UNITS = ((1 / 60, "minutes"), (1.0, "hours"), (24.0, "days"))
"""in hours"""


def draw_plan(figures: Figures, path: Path) -> None:
    """Write the picture; PNG, SVG or PDF by the file's name.

    Raises: ConfigError where it cannot be written.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=INCHES, dpi=DOTS_PER_INCH, layout="constrained")
        memory, time, done = figure.subplots(1, 3, width_ratios=(1, 1.35, 1.35))
        draw_memory(memory, figures)
        draw_time(time, figures)
        draw_progress(done, figures)
        for axes, title in ((memory, "worst device"), (time, "where it goes"), (done, "when")):
            axes.set_title(title, loc="left", fontsize=10)
        model = f"{format_count(figures['parameters']['total'])} parameters"
        tokens = f"{format_count(figures['tokens'])} tokens"
        devices = f"{figures['devices']:,} x {figures['device']}"
        figure.suptitle(f"{model}, {tokens} on {devices}: {_layout(figures)}")
        try:
            figure.savefig(path)
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot write {path}: {error}") from error


def _layout(figures: Figures) -> str:
    return str(figures["layout"]["description"])


def draw_memory(axes: Axes, figures: Figures, measured_bytes: float | None = None) -> None:
    """Bytes of the worst device, stacked by kind, with the 90 % interval and what there is."""
    memory = figures["memory"]
    kinds = {kind: value for kind, value in memory["by_kind"].items() if value > 0}
    total = sum(kinds.values())
    colors = matplotlib.colormaps["YlGnBu"](np.linspace(0.25, 0.95, max(1, len(kinds))))
    bottom = 0.0
    for (kind, value), color in zip(kinds.items(), colors, strict=True):
        color = "#bbbbbb" if kind == "unexplained" else color
        axes.bar(0, value / 2**30, bottom=bottom, width=0.7, color=color)
        if value >= LEAST_LABELLED * total:
            axes.annotate(kind, (0.4, bottom + value / 2**31), va="center", fontsize=8)
        bottom += value / 2**30
    interval = memory["per_device_bytes"]
    low, high = interval["p5"] / 2**30, interval["p95"] / 2**30
    axes.plot([-0.2, -0.2], [low, high], color="black", linewidth=1.4, solid_capstyle="butt")
    room = memory["of_bytes"] / 2**30
    if room < 3 * high:
        axes.axhline(room, color="#b03030", linewidth=1)
        axes.annotate(f"{room:.3g} GiB", (1.3, room), va="bottom", ha="right", fontsize=8)
    if measured_bytes is not None:
        axes.plot([-0.35, 0.35], 2 * [measured_bytes / 2**30], color=ACTUAL, linewidth=2)
        axes.annotate("taken", (-0.4, measured_bytes / 2**30), ha="right", va="center", fontsize=8)
    axes.set_xlim(-0.9, 1.3)
    axes.set_ylim(0, max(1.12 * high, 1.05 * room if room < 3 * high else 0))
    axes.set_xticks([])
    axes.set_ylabel("GiB")


def draw_time(axes: Axes, figures: Figures) -> None:
    """Hours by what they are spent on, one after the other, with their price where one is known."""
    parts: dict[str, float] = figures["time_parts_hours"]
    total = sum(parts.values())
    shown = {name: hours for name, hours in parts.items() if hours >= LEAST_SHARE * total}
    rest = total - sum(shown.values())
    if rest > 1e-3 * total:
        shown["the rest"] = rest
    scale, unit = time_unit(total)
    start = 0.0
    for row, (_, hours) in enumerate(shown.items()):
        length = hours / scale
        axes.barh(-row, length, left=start, height=0.7, color=PLANNED)
        start += length
    words = [WORDS.get(name, name.replace("_", " ")) for name in shown]
    axes.set_yticks([-row for row in range(len(shown))], words)
    axes.set_xlim(0, 1.02 * start)
    axes.set_xlabel(f"{unit}, in the middle")
    axes.grid(axis="x", alpha=0.25)
    cost = figures["cost_usd"]["on_demand"]
    if cost is not None:
        per_unit = cost["p50"] / start

        def to_usd(length: Any) -> Any:
            return length * per_unit

        def to_length(usd: Any) -> Any:
            return usd / per_unit

        money = axes.secondary_xaxis("top", functions=(to_usd, to_length))
        money.set_xlabel("US dollars, rented by the hour")
        money.xaxis.set_major_formatter(
            FuncFormatter(lambda usd, _: format_count(usd) if usd >= 10 else f"{usd:.2g}")
        )


def draw_progress(
    axes: Axes,
    figures: Figures,
    actual: tuple[Sequence[float], Sequence[float]] | None = None,
) -> None:
    """Tokens over time as a fan: half of the draws in the dark, nine of ten in the light.

    `actual`: seconds and tokens of a run, drawn over it; then the fan is that of training alone.
    """
    if actual is None:
        hours = figures["wall_hours"]
    else:
        hours = {key: value / 3600 for key, value in figures["training_seconds"].items()}
    scale, unit = time_unit(hours["p50"])
    tokens = [0.0, float(figures["tokens"])]
    for low, high, alpha in (("p5", "p95", 0.2), ("p25", "p75", 0.35)):
        axes.fill_betweenx(
            tokens,
            [0.0, hours[low] / scale],
            [0.0, hours[high] / scale],
            color=PLANNED,
            alpha=alpha,
            linewidth=0,
        )
    axes.plot([0.0, hours["p50"] / scale], tokens, color=PLANNED, linewidth=1.4, label="planned")
    last = hours["p95"] / scale
    if actual is not None:
        seconds, seen = actual
        taken = [0.0, *(each / 3600 / scale for each in seconds)]
        axes.plot(taken, [0.0, *seen], color=ACTUAL, label="taken")
        last = max(last, taken[-1])
        axes.legend(loc="upper left")
    axes.set_xlim(0, 1.04 * last)
    axes.set_ylim(0, 1.04 * tokens[1])
    axes.set_xlabel(unit)
    axes.set_ylabel("tokens")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda count, _: format_count(count)))
    axes.grid(alpha=0.25)


def time_unit(hours: float) -> tuple[float, str]:
    """The unit that a time is best told in: its hours and its name."""
    fitting = [unit for unit in TIME_UNITS if hours >= 2 * unit[0]]
    return fitting[-1] if fitting else TIME_UNITS[0]
