"""A plan as figures for JSON: the keys that other programs read."""

from typing import Any

import numpy as np

from lascaux.planner.job import Job
from lascaux.planner.plan import Plan
from lascaux.planner.search import Candidate
from lascaux.planner.uncertainty import Interval, Samples, interval_of
from lascaux.planner.utilization import counted_flops_per_token

CONVENTION = "6N + 12LdT a token, N matmul parameters with the head; over the published dense peak"


def plan_figures(plan: Plan) -> dict[str, Any]:
    """Everything that `lascaux plan --json` prints; intervals are p5 to p95."""
    job, config = plan.job, plan.job.config
    total, active = plan.parameters
    tokens = config.train.batch_tokens / plan.step_seconds / job.devices
    found: dict[str, Any] = {
        "device": job.device.id,
        "devices": job.devices,
        "precision": job.precision,
        "stack": job.stack,
        "parameters": {"total": total, "active": active},
        "tokens": job.tokens,
        "steps": job.num_steps,
        "flops_per_token": plan.flops_per_step // config.train.batch_tokens,
        "training_flops": plan.training_flops,
        "layout": layout_figures(plan),
        "memory": {
            "per_device_bytes": dictionary(plan.memory),
            "by_kind": plan.ledger.by_kind() | {"unexplained": unexplained(plan)},
            "of_bytes": job.device.memory_bytes,
            "fits_probability": plan.fits_probability,
            "worst_pipeline_process": plan.pp_index,
        },
        "step_seconds": dictionary(plan.step_seconds),
        "step_parts_seconds": {
            name: getattr(plan.seconds, name) for name in type(plan.seconds).__slots__
        },
        "tokens_per_second_per_device": dictionary(tokens),
        "mfu": dictionary(utilization(plan)),
        "hfu": dictionary(utilization(plan) * recomputation(plan)),
        "mfu_convention": CONVENTION,
        "wall_hours": {"nominal": float(np.median(plan.goodput.nominal_hours))}
        | dictionary(plan.goodput.wall_hours),
        "training_seconds": dictionary(3600 * plan.goodput.training_hours),
        "time_parts_hours": time_parts(plan),
        "failures": dictionary(plan.goodput.failures),
        "checkpoint_steps": {
            "configured": config.checkpoint.every_steps,
            "best": max(1, round(plan.goodput.best_interval_steps)),
        },
        "device_hours": dictionary(plan.device_hours),
        "energy_kwh": optional(plan.bill.energy_kwh),
        "co2_kg": optional(plan.bill.co2_kg),
        "cost_usd": {name: optional(cost) for name, cost in plan.bill.cost_usd.items()},
        "project_factor": dictionary(plan.project_factor),
        "project_cost_usd": project_costs(plan),
        "missing": plan.bill.missing,
        "sources": sources(plan),
        "spread": {name: plan.drivers(samples) for name, samples in driven(plan).items()},
        "candidates": [candidate_figures(each) for each in plan.candidates[:10]],
    }
    budget = config.plan.budget_usd
    if budget is not None:
        on_demand = plan.bill.cost_usd["on_demand"]
        kept = None if on_demand is None else float(np.mean(on_demand <= budget))
        found["budget"] = {"usd": budget, "kept_probability": kept}
    return found


def dictionary(samples: Samples) -> dict[str, float]:
    """p5 to p95 of draws."""
    return interval_of(samples).as_dict()


def optional(samples: Samples | None) -> dict[str, float] | None:
    """The same, or None where nothing is known."""
    return None if samples is None else dictionary(samples)


def interval_or_none(samples: Samples | None) -> Interval | None:
    """An interval, or None where nothing is known."""
    return None if samples is None else interval_of(samples)


def unexplained(plan: Plan) -> float:
    """The middle of what measured runs needed beyond the ledger, bytes."""
    return float(np.median(plan.memory)) - plan.ledger.total


def utilization(plan: Plan) -> Samples:
    """MFU of the steps: model FLOPs over the published dense peak."""
    peak = plan.job.device.peak(plan.job.precision)
    return plan.flops_per_step / (plan.job.devices * peak * plan.step_seconds)


