"""A study in one picture: loss over tokens, work, time and size."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from lascaux.compare.outcome import ModelOutcome, Outcome
from lascaux.units import format_count

INCHES, DOTS_PER_INCH = (11, 8), 130
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}


def draw_outcome(outcome: Outcome, title: str, path: Path) -> None:
    """Write the picture as a PNG."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=INCHES, dpi=DOTS_PER_INCH, layout="constrained")
        (tokens, flops), (seconds, size) = figure.subplots(2, 2)
        colors = choose_colors(outcome)
        _curves(tokens, outcome, colors, lambda model: model.tokens)
        _label(tokens, "tokens", "equal tokens")
        _curves(flops, outcome, colors, lambda model: model.flops)
        _label(flops, "FLOPs (6 N + 12 L d T for each token)", "equal work")
        _curves(seconds, outcome, colors, lambda model: model.seconds.mean(0))
        _label(seconds, "seconds, validation included", "equal time")
        _sizes(size, outcome, colors)
        tokens.legend(ncols=2, fontsize=8, handlelength=2.6)
        figure.suptitle(title)
        figure.savefig(path)


def choose_colors(outcome: Outcome) -> dict[str, Any]:
    """Greys for dense models and warm colours for mixtures, darker with size."""
    dense = outcome.ladder
    mixtures = [model for model in outcome.models if model.is_mixture]
    greys = matplotlib.colormaps["Greys"](np.linspace(0.45, 0.95, len(dense)))
    warm = matplotlib.colormaps["YlOrRd"](np.linspace(0.35, 0.95, max(1, len(mixtures))))
    named = [(dense, greys), (mixtures, warm)]
    return {
        model.name: color
        for models, colors in named
        for model, color in zip(models, colors, strict=False)
    }


def _curves(
    axes: Axes,
    outcome: Outcome,
    colors: dict[str, Any],
    along: Callable[[ModelOutcome], Any],
) -> None:
    """Means over the seeds, with their range as a band."""
    for model in outcome.models:
        x, loss = along(model), model.bits_per_byte
        style = "-" if model.is_mixture else "--"
        axes.plot(x, loss.mean(0), style, color=colors[model.name], label=model.name, marker=".")
        axes.fill_between(x, loss.min(0), loss.max(0), color=colors[model.name], alpha=0.2, lw=0)
    axes.set_xscale("log")


def _sizes(axes: Axes, outcome: Outcome, colors: dict[str, Any]) -> None:
    """The end of every run over its parameters, and from each mixture a line to its equivalent."""
    ladder = outcome.ladder
    axes.plot([m.parameters for m in ladder], [m.mean for m in ladder], "--", color="grey", lw=1)
    for model in outcome.models:
        color = colors[model.name]
        low, high = model.mean - min(model.final), max(model.final) - model.mean
        marker = "o" if model.is_mixture else "s"
        axes.errorbar(
            model.parameters, model.mean, [[low], [high]], color=color, marker=marker, capsize=3
        )
        at = (-6, 7) if model.is_mixture else (6, 5)
        side = "right" if model.is_mixture else "left"
        axes.annotate(
            model.name,
            (model.parameters, model.mean),
            at,
            textcoords="offset points",
            size=8,
            ha=side,
        )
        if model.name in outcome.equivalents:
            equal = outcome.equivalents[model.name].parameters
            axes.plot([equal.p50, model.parameters], [model.mean] * 2, ":", color=color, lw=1)
            axes.plot([equal.p5, equal.p95], [model.mean] * 2, "-", color=color, lw=4, alpha=0.4)
    axes.set_xscale("log")
    _label(axes, "parameters (band: dense equivalent, 5 to 95 %)", "at the end, by size")


def _label(axes: Axes, x: str, title: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel("bits per byte, held-out text")
    axes.set_title(title, loc="left", fontweight="bold")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(_tick))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _tick(value: float, _: object) -> str:
    return f"{value:.0e}".replace("e+", "e") if value >= 1e12 else format_count(value)
