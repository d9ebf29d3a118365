"""The plan of a run in its report: what was predicted, and what it took."""

from collections.abc import Callable, Iterator, Sequence

from lascaux.planner.picture import draw_memory, draw_progress, draw_time
from lascaux.report.plots import Plot, make_plot
from lascaux.report.records import Record, elapsed_seconds
from lascaux.units import format_bytes, format_duration


def draw_plan_plots(plan: Record, metrics: Sequence[Record]) -> list[Plot]:
    """Tokens over time beside the fan of the plan, where time goes, memory of the worst device."""
    if not plan:
        return []
    seen = [float(record["tokens_seen"]) for record in metrics]
    actual = elapsed_seconds(metrics), seen
    taken = plan.get("outcome", {}).get("memory_bytes")
    return [
        make_plot(
            "Plan: time",
            "Half of the draws in the dark, nine of ten in the light; training alone.",
            lambda axes: draw_progress(axes, plan, actual),
        ),
        make_plot(
            "Plan: where the time goes",
            "In the middle of the draws; parts of the steps by the formulas.",
            lambda axes: draw_time(axes, plan),
        ),
        make_plot(
            "Plan: memory",
            "Of the worst device; the line holds nine draws of ten.",
            lambda axes: draw_memory(axes, plan, taken),
        ),
    ]


def plan_rows(plan: Record) -> Iterator[tuple[str, str, str, str, str]]:
    """Quantity, middle, nine of ten, what it took, and whether that was inside."""
    if not plan:
        return
    outcome = plan.get("outcome", {})
    inside = outcome.get("inside_90", {})
    quantities: list[tuple[str, str, Record, Callable[[float], str]]] = [
        ("step", "step_seconds", plan["step_seconds"], format_duration),
        ("training", "training_seconds", plan["training_seconds"], format_duration),
        ("memory", "memory_bytes", plan["memory"]["per_device_bytes"], format_bytes),
    ]
    for label, key, planned, form in quantities:
        taken = form(outcome[key]) if key in outcome else "not finished"
        verdict = {True: "inside", False: "outside"}.get(inside.get(key), "")
        span = f"{form(planned['p5'])} to {form(planned['p95'])}"
        yield label, form(planned["p50"]), span, taken, verdict
