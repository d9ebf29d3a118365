"""Published runs as jobs, with what was measured: what the planner is fitted to and tested on."""

from dataclasses import dataclass
from functools import cache
from typing import Any

from lascaux.config.load import Setting, build_config
from lascaux.config.schema import Config
from lascaux.errors import ConfigError
from lascaux.parallel.layout import Layout
from lascaux.planner.devices import Device, find_device, processor
from lascaux.planner.facts import read_facts
from lascaux.planner.job import Job, make_job, with_stage
from lascaux.planner.memory import Ledger, worst_ledger
from lascaux.planner.search import jobs_on, search
from lascaux.planner.utilization import counted_flops_per_token
from lascaux.planner.work import Constants, step_seconds


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedRun:
    """A row of `facts/runs.toml`."""

    name: str
    stack: str
    source: str
    row: dict[str, Any]
    published: dict[str, Any]
    assumed: tuple[str, ...]
    """of the layout, what the source does not say"""

    @property
    def job(self) -> Job | None:
        """The run as the planner states it; None where the source says too little."""
        return _job_of(self.name)


@cache
def _job_of(name: str) -> Job | None:
    row = find_run(name).row
    needed = {"num_layers", "d_model", "num_heads", "vocab_size"}
    stated = needed <= set(row.get("model", {})) and {"seq_len", "devices"} <= set(row)
    if not stated or (row["device"] == "cpu" and "peak_gflops" not in row):
        return None
    return _job(row)


@cache
def published_runs() -> tuple[PublishedRun, ...]:
    """Every row, in the order of the table."""
    rows = read_facts("runs")["run"] + read_facts("own_runs")["run"]
    return tuple(_read(row) for row in rows)


def find_run(name: str) -> PublishedRun:
    """A row by its name.

    Raises: ConfigError listing the names that begin alike.
    """
    for run in published_runs():
        if run.name == name:
            return run
    stem = name.split("-")[0]
    near = [run.name for run in published_runs() if run.name.startswith(stem)]
    raise ConfigError(f"no published run '{name}'; known: {', '.join(near) or 'see scorecard'}")


def _read(row: dict[str, Any]) -> PublishedRun:
    layout = ("tp", "pp", "dp", "microbatch_seqs", "batch_seqs", "recompute", "zero")
    return PublishedRun(
        name=row["name"],
        stack=row["stack"],
        source=row["source"],
        row=row,
        published=row.get("published", {}),
        assumed=tuple(key for key in layout if key not in row),
    )


