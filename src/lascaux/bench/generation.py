"""`lascaux bench generate`: how fast a config's network reads a prompt and continues it.

One sequence, random weights in fp32, greedy, with the cache of keys and values, as `lascaux
generate` computes. Each new token reads every weight once: for a model larger than the caches
memory bandwidth is the limit.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from lascaux.bench.peaks import Peaks
from lascaux.config.schema import ModelConfig
from lascaux.errors import ConfigError
from lascaux.generate.cache import make_cache
from lascaux.model.accounting import (
    active_matmul_parameters,
    cache_bytes_per_token,
    count_parameters,
)
from lascaux.model.init import initialise
from lascaux.model.transformer import Transformer
from lascaux.parallel.hardware import memory_bytes
from lascaux.units import format_bytes

MOST_DECODED_TOKENS = 32


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
    """bytes read in a second over the bytes a copy reads and writes; above 1 from a cache"""
    peaks: Peaks


def check_generation(model: ModelConfig, device: torch.device) -> None:
    """Refuse a context without room for prompt and answer, and weights that exceed the memory.

    Raises: ConfigError with the figures.
    """
    if model.max_context < 4:
        raise ConfigError(f"'model.max_context' must be at least 4 here; got {model.max_context}")
    needed, memory = 4 * count_parameters(model).total, memory_bytes(device)
    if needed > memory:
        raise ConfigError(
            f"the weights take {format_bytes(needed)} in fp32, this {device.type} device has "
            f"{format_bytes(memory)}; choose a smaller preset"
        )


@torch.inference_mode()
def bench_generation(
    model_config: ModelConfig, device: torch.device, rounds: int, done: Callable[[], None]
) -> GenerationSpeed:
    """Time `rounds` answers to a prompt of about half the context, after one to warm up."""
    with device:
        model = Transformer(model_config)
    initialise(model, seed=0)
    decoded = min(MOST_DECODED_TOKENS, model_config.max_context // 4)
    prompt_tokens = model_config.max_context // 2
    peaks = Peaks()
    prompt_seconds: list[float] = []
    decode_seconds: list[float] = []
    for _ in range(rounds + 1):
        peaks.measure_products(device)
        peaks.measure_bandwidth(device)
        first, rest = answer(model, prompt_tokens, decoded, device)
        prompt_seconds.append(first)
        decode_seconds.append(rest)
        done()
    speeds = [decoded / seconds for seconds in decode_seconds[1:]]
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


def answer(
    model: Transformer, prompt_tokens: int, decoded: int, device: torch.device
) -> tuple[float, float]:
    """Seconds for the prompt, and for the tokens drawn after it."""
    draw = torch.Generator().manual_seed(0)
    size = (1, prompt_tokens)
    unseen = torch.randint(model.config.vocab_size, size, generator=draw).to(device)
    cache = make_cache(model.config, 1, prompt_tokens + decoded, torch.float32, device)
    clock = [time.perf_counter()]
    for _ in range(decoded + 1):
        x = model.residual(unseen, cache=cache)
        unseen = model.unembed(x[:, -1:]).argmax(dim=-1)
        unseen.item()  # waits for a GPU
        clock.append(time.perf_counter())
    return clock[1] - clock[0], clock[-1] - clock[1]
