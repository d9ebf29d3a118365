"""RUN/report.html: one page with a run's figures, curves, samples and circumstances.

The page needs nothing but itself: no script, no font, no address outside. All text from the run is
escaped. The frame with its style is `page.html`, the curves are drawn by `plots.py`.
"""

import html
import re
from collections.abc import Iterator, Sequence
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from statistics import median_high
from string import Template

from lascaux.config.check import num_steps
from lascaux.errors import CheckpointError
from lascaux.model.accounting import active_matmul_parameters, count_parameters, flops_per_token
from lascaux.report.plan import draw_plan_plots, plan_rows
from lascaux.report.plots import Plot, draw_plots, superscript
from lascaux.report.records import Record, RunRecords, elapsed_seconds, read_run
from lascaux.train.run_folder import write_atomically
from lascaux.units import (
    format_bytes,
    format_count,
    format_duration,
    format_flops_per_second,
    format_percent,
    format_rate,
)

MFU_CONVENTION = "MFU = (6·N + 12·L·d·T) per token ÷ measured matrix-multiply peak, PaLM appendix B"
CONTROL_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"}


def write_report(run: Path) -> Path:
    """Write RUN/report.html from the run's records, replacing an older one at once; its path.

    Raises: CheckpointError for a folder that is no run or was never trained, for damaged records,
    and where the page cannot be written.
    """
    page = render_page(read_run(run))
    path = run / "report.html"
    try:
        write_atomically(path, page)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror}") from error
    return path


def render_page(records: RunRecords) -> str:
    """The whole page."""
    frame = Template(files("lascaux.report").joinpath("page.html").read_text(encoding="utf-8"))
    plots = draw_plots(records.metrics, records.expert_loads)
    plots += draw_plan_plots(records.plan, records.metrics)
    sections = [
        _plan(records.plan),
        _samples(records.samples),
        _events(records.events),
        _data(records.data_index),
        _config(records.config_toml),
    ]
    version = records.environment.get("lascaux")
    return frame.substitute(
        name=escape(records.name),
        subtitle=escape(_subtitle(records)),
        figures="\n".join(_figure(*figure) for figure in headline_figures(records)),
        plots="\n".join([*map(_plot, plots), _machine(records.environment)]),
        sections="\n".join(section for section in sections if section),
        footer=escape(f"Written by Lascaux {version or ''}".strip() + f". {MFU_CONVENTION}."),
    )


def escape(value: object) -> str:
    """Text for HTML; control characters as their pictures, halves of characters as '?'."""
    text = str(value).translate(CONTROL_PICTURES).encode("utf-8", "replace").decode()
    return html.escape(text)


