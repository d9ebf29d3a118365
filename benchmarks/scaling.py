"""How the cost of a training step grows with the model, the sequence and the micro-batch.

    python benchmarks/scaling.py [--rounds 5]

Runs `lascaux bench train` for one setting after another, the others held, and prints tokens per
second, the fraction of the matrix-multiply peak (6N + 12LdT FLOPs per token) and peak memory.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "scaling.json"
BASE = {
    "model.num_layers": 6,
    "model.d_model": 384,
    "model.num_heads": 6,
    "model.vocab_size": 4096,
    "model.max_context": 4096,
    "train.seq_len": 256,
    "train.batch_tokens": 8192,
    "train.microbatch_seqs": 8,
    "train.tokens": 1_000_000,
    "schedule.warmup_steps": 1,
}
SWEEPS: dict[str, list[dict[str, int]]] = {
    "width": [{"model.d_model": d, "model.num_heads": d // 64} for d in (128, 256, 512, 768, 1024)],
    "sequence": [
        {"train.seq_len": t, "train.microbatch_seqs": 2048 // t}
        for t in (128, 256, 512, 1024, 2048)
    ],
    "micro-batch": [{"train.microbatch_seqs": b} for b in (1, 2, 4, 8, 16, 32)],
    "vocabulary": [{"model.vocab_size": v} for v in (1024, 4096, 16384, 50304)],
}


def measure(change: dict[str, int], rounds: int, folder: Path) -> dict[str, Any]:
    """One call of `lascaux bench train` in a process of its own."""
    settings: dict[str, dict[str, int]] = {}
    for key, value in (BASE | change).items():
        section, leaf = key.split(".")
        settings.setdefault(section, {})[leaf] = value
    lines = []
    for section, values in settings.items():
        lines += [f"[{section}]", *(f"{leaf} = {value}" for leaf, value in values.items())]
    path = folder / "scaling.toml"
    path.write_text("\n".join(lines) + "\n")
    command = [sys.executable, "-m", "lascaux", "bench", "train", str(path), "--json"]
    done = subprocess.run(
        [*command, f"--rounds={rounds}"], capture_output=True, text=True, check=True
    )
    speed: dict[str, Any] = json.loads(done.stdout)
    kept = ("parameters", "precision", "tokens_per_second", "mfu", "peak_memory_bytes")
    return change | {name: speed[name] for name in kept}


def main() -> None:
    parser = argparse.ArgumentParser(description="cost of a step as things grow")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    found: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, changes in SWEEPS.items():
            print(f"{name:<24}{'parameters':>12}{'tokens/s':>10}{'of peak':>9}{'memory':>11}")
            found[name] = []
            for change in changes:
                each = measure(change, options.rounds, Path(folder))
                found[name].append(each)
                label = " ".join(f"{k.split('.')[1]} {v}" for k, v in change.items())[:23]
                print(
                    f"{label:<24}{each['parameters'] / 1e6:>10.1f} M"
                    f"{each['tokens_per_second']:>10,.0f}"
                    f"{each['mfu']:>9.1%}{each['peak_memory_bytes'] / 2**20:>7,.0f} MiB"
                )
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
