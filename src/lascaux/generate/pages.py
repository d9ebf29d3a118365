"""Keys and values of tokens already seen, in pages of 64 tokens, all taken at the start.

A sequence has a table of pages. Pages of a prompt may be kept for later prompts that begin with the
same tokens; they are given up, the longest unused first, when room is needed.
A kept page is one that was computed as a whole page of a prompt, so that on a CPU an answer is the
same to the last bit whether its prompt's pages were found or computed.
Shapes: L layers, P pages, G kv heads, K head width.
"""

import hashlib
import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lascaux.config.schema import ModelConfig
from lascaux.errors import ConfigError
from lascaux.generate.request import EngineOptions
from lascaux.model.accounting import cache_bytes_per_token
from lascaux.units import format_bytes

PAGE_TOKENS = 64
SHARE_OF_FREE_MEMORY = 0.25


@dataclass(frozen=True, slots=True)
class Row:
    """A token to compute: where it stands in its sequence, and the sequence's pages."""

    token: int
    position: int
    table: Sequence[int]


class PagePool:
    """The memory of all pages and who holds which; not for several threads.

    With `cleans` pages are zeros when they are taken: where masked values are multiplied by zero,
    what is not finite would count.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_pages: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        cleans: bool = True,
    ) -> None:
        shape = (config.num_layers, num_pages, config.kv_heads, PAGE_TOKENS, config.head_width)
        self.keys: Float[Tensor, "L P G 64 K"] = _zeros(shape, dtype, device)
        self.values: Float[Tensor, "L P G 64 K"] = _zeros(shape, dtype, device)
        self.num_pages, self._cleans = num_pages, cleans
        self._holders = [0] * num_pages
        self._free = list(range(num_pages))
        self._key_of: dict[int, bytes] = {}
        self._kept: dict[bytes, int] = {}
        self._unheld: OrderedDict[int, None] = OrderedDict()
        """kept pages that no sequence holds, the longest unused first"""

    @property
    def num_bytes(self) -> int:
        """Memory of all pages."""
        return self.keys.nbytes + self.values.nbytes

    @property
    def num_available(self) -> int:
        """Pages that `take` can give."""
        return len(self._free) + len(self._unheld)

    @property
    def num_held(self) -> int:
        """Pages that sequences hold."""
        return self.num_pages - self.num_available

    def take(self, count: int) -> list[int]:
        """So many pages for a sequence."""
        assert count <= self.num_available, f"{count} of {self.num_available} pages"
        while len(self._free) < count:
            page, _ = self._unheld.popitem(last=False)
            del self._kept[self._key_of.pop(page)]
            self._free.append(page)
        taken = [self._free.pop() for _ in range(count)]
        for page in taken:
            self._holders[page] = 1
            if self._cleans:
                self.keys[:, page] = 0
                self.values[:, page] = 0
        return taken

    def give_back(self, pages: Sequence[int]) -> None:
        """A sequence's pages, in its order; those that are kept wait for another prompt."""
        for page in reversed(pages):  # a prompt's beginning is found more often than its end
            self._holders[page] -= 1
            if self._holders[page] == 0:
                if page in self._key_of:
                    self._unheld[page] = None
                else:
                    self._free.append(page)

    def forget(self, pages: Sequence[int]) -> None:
        """Keep these no longer for other prompts, as what they hold is uncertain."""
        for page in pages:
            key = self._key_of.pop(page, None)
            if key is not None:
                del self._kept[key]
                if page in self._unheld:
                    del self._unheld[page]
                    self._free.append(page)

    def find(self, tokens: Sequence[int], keys: Sequence[bytes], number: int) -> int | None:
        """The kept page that is number so-and-so of a prompt, now held; None if there is none.

        `keys` are those of the prompt. One token at least is left over, so that it is computed.
        """
        if number >= min(len(keys), (len(tokens) - 1) // PAGE_TOKENS):
            return None
        page = self._kept.get(keys[number])
        if page is not None:
            self._unheld.pop(page, None)
            self._holders[page] += 1
        return page

    def keep(self, page: int, key: bytes) -> None:
        """Let a held page be found by later prompts; of two equal ones the first stays."""
        if key not in self._kept and page not in self._key_of:
            self._kept[key] = page
            self._key_of[page] = key


def count_pages(
    config: ModelConfig, options: EngineOptions, element_bytes: int, free_bytes: int
) -> int:
    """Pages to take. Raises: ConfigError for a number of tokens that has no room."""
    page_bytes = PAGE_TOKENS * cache_bytes_per_token(config, element_bytes)
    context_pages = math.ceil(config.max_context / PAGE_TOKENS)
    if options.cache_tokens is None:
        room = int(SHARE_OF_FREE_MEMORY * free_bytes)
        return max(context_pages, min(options.max_streams * context_pages, room // page_bytes))
    pages = math.ceil(options.cache_tokens / PAGE_TOKENS)
    if pages < 1 or pages * page_bytes > free_bytes:
        raise ConfigError(
            f"'serve.cache_tokens' {options.cache_tokens:,} takes "
            f"{format_bytes(pages * page_bytes)}, {format_bytes(free_bytes)} are free; give at "
            f"least 1 and at most {free_bytes // page_bytes * PAGE_TOKENS:,}"
        )
    return pages


def _zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """On a CPU memory that the system provides when it is first written to."""
    if device.type != "cpu":
        return torch.zeros(*shape, dtype=dtype, device=device)
    untouched = np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(untouched).view(dtype).view(*shape)


def page_keys(tokens: Sequence[int]) -> list[bytes]:
    """A name for each whole page of a prompt: the hash of all tokens up to its end."""
    ids = np.asarray(tokens, dtype=np.int64)
    digest, keys = hashlib.sha256(), []
    for end in range(PAGE_TOKENS, len(ids) + 1, PAGE_TOKENS):
        digest.update(ids[end - PAGE_TOKENS : end].tobytes())
        keys.append(digest.digest())
    return keys


class ChunkCache:
    """One layer's view for tokens of one sequence that begin at a page's first place."""

    def __init__(self, pool: PagePool, layer: int, table: Tensor, length: int) -> None:
        assert length % PAGE_TOKENS == 0
        self.length = length
        self._keys, self._values = pool.keys[layer], pool.values[layer]
        self._table = table

    def append(
        self, k: Float[Tensor, "1 G T K"], v: Float[Tensor, "1 G T K"]
    ) -> tuple[Float[Tensor, "1 G S K"], Float[Tensor, "1 G S K"]]:
        """Store the new keys and values; return all of the sequence, in order."""
        end = self.length + k.shape[2]
        pages = self._table[: -(-end // PAGE_TOKENS)]
        for store, new in ((self._keys, k), (self._values, v)):
            for start in range(0, k.shape[2], PAGE_TOKENS):
                piece = new[0, :, start : start + PAGE_TOKENS]
                store[pages[(self.length + start) // PAGE_TOKENS], :, : piece.shape[1]] = piece
        self.length = end
        return gather(self._keys, pages[None], end), gather(self._values, pages[None], end)


class RowsCache:
    """One layer's view for rows: a token each, of sequences of any lengths.

    Several rows may be of one sequence: all are stored before any is read.
    """

    def __init__(
        self, pool: PagePool, layer: int, tables: Int[Tensor, "B P"], positions: Int[Tensor, " B"]
    ) -> None:
        self._keys, self._values = pool.keys[layer], pool.values[layer]
        self._end = int(positions.max()) + 1
        self._tables = tables[:, : -(-self._end // PAGE_TOKENS)]
        self._pages = tables.gather(1, positions[:, None] // PAGE_TOKENS)[:, 0]
        self._places = positions % PAGE_TOKENS
        self.length = self._end - 1

    def append(
        self, k: Float[Tensor, "B G 1 K"], v: Float[Tensor, "B G 1 K"]
    ) -> tuple[Float[Tensor, "B G S K"], Float[Tensor, "B G S K"]]:
        """Store the new keys and values; return those of each row's sequence, S the longest."""
        self._keys[self._pages, :, self._places] = k[:, :, 0]
        self._values[self._pages, :, self._places] = v[:, :, 0]
        return (
            gather(self._keys, self._tables, self._end),
            gather(self._values, self._tables, self._end),
        )


def gather(
    store: Float[Tensor, "P G 64 K"], tables: Int[Tensor, "B N"], end: int
) -> Float[Tensor, "B G S K"]:
    """The first `end` places of each table, in order."""
    pages = store[tables].transpose(1, 2)  # B N G 64 K -> B G N 64 K
    return pages.flatten(2, 3)[:, :, :end]