def _job(row: dict[str, Any]) -> Job | None:
    """The job of a row; what it does not say of the layout is chosen as the search would."""
    device = _row_device(row)
    tp, pp = row.get("tp", 1), row.get("pp", 1)
    if device.vendor == "Google":
        tp = max(1, tp // 2)  # published per core, and a chip is two
    precision = row.get("precision", "fp16" if device.year < 2020 else "bf16")
    if precision not in device.peak_flops_per_second:
        precision = next(iter(device.peak_flops_per_second))
    if not {"tp", "pp", "dp", "zero"} & set(row) and row["devices"] > 1:
        seqs = _batch_seqs(row, max(1, row["devices"] // 8) if "batch_seqs" not in row else 1)
        config = row_config(row, seqs * row["seq_len"], 1)
        found = search(config, device, row["devices"], precision, Constants(), _about_fits)
        wanted = row.get("recompute")
        found = [each for each in found if wanted in (None, each.job.recompute)]
        return found[0].job if found else None
    dp = row["devices"] // (tp * pp)
    seqs = _batch_seqs(row, dp)
    layout = with_stage(Layout(tp=tp, pp=pp, dp_shard=dp), row.get("zero", 0))
    if "microbatch_seqs" in row or pp > 1:
        microbatch = row.get("microbatch_seqs", 1)
        microbatch = microbatch if seqs % (microbatch * dp) == 0 else 1
        config = row_config(row, seqs * row["seq_len"], microbatch)
        return make_job(config, device, layout, precision)
    config = row_config(row, seqs * row["seq_len"], 1)
    jobs = list(jobs_on(config, device, layout, precision))
    fitting = [job for job in jobs if _about_fits(job, worst_ledger(job)[1])]
    return min(fitting or jobs, key=lambda job: step_seconds(job, Constants()).total)


def _row_device(row: dict[str, Any]) -> Device:
    """The device of a row; of our own rows a processor with the rates measured then."""
    if row["device"] != "cpu":
        return find_device(row["device"])
    rates = {row["precision"]: row["peak_gflops"] * 1e9}
    return processor(rates, row["bandwidth_gb_s"] * 1e9, memory_bytes=24 * 2**30)


def _about_fits(job: Job, ledger: Ledger) -> float:
    """Whether people would have run it."""
    return float(1.15 * ledger.total < job.device.memory_bytes)


def _batch_seqs(row: dict[str, Any], multiple: int) -> int:
    """The batch in sequences; batches printed as "4 M tokens" become whole for the devices."""
    seqs = row.get("batch_seqs") or row.get("batch_tokens", 0) // row["seq_len"] or multiple
    return max(1, round(seqs / multiple)) * multiple


def row_config(row: dict[str, Any], batch_tokens: int, microbatch: int) -> Config:
    """The configuration of a row; what the source does not say is as most runs have it."""
    model = row["model"] | {"max_context": row["seq_len"]}
    if model.get("num_experts"):
        model = model | {"balance": "loss"}
    values: dict[str, Any] = {f"model.{key}": value for key, value in model.items()}
    values |= {
        "train.batch_tokens": batch_tokens,
        "train.microbatch_seqs": microbatch,
        "train.seq_len": row["seq_len"],
        "train.steps": row.get("steps", 400),
        "plan.stack": row["stack"],
        "plan.recompute": row.get("recompute", "as_trained"),
        "plan.sequence_parallel": row.get("sequence_parallel", False),
        "plan.attention": "unfused" if _unfused(row) else "fused",
        "parallel.pp": row.get("pp", 1),
        "parallel.virtual_pp": row.get("virtual_pp", 1),
        "parallel.schedule": "interleaved" if row.get("virtual_pp", 1) > 1 else "1f1b",
    }
    if "tokens" in row and "steps" not in row:
        del values["train.steps"]
        values["train.tokens"] = row["tokens"]
    if "optimizer" in row:
        values["optimizer.name"] = row["optimizer"]
    if "zero" in row:
        values["plan.zero"] = row["zero"]
    return build_config({k: Setting(v, f"run {row['name']}") for k, v in values.items()})


def _unfused(row: dict[str, Any]) -> bool:
    """Whether attention kept its matrices: all GPT code before FlashAttention (2022)."""
    return row["stack"] not in ("lascaux", "llm-foundry", "llm.c", "nanogpt", "tinyllama", "llama")


def measured_step_seconds(run: PublishedRun) -> float | None:
    """Seconds of a step, printed or from what was printed; None where it does not follow."""
    published = run.published
    timed = {"step_seconds", "tokens_per_second_per_device", "tflops_per_device", "mfu"}
    if run.row.get("suspect") or not timed & set(published):
        return None
    job = run.job
    if job is None:
        return None
    if "step_seconds" in published:
        return published["step_seconds"]
    tokens = job.config.train.batch_tokens
    if "tokens_per_second_per_device" in published:
        return tokens / (published["tokens_per_second_per_device"] * job.devices)
    counted = flops_counted(run)
    peak = job.device.peak(job.precision)
    for key, unit in (("tflops_per_device", 1e12), ("mfu", peak)):
        if key in published and counted is not None:
            return counted * tokens / (published[key] * unit * job.devices)
    return None


def flops_counted(run: PublishedRun) -> float | None:
    """FLOPs a token as the source counts them; None where it does not say how."""
    job, published = run.job, run.published
    counts = published.get("counts")
    if job is None:
        return None
    if counts is None and "mfu" in published:
        counts = "palm"
    elif counts is None and published.get("recomputation_counted"):
        counts = "hardware"
    if counts is None:
        return None
    total = run.row.get("active_parameters") or run.row.get("parameters")
    recompute = "full" if counts == "megatron" else job.recompute
    config = job.config
    return counted_flops_per_token(counts, config.model, config.train.seq_len, recompute, total)