def headline_figures(records: RunRecords) -> list[tuple[str, str, str]]:
    """Label, value and what has to be said beside it."""
    metrics, last = records.metrics, records.metrics[-1]
    model, train = records.config.model, records.config.train
    validated = [record for record in metrics if record.get("bits_per_byte") is not None]
    figures = []
    if validated:
        at = f"validation, step {validated[-1]['step']:,}"
        figures += [
            ("Bits per byte", f"{validated[-1]['bits_per_byte']:.3f}", at),
            ("Validation loss", f"{validated[-1]['valid_loss']:.3f}", "nats per token"),
        ]
    recent = metrics[-max(1, len(metrics) // 50) :]
    mean_loss = sum(record["loss"] for record in recent) / len(recent)
    span = "last step" if len(recent) == 1 else f"mean of the last {len(recent):,} steps"
    parameters = count_parameters(model).total
    flops = flops_per_token(model, train.seq_len) * last["tokens_seen"]
    mantissa, _, exponent = f"{flops:.1e}".partition("e")
    return [
        *figures,
        ("Training loss", f"{mean_loss:.3f}", f"nats per token, {span}"),
        (
            "Parameters",
            format_count(parameters),
            f"N = {format_count(active_matmul_parameters(model))} in matrix products and head",
        ),
        (
            "Tokens seen",
            format_count(last["tokens_seen"]),
            f"{last['tokens_seen'] / parameters:.3g} per parameter; "
            f"{mantissa}·10{superscript(int(exponent))} FLOPs",
        ),
        (
            "Wall time",
            format_duration(elapsed_seconds(metrics)[-1]),
            f"to step {last['step']:,}, validation included",
        ),
        (
            "Speed",
            format_rate(median_high(record["tokens_per_second"] for record in metrics), "tokens"),
            "median over the steps",
        ),
        (
            "MFU",
            format_percent(median_high(record["mfu"] for record in metrics)),
            f"median; {MFU_CONVENTION}",
        ),
    ]


def _subtitle(records: RunRecords) -> str:
    step, wanted = records.metrics[-1]["step"], num_steps(records.config.train)
    progress = (
        f"finished all {wanted:,} steps"
        if step >= wanted
        else f"stands at step {step:,} of {wanted:,}"
    )
    model = records.config.model
    shape = f"{model.num_layers} layers, width {model.d_model}, vocabulary {model.vocab_size:,}"
    return f"{shape} · {progress}"


def _figure(label: str, value: str, note: str) -> str:
    shown = re.sub(r"^(\S+) (\S+)$", r"\1 <small>\2</small>", escape(value))
    return (
        f'<div><dt>{escape(label)}</dt><dd class="value">{shown}</dd>'
        f'<dd class="note">{escape(note)}</dd></div>'
    )


def _plot(plot: Plot) -> str:
    return (
        f"<figure><figcaption><h3>{escape(plot.title)}</h3><span>{escape(plot.note)}</span>"
        f"</figcaption>{plot.svg}</figure>"
    )


def _samples(samples: Sequence[Record]) -> str:
    """Continuations by step, the newest open; the prompt is set off from what the model wrote."""
    steps = [(step, list(group)) for step, group in groupby(samples, lambda s: s["step"])]
    blocks = []
    for step, group in reversed(steps):
        texts = "".join(
            f"<pre><b>{escape(sample['prompt'])}</b>{escape(sample['text'])}</pre>"
            for sample in group
        )
        state = " open" if step == steps[-1][0] else ""
        blocks.append(f"<details{state}><summary>Step {escape(step)}</summary>{texts}</details>")
    return _section("Samples", "".join(blocks))


def _plan(plan: Record) -> str:
    """What was predicted before the first step, and what it took."""
    rows = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>"
        for row in plan_rows(plan)
    )
    head = "<tr><th></th><th>planned</th><th>nine times of ten</th><th>taken</th><th></th></tr>"
    return _section("Plan against outcome", f"<table>{head}{rows}</table>", rows)


def _events(events: Sequence[Record]) -> str:
    rows = [
        f'<tr><td class="fixed">{escape(_readable(event["time"]))}</td>'
        f'<td class="number">{escape(event["step"])}</td><td>{escape(event["event"])}</td>'
        f"<td>{escape(event['detail'])}</td></tr>"
        for event in events
    ]
    head = '<tr><th>time</th><th class="number">step</th><th>event</th><th>detail</th></tr>'
    return _section("Events", f'<div class="wide"><table>{head}{"".join(rows)}</table></div>', rows)


def _readable(time: str) -> str:
    """An ISO time in UTC, to the second."""
    return time.replace("T", " ").replace("+00:00", " UTC")


def _machine(environment: Record) -> str:
    """The last of the cards in the grid of curves, beside the MFU that refers to it."""
    rows = "".join(
        _row(key.removesuffix("_bytes").removesuffix("_flops_per_second"), _with_unit(key, value))
        for key, value in environment.items()
    )
    return f'<div class="card"><h3>Machine</h3><table>{rows}</table></div>' if rows else ""


def _with_unit(key: str, value: object) -> str:
    if isinstance(value, int | float) and key.endswith("_bytes"):
        return format_bytes(value)
    if isinstance(value, int | float) and key.endswith("flops_per_second"):
        return format_flops_per_second(value)
    return "not known" if value is None else str(value)


def _data(index: Record) -> str:
    rows = "".join(_row(key, value) for key, value in _data_rows(index))
    return _section("Data", f"<table>{rows}</table>", rows)


def _data_rows(index: Record) -> Iterator[tuple[str, str]]:
    """The sources, and documents, tokens and bytes of both splits over all of them."""
    if not index:
        return
    sources = index["sources"]
    yield "sources", ", ".join(str(source["path"]) for source in sources)
    for split, label in (("train", "training"), ("valid", "validation")):
        parts = [source["splits"][split] for source in sources]
        documents, tokens, text_bytes = (
            sum(part[key] for part in parts) for key in ("documents", "tokens", "text_bytes")
        )
        counts = f"{documents:,} documents, {format_count(tokens)} tokens"
        yield label, f"{counts}, {format_bytes(text_bytes)} of text"
        if tokens:
            yield f"{label}, bytes per token", f"{text_bytes / tokens:.2f}"
    excluded = sum(count for source in sources for count in source["excluded"].values())
    yield "records left out", f"{excluded:,}"
    yield "identity", str(index["identity"])[:12]


def _row(key: str, value: str) -> str:
    return f"<tr><th>{escape(key.replace('_', ' '))}</th><td>{escape(value)}</td></tr>"


def _config(toml: str) -> str:
    body = f"<details><summary>config.toml, resolved</summary><pre>{escape(toml)}</pre></details>"
    return _section("Configuration", body)


def _section(title: str, body: str, content: Sequence[str] | str | None = None) -> str:
    """A titled card, or nothing where there is no content."""
    shown = body if content is None else content
    return f'<h2>{title}</h2><div class="card">{body}</div>' if shown else ""
