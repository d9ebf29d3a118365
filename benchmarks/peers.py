"""Training steps of Lascaux beside what one would use instead, in turn and in one run.

    python benchmarks/peers.py [--shape small|large] [--rounds 7] [--peers loop-bf16,…]

Lascaux and the peer train the same GPT-2-shaped network from the same weights on the same tokens
with AdamW, each in a process of its own that waits while the other computes: a round is one step of
each, after two to warm up. Quoted are the median step, tokens per second, the fraction of the bf16
matrix-multiply peak (6N + 12LdT FLOPs per token, attention not halved), the peak resident memory of
the process, and the median over the rounds of the peer's time over Lascaux's. `transformers` is
Hugging Face's GPT-2; `loop` the network as one writes it down in PyTorch. Losses must agree in
every step to 2 %, or the run fails. Each side runs as it comes: Lascaux cuts the batch into
micro-batches and has glibc keep freed memory, the peers do neither.
"""

import argparse
import json
import multiprocessing as mp
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from lascaux.config.schema import ModelConfig, OptimizerConfig, TrainConfig
from lascaux.data.loader import Batch
from lascaux.model.accounting import flops_per_token
from lascaux.model.init import initialise
from lascaux.model.transformer import Transformer
from lascaux.optim.optimizer import build_optimizers
from lascaux.parallel.hardware import measure_matmul_peak, usable_cores
from lascaux.parallel.layout import Layout
from lascaux.parallel.world import World
from lascaux.train.machine import cpu_name, keep_freed_memory
from lascaux.train.precision import WorkingCopy
from lascaux.train.step import split_batch, train_step

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
RESULTS = Path(__file__).parent / "results"
LEARNING_RATE, BETAS, WEIGHT_DECAY = 1e-4, (0.9, 0.95), 0.0
WARM_UP_STEPS = 2
LOSS_TOLERANCE = 0.02  # relative; bf16 against fp32 over the first steps


@dataclass(frozen=True)
class Shape:
    num_layers: int
    d_model: int
    num_heads: int
    seq_len: int
    batch_seqs: int
    vocab_size: int
    microbatch_seqs: int
    """what Lascaux cuts the batch into; the peers take it whole"""

    @property
    def batch_tokens(self) -> int:
        return self.batch_seqs * self.seq_len


SHAPES = {
    "small": Shape(6, 384, 6, 256, 32, 1024, 8),
    "large": Shape(12, 768, 12, 512, 8, 50304, 4),
}
PEERS = (
    "lascaux-fp32",
    "lascaux-compile",
    "transformers-fp32",
    "transformers-bf16",
    "loop-fp32",
    "loop-bf16",
    "loop-compile-fp32",
    "loop-compile-bf16",
)


def model_config(shape: Shape) -> ModelConfig:
    """GPT-2 of this shape in our own words."""
    return ModelConfig(
        num_layers=shape.num_layers,
        d_model=shape.d_model,
        num_heads=shape.num_heads,
        vocab_size=shape.vocab_size,
        max_context=shape.seq_len,
        position="learned",
        attention_bias=True,
        attention_output_bias=True,
        ffn_bias=True,
        norm_bias=True,
    )


def initial_weights(shape: Shape) -> dict[str, Any]:
    """The weights every variant starts from, under Lascaux's names."""
    model = Transformer(model_config(shape))
    initialise(model, seed=0)
    return model.state_dict()


def batch(shape: Shape) -> tuple[Any, Any]:
    """Tokens and targets; the same ones in every step."""
    draw = torch.Generator().manual_seed(0)
    size = (shape.batch_seqs, shape.seq_len + 1)
    tokens = torch.randint(0, shape.vocab_size, size, generator=draw)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def lascaux_step(shape: Shape, precision: str, compiled: bool) -> Callable[[], float]:

    keep_freed_memory()
    model = Transformer(model_config(shape))
    model.load_state_dict(initial_weights(shape))
    working = WorkingCopy(model, TrainConfig(precision=precision, compile=compiled))  # type: ignore[arg-type]
    optimizers = build_optimizers(
        model.named_parameters(),
        OptimizerConfig(lr=LEARNING_RATE, beta2=BETAS[1], weight_decay=WEIGHT_DECAY),
    )
    tokens, targets = batch(shape)
    microbatches = split_batch(Batch(tokens.numpy(), targets.numpy()), shape.microbatch_seqs)
    world = World(Layout(), 0, torch.device("cpu"))

    def step() -> float:
        return train_step(working, optimizers, microbatches, world=world, grad_clip=None).loss

    return step


