"""The network over pages: prompts some tokens at a time, then a token of each answer at once.

Prompts are read in chunks that begin at the first place of a page, one sequence at a time, so that
what comes out does not depend on which other answers are computed.
Shapes: T tokens of a chunk, N rows (a token each), D d_model, V vocabulary.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from lascaux.generate.native import NativeDecoder, NativeWeights
from lascaux.generate.pages import PAGE_TOKENS, ChunkCache, PagePool, Row, RowsCache
from lascaux.model.transformer import Transformer

CHUNK_TOKENS = {"cpu": PAGE_TOKENS, "cuda": 8 * PAGE_TOKENS}


class PagedNetwork:
    """A model in evaluation mode with the pages of its keys and values.

    Rows are computed by compiled code where there is any (`native.py`), else by the model.
    """

    def __init__(
        self,
        model: Transformer,
        num_pages: int,
        vocab_size: int,
        native: NativeWeights | None = None,
    ) -> None:
        self.model, self._vocab_size = model, vocab_size
        computes_in = next(model.final_norm.parameters())
        self.device = computes_in.device
        self.pool = PagePool(
            model.config, num_pages, computes_in.dtype, self.device, cleans=native is None
        )
        self._native = None if native is None else NativeDecoder(native, self.pool)
        self.chunk_tokens = CHUNK_TOKENS[self.device.type]
        self._layers = range(model.config.num_layers)

    @torch.inference_mode()
    def read(self, tokens: Sequence[int], start: int, table: Sequence[int]) -> Float[Tensor, "T D"]:
        """Compute a chunk of a prompt that begins at `start`; the residual stream at its end."""
        pages = torch.tensor(table, device=self.device)
        caches = [ChunkCache(self.pool, layer, pages, start) for layer in self._layers]
        return self.model.residual(torch.tensor([tokens], device=self.device), cache=caches)[0]

    @torch.inference_mode()
    def logits(self, x: Float[Tensor, "T D"]) -> NDArray[np.float32]:
        """What comes after each of these positions, (T V)."""
        if self._native is not None and len(x) == 1:
            return self._native.head(self.outputs(x).numpy())[:, : self._vocab_size]
        logits = self.model.unembed(x[None])[0, :, : self._vocab_size]
        return logits.float().cpu().numpy()

    @torch.inference_mode()
    def outputs(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        """The final norm of the residual stream, in fp32."""
        return self.model.final_norm(x).float()

    def decode(self, rows: Sequence[Row]) -> NDArray[np.float32]:
        """What comes after each row, (N V); rows of one sequence see those before them."""
        if self._native is not None:
            return self._native.decode(rows)[:, : self._vocab_size]
        return self._decode_by_model(rows)

    @torch.inference_mode()
    def _decode_by_model(self, rows: Sequence[Row]) -> NDArray[np.float32]:
        longest = max(len(row.table) for row in rows)
        tables = torch.tensor(
            [[*row.table, *[row.table[0]] * (longest - len(row.table))] for row in rows],
            device=self.device,
        )
        positions = torch.tensor([row.position for row in rows], device=self.device)
        tokens = torch.tensor([[row.token] for row in rows], device=self.device)
        caches = [RowsCache(self.pool, layer, tables, positions) for layer in self._layers]
        x = self.model.residual(tokens, positions=positions[:, None], cache=caches)
        return self.logits(x[:, 0])
