"""Plan runs on this machine before they start, train them, and hold the outcome against the plan.

    python benchmarks/plan_outcomes.py [--only NAME]

Each preset is planned twice, by a machine that was never measured and after `--probe`, each with a
cache of its own; then it is trained. The table says how long a run was expected to take, nine times
of ten, and how long it took; and the same of memory. Takes about ten minutes; nothing else should
run meanwhile.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "plan_outcomes.json"
RUNS: dict[str, list[str]] = {
    "tiny": ["tiny"],
    "tiny-moe": ["tiny-moe", "--train.steps=120", "--schedule.warmup_steps=10"],
    "small": ["small", "--train.steps=24", "--schedule.warmup_steps=2"],
    "gpt2-124m": [
        "gpt2-124m",
        "--train.steps=12",
        "--train.batch_tokens=4096",
        "--train.seq_len=512",
        "--train.microbatch_seqs=2",
        "--schedule.warmup_steps=1",
    ],
    "llama-shaped": [
        "llama-7b",
        "--model.num_layers=8",
        "--model.d_model=512",
        "--model.num_heads=8",
        "--model.d_ff=1376",
        "--model.vocab_size=8192",
        "--train.steps=24",
        "--train.batch_tokens=8192",
        "--train.seq_len=512",
        "--train.microbatch_seqs=4",
        "--train.recompute=none",
        "--schedule.warmup_steps=1",
    ],
}


def lascaux(arguments: list[str], cache: Path) -> str:
    """One command with its own memory of the machine; its stdout."""
    environment = os.environ | {"XDG_CACHE_HOME": str(cache)}
    command = [sys.executable, "-m", "lascaux", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)}\n{done.stderr}")
    return done.stdout


def measure(name: str, arguments: list[str], folder: Path) -> dict[str, Any]:
    """Both plans and the outcome of one run."""
    never, probed, run = folder / f"{name}-0", folder / f"{name}-1", folder / name
    arguments = [*arguments, "--evaluate.max_tokens=8192", "--evaluate.final_max_tokens=8192"]
    before = json.loads(lascaux(["plan", *arguments, "--json"], never))
    after = json.loads(lascaux(["plan", *arguments, "--probe", "--json"], probed))
    lascaux(["train", *arguments, "--run", str(run)], folder / f"{name}-2")
    outcome = json.loads((run / "plan.json").read_text())["outcome"]
    found: dict[str, Any] = {"name": name}
    for label, plan in (("before", before), ("probed", after)):
        for key, planned in (
            ("step_seconds", plan["step_seconds"]),
            ("training_seconds", plan["training_seconds"]),
            ("memory_bytes", plan["memory"]["per_device_bytes"]),
        ):
            found[f"{label}_{key}"] = {q: planned[q] for q in ("p5", "p50", "p95")}
            found[f"{label}_{key}_inside"] = planned["p5"] <= outcome[key] <= planned["p95"]
    return found | {
        key: outcome[key] for key in ("step_seconds", "training_seconds", "memory_bytes")
    }


def row(found: dict[str, Any], key: str, unit: float) -> str:
    """One quantity of one run."""
    cells = []
    for label in ("before", "probed"):
        planned = found[f"{label}_{key}"]
        width = (planned["p95"] / planned["p5"]) ** 0.5
        mark = "" if found[f"{label}_{key}_inside"] else " OUTSIDE"
        cells.append(
            f"{planned['p5'] / unit:.3g} to {planned['p95'] / unit:.3g} (x/÷ {width:.2f}){mark}"
        )
    return f"| {found['name']} | {key} | {cells[0]} | {cells[1]} | {found[key] / unit:.3g} |"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", choices=RUNS)
    options = parser.parse_args()
    results = []
    print("| run | quantity | planned | after --probe | taken |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name, arguments in RUNS.items():
            if options.only in (None, name):
                results.append(measure(name, arguments, Path(folder)))
                units = (("step_seconds", 1.0), ("training_seconds", 1.0), ("memory_bytes", 2**30))
                for key, unit in units:
                    print(row(results[-1], key, unit), flush=True)
    if options.only is None:
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
