"""`lascaux bench generate`: how fast a config's network reads a prompt and continues it.

Random weights, held and computed as `lascaux generate` and `lascaux serve` do. Each new token reads
every weight once: memory bandwidth over their bytes is the limit for one answer, and several
answers at once share the reading.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from lascaux.bench.peaks import Peaks
from lascaux.config.schema import GenerateConfig, ModelConfig
from lascaux.errors import ConfigError
from lascaux.generate.load import choose_weights, native_weights, place, without_capacity
from lascaux.generate.network import PagedNetwork
from lascaux.generate.pages import PAGE_TOKENS, Row
from lascaux.model.accounting import (
    active_matmul_parameters,
    cache_bytes_per_token,
    count_parameters,
)
from lascaux.model.init import initialise
from lascaux.model.transformer import Transformer
from lascaux.parallel.hardware import memory_bytes
from lascaux.units import format_bytes

MOST_PROMPT_TOKENS, MOST_DECODED_TOKENS, STREAMS = 256, 32, 8
ELEMENT_BYTES = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0, "int4": 0.625}
"""of a matrix's element; int4 with its factors"""


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationSpeed:
    """Medians over the rounds."""

    parameters: int
    precision: str
    compiled: bool
    """whether rows are computed by compiled code"""
    prompt_tokens: int
    prompt_tokens_per_second: float
    decode_tokens_per_second: list[float]
    median_decode_tokens_per_second: float
    """of one answer"""
    streams: int
    median_streams_tokens_per_second: float
    """of so many answers at once, together"""
    bytes_per_token: int
    """weights of the matrix products, and the cache at the prompt's end, read once"""
    fraction_of_bandwidth: float
    """bytes read in a second for one answer over what a sum reads; above 1 from a cache"""
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


def bench_generation(
    config: ModelConfig,
    settings: GenerateConfig,
    device: torch.device,
    rounds: int,
    done: Callable[[], None],
) -> GenerationSpeed:
    """Time `rounds` answers, one and several at once, after a round to warm up."""
    config = without_capacity(config)
    precision = choose_weights(settings, device)
    with device:
        model = Transformer(config).eval()
    initialise(model, seed=0)
    for name, parameter in list(model.named_parameters()):
        place(model, name, parameter.data, precision)
    model.requires_grad_(False)
    native = native_weights(model, device)
    prompt_tokens = min(MOST_PROMPT_TOKENS, config.max_context // 2)
    decoded = min(MOST_DECODED_TOKENS, config.max_context // 4)
    pages = -(-(prompt_tokens + decoded) // PAGE_TOKENS)
    network = PagedNetwork(model, STREAMS * pages, config.vocab_size, native)
    peaks, reading, one, many = Peaks(), list[float](), list[float](), list[float]()
    for _ in range(rounds + 1):
        peaks.measure_products(device)
        peaks.measure_bandwidth(device)
        peaks.measure_reading(device)
        reading.append(read_prompts(network, prompt_tokens, pages))
        one.append(decode(network, 1, prompt_tokens, decoded, pages))
        many.append(decode(network, STREAMS, prompt_tokens, decoded, pages))
        done()
    speeds = [decoded / seconds for seconds in one[1:]]
    median = statistics.median(speeds)
    cached = prompt_tokens * cache_bytes_per_token(config, network.pool.keys.element_size())
    moved = matrix_bytes(config, precision) + cached
    return GenerationSpeed(
        parameters=count_parameters(config).total,
        precision=precision,
        compiled=native is not None,
        prompt_tokens=prompt_tokens,
        prompt_tokens_per_second=STREAMS * prompt_tokens / statistics.median(reading[1:]),
        decode_tokens_per_second=speeds,
        median_decode_tokens_per_second=median,
        streams=STREAMS,
        median_streams_tokens_per_second=STREAMS * decoded / statistics.median(many[1:]),
        bytes_per_token=moved,
        fraction_of_bandwidth=median * moved / peaks.read_bytes_per_second,
        peaks=peaks,
    )


def matrix_bytes(config: ModelConfig, precision: str) -> int:
    """What a token reads of the matrices; the head has 8 bits beside int4."""
    head = config.vocab_rows * config.d_model
    others = active_matmul_parameters(config) - head
    of_head = ELEMENT_BYTES["int8" if precision == "int4" else precision]
    return int(ELEMENT_BYTES[precision] * others + of_head * head)


def tables(streams: int, pages: int) -> list[list[int]]:
    """The pages of each answer."""
    return [list(range(number * pages, (number + 1) * pages)) for number in range(streams)]


def read_prompts(network: PagedNetwork, prompt_tokens: int, pages: int) -> float:
    """Seconds to read a prompt for each answer and what comes after it."""
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(network.model.config.vocab_size, (prompt_tokens,), generator=draw)
    starts = range(0, prompt_tokens, network.chunk_tokens)
    started = time.perf_counter()
    for table in tables(STREAMS, pages):
        for start, chunk in zip(starts, tokens.split(network.chunk_tokens), strict=True):
            x = network.read(chunk.tolist(), start, table)
            if start == starts[-1]:
                network.logits(x[-1:])
    return time.perf_counter() - started


def decode(
    network: PagedNetwork, streams: int, prompt_tokens: int, decoded: int, pages: int
) -> float:
    """Seconds for so many likeliest tokens of each answer."""
    tokens = [0] * streams
    started = time.perf_counter()
    for position in range(prompt_tokens, prompt_tokens + decoded):
        rows = [
            Row(token, position, table)
            for token, table in zip(tokens, tables(streams, pages), strict=True)
        ]
        tokens = network.decode(rows).argmax(-1).tolist()
    return time.perf_counter() - started