def recomputation(plan: Plan) -> float:
    """Hardware FLOPs over model FLOPs."""
    config = plan.job.config
    hardware, model = (
        counted_flops_per_token(count, config.model, config.train.seq_len, plan.job.recompute)
        for count in ("hardware", "palm")
    )
    return hardware / model


def project_costs(plan: Plan) -> dict[str, dict[str, float] | None]:
    """The final run with everything around it: experiments, failed runs and, if stated, staff."""
    staff = plan.job.config.plan.staff_usd or 0.0
    return {
        name: None if cost is None else dictionary(cost * plan.project_factor + staff)
        for name, cost in plan.bill.cost_usd.items()
        if name != "purchase"
    }


def driven(plan: Plan) -> dict[str, Samples]:
    """Quantities whose width is taken apart."""
    found = {"memory": plan.memory, "wall_hours": plan.goodput.wall_hours}
    for name, samples in (
        ("energy_kwh", plan.bill.energy_kwh),
        ("cost_usd", plan.bill.cost_usd["on_demand"]),
    ):
        if samples is not None:
            found[name] = samples
    return found


def sources(plan: Plan) -> dict[str, str]:
    """What each figure rests on."""
    device = plan.job.device
    found = {"device": device.source, "speed": plan.speed_source} | plan.bill.sources
    if device.assumed:
        found["assumed of the device"] = ", ".join(device.assumed)
    return found


def time_parts(plan: Plan) -> dict[str, float]:
    """Where the hours go, medians: parts of the steps, then what is beside them."""
    seconds, goodput = plan.seconds, plan.goodput
    steps = float(np.median(goodput.nominal_hours))
    found = {
        name: steps * getattr(seconds, name) / seconds.total for name in type(seconds).__slots__
    }
    for name in ("evaluation", "saving", "starting", "lost", "other"):
        found[name] = float(np.median(getattr(goodput, f"{name}_hours")))
    return found


def layout_figures(plan: Plan) -> dict[str, Any]:
    """Axes, micro-batch and recomputation, and whether they were chosen here."""
    job = plan.job
    return {
        "description": job.layout.describe(),
        "axes": {
            "pp": job.layout.pp,
            "dp_replicate": job.layout.dp_replicate,
            "dp_shard": job.layout.dp_shard,
            "cp": job.layout.cp,
            "tp": job.layout.tp,
            "ep": job.layout.ep,
        },
        "microbatch_seqs": job.config.train.microbatch_seqs,
        "recompute": job.recompute,
        "zero": job.zero,
        "chosen": plan.searched,
        "settings": train_settings(job),
    }


def train_settings(job: Job) -> list[str]:
    """Flags with which `lascaux train` runs this layout."""
    parallel = job.config.parallel
    found = [
        f"--parallel.{axis}={getattr(parallel, axis)}"
        for axis in ("pp", "dp_replicate", "dp_shard", "cp", "tp", "ep")
        if (getattr(parallel, axis) or 1) > 1
    ]
    if parallel.virtual_pp > 1:
        found.append(f"--parallel.virtual_pp={parallel.virtual_pp}")
        found.append(f"--parallel.schedule={parallel.schedule}")
    found.append(f"--train.microbatch_seqs={job.config.train.microbatch_seqs}")
    found.append(f"--train.recompute={job.config.train.recompute}")
    found.append(f"--train.batch_tokens={job.config.train.batch_tokens}")
    if job.config.model.padded_vocab_size is not None:
        found.append(f"--model.padded_vocab_size={job.config.model.padded_vocab_size}")
    return found


def candidate_figures(candidate: Candidate) -> dict[str, Any]:
    """One layout that fits; seconds and bytes are the formulas' own, without what was learned."""
    job = candidate.job
    return {
        "layout": job.layout.describe(),
        "microbatch_seqs": job.config.train.microbatch_seqs,
        "recompute": job.recompute,
        "step_seconds": candidate.seconds.total,
        "bytes": candidate.ledger.total,
        "fits_probability": candidate.fits_probability,
    }