def loop_model(shape: Shape) -> Any:
    """GPT-2 as one writes it down."""
    D = shape.d_model

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
            self.qkv, self.o = nn.Linear(D, 3 * D), nn.Linear(D, D)
            self.up, self.down = nn.Linear(D, 4 * D), nn.Linear(4 * D, D)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            B, T, _ = x.shape
            heads = [t.view(B, T, shape.num_heads, -1).transpose(1, 2) for t in
                     self.qkv(self.norm1(x)).split(D, dim=-1)]  # fmt: skip
            z = F.scaled_dot_product_attention(*heads, is_causal=True)
            x = x + self.o(z.transpose(1, 2).reshape(B, T, D))
            return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))

    class GPT(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(shape.vocab_size, D)
            self.position_embed = nn.Embedding(shape.seq_len, D)
            self.blocks = nn.ModuleList(Block() for _ in range(shape.num_layers))
            self.final_norm = nn.LayerNorm(D)

        def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            x = self.embed(tokens) + self.position_embed(torch.arange(tokens.shape[1]))
            for block in self.blocks:
                x = block(x)
            logits = F.linear(self.final_norm(x), self.embed.weight)
            return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    model = GPT()
    weights = initial_weights(shape)
    renamed = {}
    for name, tensor in weights.items():
        new = name.replace("attn.", "").replace("ffn.", "")
        if new.endswith(("k.weight", "k.bias", "v.weight", "v.bias")) and ".attn." in name:
            continue
        if ".attn.q." in name:
            parts = [weights[name.replace("attn.q", f"attn.{p}")] for p in "qkv"]
            new, tensor = new.replace(".q.", ".qkv."), torch.cat(parts)
        renamed[new] = tensor
    model.load_state_dict(renamed)
    return model


def transformers_model(shape: Shape) -> Any:
    """Hugging Face's GPT-2 with the same weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=shape.vocab_size,
        n_positions=shape.seq_len,
        n_embd=shape.d_model,
        n_layer=shape.num_layers,
        n_head=shape.num_heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
    )
    model = GPT2LMHeadModel(config)
    ours = initial_weights(shape)
    weights = {
        "transformer.wte.weight": ours["embed.weight"],
        "lm_head.weight": ours["embed.weight"],
    }
    weights["transformer.wpe.weight"] = ours["position_embed.weight"]
    for kind in ("weight", "bias"):
        weights[f"transformer.ln_f.{kind}"] = ours[f"final_norm.{kind}"]
        for i in range(shape.num_layers):
            b, h = f"blocks.{i}", f"transformer.h.{i}"
            weights[f"{h}.ln_1.{kind}"] = ours[f"{b}.norm1.{kind}"]
            weights[f"{h}.ln_2.{kind}"] = ours[f"{b}.norm2.{kind}"]
            qkv = torch.cat([ours[f"{b}.attn.{p}.{kind}"] for p in "qkv"])
            for theirs, tensor in (
                ("attn.c_attn", qkv),
                ("attn.c_proj", ours[f"{b}.attn.o.{kind}"]),
                ("mlp.c_fc", ours[f"{b}.ffn.up.{kind}"]),
                ("mlp.c_proj", ours[f"{b}.ffn.down.{kind}"]),
            ):
                weights[f"{h}.{theirs}.{kind}"] = tensor.T if kind == "weight" else tensor
    model.load_state_dict(weights)

    class WithLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            logits = self.inner(input_ids=tokens).logits
            return nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    return WithLoss()


def peer_step(model: Any, shape: Shape, precision: str, compiled: bool) -> Callable[[], float]:

    forward = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(
        model.parameters(), LEARNING_RATE, BETAS, weight_decay=WEIGHT_DECAY, fused=True
    )
    tokens, targets = batch(shape)

    def step() -> float:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = forward(tokens, targets)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def serve_variant(name: str, shape: Shape, pipe: Connection) -> None:
    """One process: a step for each message, answered with seconds and loss."""
    torch.set_num_threads(usable_cores())
    kind, *options = name.split("-")
    compiled = "compile" in options
    if kind == "lascaux":
        precision = "fp32" if "fp32" in options else "bf16"
        step = lascaux_step(shape, precision, compiled)
    else:
        model = (loop_model if kind == "loop" else transformers_model)(shape)
        step = peer_step(model, shape, "bf16" if "bf16" in options else "fp32", compiled)
    while pipe.recv() == "step":
        started = time.perf_counter()
        loss = step()
        pipe.send((time.perf_counter() - started, loss, peak_resident_bytes()))


def peak_resident_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@dataclass
class Measured:
    """What one process did, step by step; the first steps warm up."""

    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    matmul_peaks: list[float] = field(default_factory=list)
    """FLOP/s in bf16, measured just before each step"""
    peak_bytes: int = 0


def measure_pair(shape: Shape, peer: str, rounds: int) -> tuple[Measured, Measured]:
    """Lascaux and one peer, step by step in turn: more would not fit into memory together."""
    context = mp.get_context("spawn")
    names = ("lascaux", peer)
    pipes: list[Connection] = []
    processes = []
    for name in names:
        here, there = context.Pipe()
        process = context.Process(target=serve_variant, args=(name, shape, there), daemon=True)
        process.start()
        there.close()
        pipes.append(here)
        processes.append(process)
    found = (Measured(), Measured())
    for number in range(-WARM_UP_STEPS, rounds):
        matmul_peak = measure_matmul_peak(torch.device("cpu"), torch.bfloat16)
        for name, pipe, result in zip(names, pipes, found, strict=True):
            pipe.send("step")
            try:
                seconds, loss, result.peak_bytes = pipe.recv()
            except EOFError:
                raise SystemExit(f"{name} ended; was it out of memory?") from None
            result.losses.append(loss)
            if number >= 0:
                result.seconds.append(seconds)
                result.matmul_peaks.append(matmul_peak)
            print(f"round {number}: {name} {seconds:.2f} s, loss {loss:.4f}", file=sys.stderr)
    for pipe, process in zip(pipes, processes, strict=True):
        pipe.send("stop")
        process.join()
    check_losses(peer, found[1].losses, found[0].losses)
    return found


def check_losses(name: str, losses: list[float], wanted: list[float]) -> None:
    """Both must have trained the same thing."""
    for step, (got, want) in enumerate(zip(losses, wanted, strict=True), start=1):
        if abs(got - want) > LOSS_TOLERANCE * want:
            raise SystemExit(f"step {step}: the loss of {name} is {got}, that of lascaux {want}")


def row(name: str, shape: Shape, results: list[Measured]) -> dict[str, Any]:
    """The figures of one variant, over all its processes."""
    work = flops_per_token(model_config(shape), shape.seq_len) * shape.batch_tokens
    steps = [second for result in results for second in result.seconds]
    peaks = [peak for result in results for peak in result.matmul_peaks]
    seconds = statistics.median(steps)
    fractions = [work / step / peak for step, peak in zip(steps, peaks, strict=True)]
    return {
        "variant": name,
        "step_seconds": seconds,
        "step_seconds_range": [min(steps), max(steps)],
        "tokens_per_second": shape.batch_tokens / seconds,
        "fraction_of_bf16_peak": statistics.median(fractions),
        "bf16_peak_flops_per_second": statistics.median(peaks),
        "peak_resident_bytes": max(result.peak_bytes for result in results),
        "losses": results[0].losses,
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        f"{'variant':<19}{'step':>8}{'tokens/s':>10}{'of bf16 peak':>14}{'memory':>11}"
        f"{'Lascaux is':>12}"
    ]
    for each in rows:
        lines.append(
            f"{each['variant']:<19}{each['step_seconds']:>6.2f} s"
            f"{each['tokens_per_second']:>10,.0f}"
            f"{each['fraction_of_bf16_peak']:>14.1%}"
            f"{each['peak_resident_bytes'] / 2**20:>7,.0f} MiB"
        )
        if "lascaux_is_faster_by" in each:
            low, high = each["ratio_range"]
            lines[-1] += f"{each['lascaux_is_faster_by']:>8.2f} x  ({low:.2f} to {high:.2f})"
    return "\n".join(lines)


def compare(shape: Shape, peers: list[str], rounds: int) -> list[dict[str, Any]]:
    """A row for each variant, Lascaux first."""
    pairs = {peer: measure_pair(shape, peer, rounds) for peer in peers}
    rows = [row("lascaux", shape, [ours for ours, _ in pairs.values()])]
    for peer, (ours, theirs) in pairs.items():
        ratios = [b / a for a, b in zip(ours.seconds, theirs.seconds, strict=True)]
        rows.append(row(peer, shape, [theirs]))
        rows[-1]["lascaux_is_faster_by"] = statistics.median(ratios)
        rows[-1]["ratio_range"] = [min(ratios), max(ratios)]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="training steps beside the peers'")
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peers", default=",".join(PEERS))
    options = parser.parse_args()
    unknown = set(options.peers.split(",")) - set(PEERS)
    if unknown:
        parser.error(f"unknown peers {', '.join(unknown)}; known: {', '.join(PEERS)}")
    torch.set_num_threads(usable_cores())
    shape = SHAPES[options.shape]
    rows = compare(shape, options.peers.split(","), options.rounds)
    peak = rows[0]["bf16_peak_flops_per_second"]
    print(f"{cpu_name()}, {usable_cores()} threads, bf16 peak {peak / 1e9:.0f} GFLOP/s (median)")
    print(table(rows))
    RESULTS.mkdir(exist_ok=True)
    result = {
        "machine": cpu_name(),
        "threads": usable_cores(),
        "torch": torch.__version__,
        "shape": asdict(shape),
        "variants": rows,
    }
    path = RESULTS / f"peers_{options.shape}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
