"""What `lascaux prove` found, as a person reads it and as JSON."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from lascaux.config.schema import Config
from lascaux.parallel.accounting import training_state_bytes_of_process
from lascaux.parallel.layout import Layout
from lascaux.prove.dry_run import Held
from lascaux.prove.processes import Proof
from lascaux.prove.run import STEPS, Comparison
from lascaux.prove.traffic import Table
from lascaux.units import format_bytes, format_count, format_percent

CONVENTION = (
    "bytes: the largest tensor of a collective on one process; fsdp is dp_shard and cp together"
)


def describe_proof(proof: Proof, asked: Layout) -> str:
    """The trials, the collectives, the verdict."""
    config, layout = proof.config, proof.layout
    model, train = config.model, config.train
    shrunk = "" if layout == asked else f" (for {asked.describe()})"
    microbatches = train.batch_tokens // (train.seq_len * train.microbatch_seqs)
    lines = [
        f"layout   {layout.describe()}: {layout.world_size} processes{shrunk}",
        f"model    shrunk to {model.num_layers} layers, width {model.d_model}, "
        f"{model.num_heads} heads, vocabulary {model.vocab_rows}; {STEPS} steps of "
        f"{microbatches} micro-batches of {train.microbatch_seqs} x {train.seq_len} tokens",
        "",
        "largest difference from one process",
        f"{'optimizer':<11}{'computed in':<13}{'loss':>9}{'gradient norm':>15}{'weights':>9}"
        f"{'allowed':>9}  ",
        *(_row(comparison) for comparison in proof.comparisons),
        "loss and norm relative to themselves, weights to the largest movement of any weight",
        "",
        *traffic_lines(proof.traffic),
        "",
    ]
    if proof.agrees:
        lines.append("this layout trains the same model as one process")
    else:
        lines.append("THIS LAYOUT TRAINS ANOTHER MODEL than one process; do not train on it")
    return "\n".join(lines)


def _row(found: Comparison) -> str:
    verdict = "same"
    if not found.agrees:
        verdict = f"DIFFERENT, most in {found.worst_weight} on process {found.process}"
    return (
        f"{found.trial.optimizer:<11}{found.trial.precision:<13}{found.losses:>9.1e}"
        f"{found.grad_norms:>15.1e}{found.weights:>9.1e}{found.trial.bound:>9.0e}  {verdict}"
    )


def traffic_lines(table: Table) -> list[str]:
    """One line for each axis and kind of collective."""
    rows = [
        f"{axis:<14}{kind:<16}{amount.times:>9,}{format_bytes(amount.num_bytes):>13}"
        for (axis, kind), amount in sorted(table.items())
    ]
    header = f"{'axis':<14}{'collective':<16}{'a step':>9}{'bytes':>13}"
    return [header, *rows, CONVENTION]


def describe_dry_run(config: Config, layout: Layout, held: Sequence[Held]) -> str:
    """What each kind of process holds and says."""
    lines = [
        f"layout   {layout.describe()}: {layout.world_size:,} processes, built without devices",
        "",
        f"{'process':<9}{'stages':<10}{'parameters':>11}{'weights':>10}{'gradients':>11}"
        f"{'optimizer':>11}{'kept':>10}{'together':>10}{'accounting':>12}",
    ]
    for one in held:
        stages = ",".join(map(str, one.stages))
        lines.append(
            f"{one.rank:<9,}{stages:<10}{format_count(one.parameters):>11}"
            f"{format_bytes(one.weights_bytes):>10}{format_bytes(one.gradients_bytes):>11}"
            f"{format_bytes(one.optimizer_bytes):>11}{format_bytes(one.kept_bytes):>10}"
            f"{format_bytes(one.total_bytes):>10}"
            f"{format_percent(_accounted(config, layout, one)):>12}"
        )
    lines += [
        "kept: the most that forward passes keep for their backward passes at one time",
        "accounting: weights, gradients and optimizer state over what the config alone predicts",
        "gathered weights of one or two layers and what lives inside a layer come on top",
    ]
    for one in held:
        lines += ["", f"process {one.rank:,}", *traffic_lines(one.traffic)]
    return "\n".join(lines)


def _accounted(config: Config, layout: Layout, held: Held) -> float:
    predicted = training_state_bytes_of_process(config, layout, layout.place(held.rank)["pp"])
    return (held.weights_bytes + held.gradients_bytes + held.optimizer_bytes) / predicted


def traffic_json(table: Table) -> list[dict[str, Any]]:
    """The same as records."""
    return [
        {"axis": axis, "kind": kind, "times": amount.times, "bytes": amount.num_bytes}
        for (axis, kind), amount in sorted(table.items())
    ]


def proof_json(proof: Proof) -> dict[str, Any]:
    """Every comparison and collective."""
    return {
        "agrees": proof.agrees,
        "layout": dataclasses.asdict(proof.layout),
        "comparisons": [
            dataclasses.asdict(found) | {"agrees": found.agrees} for found in proof.comparisons
        ],
        "traffic": traffic_json(proof.traffic),
    }


def dry_run_json(config: Config, layout: Layout, held: Sequence[Held]) -> dict[str, Any]:
    """What the table shows."""
    return {
        "layout": dataclasses.asdict(layout),
        "processes": [
            dataclasses.asdict(one)
            | {
                "traffic": traffic_json(one.traffic),
                "measured_over_predicted": _accounted(config, layout, one),
            }
            for one in held
        ],
    }
