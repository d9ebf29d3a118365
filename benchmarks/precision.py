"""Whether bf16 trains what fp32 trains: both, from several seeds, on the preset tiny.

    python benchmarks/precision.py [--steps 150] [--seeds 3]

Prints the bits per byte on held-out text for each seed and precision, and holds the largest
difference between the precisions at one seed against the spread between the seeds in fp32.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "precision.json"


def curve(precision: str, seed: int, steps: int, folder: Path) -> list[float]:
    """Bits per byte at each validation of one run."""
    run = folder / f"{precision}_{seed}"
    settings = {
        "train.precision": precision,
        "train.seed": seed,
        "train.steps": steps,
        "evaluate.every_steps": max(1, steps // 5),
        "evaluate.sample_prompts": "[]",
        "checkpoint.every_steps": steps,
    }
    flags = [f"--{key}={value}" for key, value in settings.items()]
    command = [sys.executable, "-m", "lascaux", "train", "tiny", "--run", str(run), *flags]
    subprocess.run(command, check=True, stdout=sys.stderr)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [record["bits_per_byte"] for record in records if "bits_per_byte" in record]


def main() -> None:
    parser = argparse.ArgumentParser(description="bf16 beside fp32")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    curves: dict[str, list[list[float]]] = {"fp32": [], "bf16": []}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(options.seeds):
            for precision, found in curves.items():
                found.append(curve(precision, seed, options.steps, Path(folder)))
    pairs = list(zip(curves["fp32"], curves["bf16"], strict=True))
    print(f"bits per byte after {options.steps} steps: seed, fp32, bf16")
    for seed, (fp32, bf16) in enumerate(pairs):
        print(f"{seed:>4}  {fp32[-1]:.4f}  {bf16[-1]:.4f}")
    ends = [fp32[-1] for fp32, _ in pairs]
    spread = max(ends) - min(ends)
    difference = max(abs(a[-1] - b[-1]) for a, b in pairs)
    print(f"largest difference {difference:.4f}, spread of the seeds in fp32 {spread:.4f}")
    result = {"steps": options.steps, "curves": curves, "spread": spread, "difference": difference}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
