"""Greedy generation beside Hugging Face transformers, on the same weights, in turn.

    python benchmarks/generation.py RUN [--rounds 7]

RUN is a run folder, such as `lascaux import SmolLM2-135M-Instruct.Q4_1.gguf --out RUN` makes. Each
round answers the same prompt of 32 tokens with 64 tokens, alone and eight times at once, in every
variant; ratios are medians over rounds. Memory bandwidth is that of a sum, measured in each round.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from lascaux.bench.generation import matrix_bytes
from lascaux.config.schema import ModelConfig
from lascaux.exchange.exporting import export_folder
from lascaux.generate.engine import Engine
from lascaux.generate.load import LoadedModel, load_for_generation
from lascaux.generate.request import EngineOptions, Request, Sampling
from lascaux.parallel.hardware import measure_read_bandwidth

PROMPT, DRAWN, STREAMS = 32, 64, 8
WEIGHTS = ("fp32", "bf16", "int8", "int4")
Answer = Callable[[int], float]


def ours(loaded: LoadedModel) -> Answer:
    options = EngineOptions(cache_tokens=STREAMS * (PROMPT + DRAWN + 64), reuse_prefixes=False)
    engine = Engine(loaded, options)
    sampling = Sampling(max_tokens=DRAWN, temperature=0, ignore_end_of_text=True)
    request = Request(prompt=tuple(range(100, 100 + PROMPT)), sampling=sampling)

    def answer(streams: int) -> float:
        """Seconds of a step in which all draw."""
        engine.submit([(request, lambda piece: None)] * streams)
        for _ in range(streams):  # one prompt is read in each step
            engine.step()
        started = time.perf_counter()
        steps = engine.figures().steps
        while engine.step():
            pass
        return (time.perf_counter() - started) / (engine.figures().steps - steps)

    return answer


def theirs(folder: Path, dtype: torch.dtype) -> Answer:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    prompt = torch.arange(100, 100 + PROMPT)

    @torch.inference_mode()
    def answer(streams: int) -> float:
        """Seconds of a token: of a long answer less a short one."""
        ids = prompt.repeat(streams, 1)
        seconds = []
        for drawn in (DRAWN // 4, DRAWN):
            started = time.perf_counter()
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=drawn,
                min_new_tokens=drawn,
                do_sample=False,
                pad_token_id=0,
            )
            seconds.append(time.perf_counter() - started)
        return (seconds[1] - seconds[0]) / (DRAWN - DRAWN // 4)

    return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    variants: dict[str, Answer] = {}
    for weights in WEIGHTS:
        loaded = load_for_generation(options.run, [f"--generate.weights={weights}"])
        variants[f"lascaux {weights}"] = ours(loaded)
    config = loaded.model.config
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "hf"
        export_folder(options.run, folder, Console(stderr=True), "fp32")
        variants["transformers fp32"] = theirs(folder, torch.float32)
        variants["transformers bf16"] = theirs(folder, torch.bfloat16)
    seconds: dict[str, list[float]] = {}
    bandwidth: list[float] = []
    for number in range(options.rounds + 1):
        reading = measure_read_bandwidth(torch.device("cpu"))
        for name, answer in variants.items():
            for streams in (1, STREAMS):
                took = answer(streams)
                if number:
                    seconds.setdefault(f"{name} x{streams}", []).append(took)
        if number:
            bandwidth.append(reading)
        print(f"round {number} of {options.rounds}", file=sys.stderr)
    figures = describe(seconds, max(bandwidth), config)
    print(json.dumps(figures, indent=2))
    if options.out:
        options.out.write_text(json.dumps(figures, indent=2) + "\n")


def describe(
    seconds: dict[str, list[float]], bandwidth: float, config: ModelConfig
) -> dict[str, dict[str, float] | float]:
    """Tokens a second, the part of the bandwidth, and how many times transformers in bf16."""
    found: dict[str, dict[str, float] | float] = {"read_gb_per_second": bandwidth / 1e9}
    for name, took in seconds.items():
        program, weights, times = name.split()
        streams = int(times[1:])
        base = seconds[f"transformers bf16 x{streams}"]
        same = seconds.get(f"transformers {weights} x{streams}", base)
        row = {
            "tokens_per_second": streams / statistics.median(took),
            "times_transformers_bf16": statistics.median(
                b / t for b, t in zip(base, took, strict=True)
            ),
            "times_transformers_same": statistics.median(
                b / t for b, t in zip(same, took, strict=True)
            ),
        }
        if streams == 1:
            moved = matrix_bytes(config, weights)
            row["fraction_of_bandwidth"] = moved / statistics.median(took) / bandwidth
        else:
            one = seconds[f"{program} {weights} x1"]
            row["times_one_stream"] = streams * statistics.median(
                o / t for o, t in zip(one, took, strict=True)
            )
        found[name] = row
    return found


if __name__ == "__main__":
    main()
