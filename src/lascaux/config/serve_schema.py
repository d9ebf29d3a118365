"""Settings of generation and of the server."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateConfig:
    """How text is drawn from the model, and how the model is held while it is."""

    max_tokens: int = 256
    """most tokens to generate"""
    temperature: float = 0.8
    """0 takes the likeliest token; higher is more varied"""
    top_k: int = 0
    """draw from the k likeliest tokens only; 0: all"""
    top_p: float = 1.0
    """draw from the fewest tokens that together reach this probability"""
    min_p: float = 0.0
    """leave out tokens below this fraction of the likeliest one's probability"""
    presence_penalty: float = 0.0
    """taken from the logits of tokens that were drawn before"""
    frequency_penalty: float = 0.0
    """taken from the logits of tokens once for each time they were drawn before"""
    repetition_penalty: float = 1.0
    """divides positive and multiplies negative logits of tokens of the prompt and the answer"""
    seed: int = 0
    """the same seed gives the same text"""
    stop: tuple[str, ...] = ()
    """end before any of these strings"""
    weights: Literal["auto", "fp32", "bf16", "int8", "int4"] = "auto"
    """dtype the weights are held in; int8 and int4: matrices only, on a CPU; auto: bf16 where the hardware is faster at it, else fp32"""
    draft_tokens: int = 0
    """tokens to guess from earlier text and check in one pass; the text stays the same (by torch up to rounding); 0: none"""
    threads: int | None = None
    """CPU threads; unset: OMP_NUM_THREADS, else one for each core this process may use"""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeConfig:
    """The server: where it listens, and how much it takes on at once."""

    host: str = "127.0.0.1"
    """address to listen on; any other than this machine's own needs API keys"""
    port: int = 8000
    """port to listen on; 0: any free one"""
    model_name: str | None = None
    """name of the model in requests; unset: that of the folder"""
    max_streams: int = 8
    """answers computed at the same time; others wait"""
    max_waiting: int = 256
    """answers that may wait; beyond it requests get 429"""
    cache_tokens: int | None = None
    """tokens whose keys and values are kept; unset: max_streams whole contexts, within a quarter of the free memory"""
    reuse_prefixes: bool = True
    """keep keys and values of prompts for later prompts that begin alike"""
    api_keys_file: str | None = None
    """file with one API key in each line; lines with # are comments"""
    allowed_origins: tuple[str, ...] = ()
    """web origins other than the server's own that may call it"""
