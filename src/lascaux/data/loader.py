"""Token shards to batches: sample i is a pure function of (seed, i).

World size, batch size and history are not in the formula, so the state of a loader is one whole
number: the index of the next sample. Arrays are numpy; the trainer makes tensors of them.
Shapes: B sequences of T tokens.
"""

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from lascaux.data.order import (
    IntArray,
    check_weights,
    derive_key,
    mixture_schedule,
    permute,
)
from lascaux.data.shards import PreparedData, Split, TokenStream
from lascaux.errors import DataError

NO_TARGET = -100

Boundaries = Literal["ignore", "respect"]


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences and what to predict; all arrays are int64 of shape (B, T).

    `targets` is the next token, or -100 where nothing is to be predicted. `document_ids` numbers
    the documents of each row and `positions` restarts at each of them, at the end-of-text token
    that stands before it; both are None when document boundaries are ignored.
    """

    tokens: IntArray
    targets: IntArray
    document_ids: IntArray | None = None
    positions: IntArray | None = None


class SampleReader:
    """Random access to the samples of one split, in an order that depends on the seed alone.

    Sequence j of a source covers its tokens jT to jT + T, so an epoch predicts every token but the
    first exactly once; the last sequence is filled up, with -100 as target. Without weights an
    epoch is one permutation of the sequences of all sources. With weights the sources take turns
    in a fixed pattern, and each goes through its own permutations.

    Raises: DataError for a split shorter than one sequence and for a weighted source without
        tokens; ConfigError when only some weights are set.
    """

    def __init__(
        self,
        prepared: PreparedData,
        split: Split,
        seq_len: int,
        seed: int,
        document_boundaries: Boundaries = "ignore",
        weights: Sequence[float | None] | None = None,
    ) -> None:
        self.seq_len = seq_len
        self.seed = seed
        self._boundaries: Boundaries = document_boundaries
        self._end_of_text_id = prepared.end_of_text_id
        self._streams = [source.stream(split) for source in prepared.sources]
        tokens = sum(stream.tokens for stream in self._streams)
        if tokens < seq_len + 1:
            raise DataError(
                f"the {split} split has {tokens} tokens, but one sequence needs seq_len + 1 = "
                f"{seq_len + 1}; give more text or lower train.seq_len"
            )
        self._sizes = np.array([_num_windows(stream, seq_len) for stream in self._streams])
        self.num_sequences: int = int(self._sizes.sum())
        """sequences of all sources together: one epoch when there are no weights"""
        self.tokens_per_epoch: int = sum(max(stream.tokens - 1, 0) for stream in self._streams)
        """targets of all sequences together"""
        checked = check_weights(prepared.weights if weights is None else weights)
        self._schedule = None if checked is None else mixture_schedule(checked)
        for source, size in zip(prepared.sources, self._sizes, strict=True):
            if self._schedule is not None and size == 0:
                raise DataError(
                    f"source '{source.path}' has a weight but nothing to predict in its {split} "
                    f"split; drop the source or give it more text"
                )

    def locate(self, sample: IntArray) -> tuple[IntArray, IntArray]:
        """The source of each global sample and the number of its sequence in that source."""
        if self._schedule is None:
            sequence = self._shuffled(sample, 0, self.num_sequences)
            ends = np.cumsum(self._sizes)
            source = np.searchsorted(ends, sequence, side="right")
            return source, sequence - (ends - self._sizes)[source]
        source, running = self._schedule.locate(sample)
        sequence = np.empty_like(running)
        for number in np.unique(source):
            chosen = source == number
            size = int(self._sizes[number])
            sequence[chosen] = self._shuffled(running[chosen], int(number), size)
        return source, sequence

    def samples(self, start: int, count: int) -> Batch:
        """Samples start to start + count - 1 as one batch."""
        sources, sequences = self.locate(np.arange(start, start + count, dtype=np.int64))
        rows = list(zip(sources.tolist(), sequences.tolist(), strict=True))
        return _make_batch(
            self._streams, rows, self.seq_len, self._end_of_text_id, self._boundaries
        )

    def _shuffled(self, running: IntArray, source: int, size: int) -> IntArray:
        """The running number of a sample to a sequence, through one permutation an epoch."""
        epoch, place = np.divmod(running, size)
        sequence = np.empty_like(place)
        for number in np.unique(epoch):
            chosen = epoch == number
            key = derive_key(self.seed, int(number), source)
            sequence[chosen] = permute(place[chosen], size, key)
        return sequence


class Samples(Protocol):
    """Random access to samples by their index."""

    def samples(self, start: int, count: int) -> Batch:
        """Samples start to start + count - 1 as one batch."""
        ...


class ShareOfSamples:
    """What one of several processes trains on: every `parts`-th micro-batch of a batch."""

    def __init__(self, reader: Samples, microbatch_seqs: int, index: int, parts: int) -> None:
        self._reader, self._seqs = reader, microbatch_seqs
        self._index, self._parts = index, parts

    def samples(self, start: int, count: int) -> Batch:
        """The share of the batch of samples start to start + count - 1."""
        first, step = start + self._index * self._seqs, self._parts * self._seqs
        pieces = [self._reader.samples(s, self._seqs) for s in range(first, start + count, step)]
        return join_batches(pieces)


def join_batches(pieces: Sequence[Batch]) -> Batch:
    """The sequences of all of them, in order."""
    ids = [piece.document_ids for piece in pieces if piece.document_ids is not None]
    positions = [piece.positions for piece in pieces if piece.positions is not None]
    return Batch(
        np.concatenate([piece.tokens for piece in pieces]),
        np.concatenate([piece.targets for piece in pieces]),
        np.concatenate(ids) if ids else None,
        np.concatenate(positions) if positions else None,
    )


class Prefetcher:
    """Reads batches ahead in a background thread.

    `next_sample` is the first sample of the batch that `next` returns next: all there is to save.
    """

    def __init__(self, reader: Samples, start: int, batch_seqs: int, depth: int = 2) -> None:
        self.next_sample = start
        self._batch_seqs = batch_seqs
        self._ready: deque[Batch | BaseException] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(
            target=self._work, args=(reader, start, depth), name="lascaux-prefetch", daemon=True
        )
        self._thread.start()

    def next(self) -> Batch:
        """The next batch; raises what the background thread ran into."""
        with self._changed:
            assert not self._closed, "next() after close()"
            self._changed.wait_for(lambda: bool(self._ready))
            if isinstance(self._ready[0], BaseException):
                raise self._ready[0]
            batch = self._ready.popleft()
            self._changed.notify_all()
        assert isinstance(batch, Batch)
        self.next_sample += self._batch_seqs
        return batch

    def close(self) -> None:
        """End the thread; may be called twice."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _work(self, reader: Samples, start: int, depth: int) -> None:
        while True:
            try:
                result: Batch | BaseException = reader.samples(start, self._batch_seqs)
            except BaseException as error:
                result = error
            with self._changed:
                self._changed.wait_for(lambda: self._closed or len(self._ready) < depth)
                if self._closed:
                    return
                self._ready.append(result)
                self._changed.notify_all()
            if isinstance(result, BaseException):
                return
            start += self._batch_seqs


