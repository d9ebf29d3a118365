"""`lascaux bench generate`: how fast a config's network reads a prompt and continues it.

One sequence, random weights in fp32, greedy, with the cache of keys and values: what `lascaux
generate` computes. Each new token reads every weight once, so memory bandwidth is the limit.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from lascaux.bench.peaks import Peaks
from lascaux.config.schema import ModelConfig
from lascaux.generate.cache import make_cache
from lascaux.model.accounting import (
    active_matmul_parameters,
    cache_bytes_per_token,
    count_parameters,
)
from lascaux.model.init import initialise
from lascaux.model.transformer import Transformer

DECODED_TOKENS = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationSpeed:
    """Medians over the rounds."""

    parameters: int
    prompt_tokens: int
    prompt_tokens_per_second: float
    decode_tokens_per_second: list[float]
    median_decode_tokens_per_second: float
    bytes_per_token: int
    """weights of the matrix products, and the cache at the prompt's end, read once"""
    fraction_of_bandwidth: float
    """bytes read over the bandwidth of a copy"""
    peaks: Peaks


@torch.inference_mode()
def bench_generation(
    model_config: ModelConfig, device: torch.device, rounds: int, done: Callable[[], None]
) -> GenerationSpeed:
    """Time `rounds` answers of 32 tokens to a prompt of half the context after one to warm up."""
    with device:
        model = Transformer(model_config)
    initialise(model, seed=0)
    prompt_tokens = max(1, model_config.max_context // 2 - DECODED_TOKENS)
    peaks = Peaks()
    prompt_seconds: list[float] = []
    decode_seconds: list[float] = []
    for _ in range(rounds + 1):
        peaks.measure_products(device)
        peaks.measure_bandwidth(device)
        first, rest = answer(model, prompt_tokens, device)
        prompt_seconds.append(first)
        decode_seconds.append(rest)
        done()
    speeds = [DECODED_TOKENS / seconds for seconds in decode_seconds[1:]]
    median = statistics.median(speeds)
    cached = prompt_tokens * cache_bytes_per_token(model_config, element_bytes=4)
    moved = 4 * active_matmul_parameters(model_config) + cached
    return GenerationSpeed(
        parameters=count_parameters(model_config).total,
        prompt_tokens=prompt_tokens,
        prompt_tokens_per_second=prompt_tokens / statistics.median(prompt_seconds[1:]),
        decode_tokens_per_second=speeds,
        median_decode_tokens_per_second=median,
        bytes_per_token=moved,
        fraction_of_bandwidth=median * moved / peaks.bandwidth_bytes_per_second,
        peaks=peaks,
    )


def answer(model: Transformer, prompt_tokens: int, device: torch.device) -> tuple[float, float]:
    """Seconds for the prompt, and for the tokens drawn after it."""
    draw = torch.Generator().manual_seed(0)
    size = (1, prompt_tokens)
    unseen = torch.randint(model.config.vocab_size, size, generator=draw).to(device)
    cache = make_cache(model.config, 1, prompt_tokens + DECODED_TOKENS, torch.float32, device)
    clock = [time.perf_counter()]
    for _ in range(DECODED_TOKENS + 1):
        x = model.residual(unseen, cache=cache)
        unseen = model.unembed(x[:, -1:]).argmax(dim=-1)
        unseen.item()  # waits for a GPU
        clock.append(time.perf_counter())
    return clock[1] - clock[0], clock[-1] - clock[1]
