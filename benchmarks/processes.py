"""One model on several processes of this machine against one process with as many threads.

    python benchmarks/processes.py [--rounds 5] [--steps 12]

The same global batch, the same micro-batches, the same cores: what splitting itself costs. Each
layout trains in turn, round after round; a layout's figure in a round is the median step after the
first three. Ratios are to one process in the same round.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "processes.json"
WARM_UP_STEPS = 3
SETTINGS = """
[model]
num_layers = 6
d_model = 384
num_heads = 6
vocab_size = 4096
max_context = 256
[train]
batch_tokens = 8192
microbatch_seqs = 8
seq_len = 256
steps = {steps}
[schedule]
warmup_steps = 1
[evaluate]
every_steps = 0
final_max_tokens = 1024
sample_prompts = []
[checkpoint]
every_steps = 1000
[data]
sources = "{data}"
"""
LAYOUTS = {
    "one process, 2 threads": (1, []),
    "dp_shard 2": (2, []),
    "dp_replicate 2": (2, ["--parallel.dp_replicate=2"]),
    "tp 2": (2, ["--parallel.tp=2"]),
    "cp 2": (2, ["--parallel.cp=2"]),
    "pp 2": (2, ["--parallel.pp=2"]),
}


def median_step_seconds(config: Path, run: Path, processes: int, flags: list[str]) -> float:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    launch = [*torchrun, "-m", "--"] if processes > 1 else ["-m"]
    command = [sys.executable, *launch, "lascaux", "train", str(config), "--run", str(run), *flags]
    subprocess.run(command, check=True, capture_output=True)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(line["seconds"] for line in lines[WARM_UP_STEPS:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12)
    options = parser.parse_args()
    seconds: dict[str, list[float]] = {name: [] for name in LAYOUTS}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        prepare = ["lascaux", "prepare", "stdlib", "--out", str(data)]
        subprocess.run([sys.executable, "-m", *prepare], check=True, capture_output=True)
        config = Path(folder) / "config.toml"
        config.write_text(SETTINGS.format(steps=options.steps, data=data))
        for number in range(options.rounds):
            for name, (processes, flags) in LAYOUTS.items():
                run = Path(folder) / f"{number}-{name.replace(' ', '')}"
                seconds[name].append(median_step_seconds(config, run, processes, flags))
    results: dict[str, Any] = {}
    for name, measured in seconds.items():
        ratios = [
            s / one for s, one in zip(measured, seconds["one process, 2 threads"], strict=True)
        ]
        results[name] = {"seconds": measured, "ratio_of_step_time": ratios}
        print(
            f"{name:<24}{statistics.median(measured):>7.3f} s a step  "
            f"{statistics.median(ratios):.2f} x ({min(ratios):.2f} to {max(ratios):.2f})"
        )
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