def validation_batches(
    prepared: PreparedData,
    seq_len: int,
    microbatch_seqs: int,
    max_tokens: int | None = None,
    document_boundaries: Boundaries = "ignore",
) -> Iterator[Batch]:
    """Windows of the validation split of all sources in order, the last batch possibly smaller.

    Without a limit every token but the first of each source is predicted once; the last window of
    a source is filled up, with -100 as target. `max_tokens` keeps as many windows as hold that
    many tokens, spread evenly over the split. Without validation text there is no batch.
    """
    streams = [source.valid for source in prepared.sources]
    windows = [
        (number, window)
        for number, stream in enumerate(streams)
        for window in range(_num_windows(stream, seq_len))
    ]
    if max_tokens is not None:
        kept = min(len(windows), max(1, max_tokens // seq_len))
        windows = (
            [windows[place * len(windows) // kept] for place in range(kept)] if windows else []
        )
    for start in range(0, len(windows), microbatch_seqs):
        rows = windows[start : start + microbatch_seqs]
        yield _make_batch(streams, rows, seq_len, prepared.end_of_text_id, document_boundaries)


def _num_windows(stream: TokenStream, seq_len: int) -> int:
    return -(-max(stream.tokens - 1, 0) // seq_len)


def _make_batch(
    streams: Sequence[TokenStream],
    rows: Sequence[tuple[int, int]],
    seq_len: int,
    end_of_text_id: int,
    boundaries: Boundaries,
) -> Batch:
    """Cut the (source, sequence) pairs out of the streams, one row each."""
    cut = np.full((len(rows), seq_len + 1), end_of_text_id, dtype=np.int64)
    lengths = np.empty((len(rows), 1), dtype=np.int64)
    for row, (source, sequence) in enumerate(rows):
        piece = streams[source].read(sequence * seq_len, (sequence + 1) * seq_len + 1)
        cut[row, : len(piece)] = piece
        lengths[row] = len(piece)
    tokens, targets = cut[:, :-1].copy(), cut[:, 1:].copy()
    column = np.arange(seq_len, dtype=np.int64)
    targets[column >= lengths - 1] = NO_TARGET
    if boundaries == "ignore":
        return Batch(tokens, targets)
    # The end-of-text token before a document is its first: the text begins to be predicted there.
    begins = tokens == end_of_text_id
    first_column = np.maximum.accumulate(np.where(begins, column, 0), axis=1)
    return Batch(tokens, targets, np.cumsum(begins, axis=1, dtype=np.int64), column - first_column)
