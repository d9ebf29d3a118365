"""The loader: each token once an epoch, the same samples for any batch size and start."""

import threading
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lascaux.config.schema import DataConfig, SourceConfig, TokenizerConfig
from lascaux.data import writer
from lascaux.data.loader import NO_TARGET, Prefetcher, SampleReader, validation_batches
from lascaux.data.prepare import prepare
from lascaux.data.shards import PreparedData, open_prepared
from lascaux.errors import DataError

from .conftest import make_texts

MakePrepared = Callable[..., PreparedData]
T = 16


@pytest.fixture
def prepared(make_prepared: MakePrepared, monkeypatch: pytest.MonkeyPatch) -> PreparedData:
    monkeypatch.setattr(writer, "SHARD_TOKENS", 301)
    return make_prepared(make_texts(60), make_texts(25, seed=1))


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> SampleReader:
    folder = tmp_path_factory.mktemp("loader")
    configs = []
    for number in range(2):
        (folder / f"{number}.txt").write_text("".join(make_texts(30, seed=number)))
        configs.append(SourceConfig(path=str(folder / f"{number}.txt"), weight=1.0 + number))
    data = DataConfig(sources=tuple(configs), valid_fraction=0.0)
    prepare(data, TokenizerConfig(), 300, folder / "out")
    return SampleReader(open_prepared(folder / "out"), "train", T, seed=3)


def stream_of(prepared: PreparedData, source: int, split: str = "train") -> list[int]:
    stream = prepared.sources[source].stream(split)  # type: ignore[arg-type]
    return stream.read(0, stream.tokens).tolist()


def pairs(batch) -> Counter:
    keep = batch.targets != NO_TARGET
    return Counter(zip(batch.tokens[keep].tolist(), batch.targets[keep].tolist(), strict=True))


@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_an_epoch_predicts_every_token_but_the_first_exactly_once(
    prepared: PreparedData, epoch: int
):
    reader = SampleReader(prepared, "train", T, seed=0)
    n = reader.num_sequences
    source, sequence = reader.locate(np.arange(epoch * n, (epoch + 1) * n))
    covered = Counter(
        (s, place)
        for s, j in zip(source.tolist(), sequence.tolist(), strict=True)
        for place in range(j * T + 1, j * T + T + 1)
        if place < prepared.sources[s].train.tokens
    )
    assert covered == Counter(
        (s, place) for s in range(2) for place in range(1, prepared.sources[s].train.tokens)
    )
    batch = reader.samples(epoch * n, n)
    expected: Counter = Counter()
    for number in range(2):
        tokens = stream_of(prepared, number)
        expected.update(zip(tokens[:-1], tokens[1:], strict=True))
    assert pairs(batch) == expected
    assert int((batch.targets != NO_TARGET).sum()) == reader.tokens_per_epoch


def test_sequences_are_consecutive_tokens_across_shards(prepared: PreparedData):
    reader = SampleReader(prepared, "train", T, seed=0)
    samples = np.arange(reader.num_sequences)
    source, sequence = reader.locate(samples)
    batch = reader.samples(0, reader.num_sequences)
    for row in samples:
        tokens = stream_of(prepared, int(source[row]))
        piece = tokens[sequence[row] * T : sequence[row] * T + T + 1]
        length = len(piece) - 1
        assert batch.tokens[row, : length + 1].tolist() == piece[:T]
        assert batch.targets[row, :length].tolist() == piece[1:]
        assert (batch.targets[row, length:] == NO_TARGET).all()
    assert batch.tokens.dtype == batch.targets.dtype == np.int64
    assert batch.document_ids is None and batch.positions is None


@settings(max_examples=60, deadline=None)
@given(start=st.integers(0, 10_000), sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_any_batch_size_and_start_gives_the_same_samples(
    reader: SampleReader, start: int, sizes: list[int]
):
    whole = reader.samples(start, sum(sizes))
    place = start
    parts = []
    for size in sizes:
        parts.append(reader.samples(place, size))
        place += size
    assert np.array_equal(whole.tokens, np.concatenate([part.tokens for part in parts]))
    assert np.array_equal(whole.targets, np.concatenate([part.targets for part in parts]))


def test_order_depends_on_seed_and_epoch(prepared: PreparedData):
    def order(seed: int, epoch: int) -> list[tuple[int, int]]:
        reader = SampleReader(prepared, "train", T, seed)
        n = reader.num_sequences
        found = reader.locate(np.arange(epoch * n, epoch * n + n))
        return list(zip(found[0].tolist(), found[1].tolist(), strict=True))

    orders = [order(seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert order(0, 0) == orders[0]
    for number, one in enumerate(orders):
        assert all(one != other for other in orders[number + 1 :])
        assert sorted(one) == sorted(orders[0])


def test_weights_set_the_shares_and_each_source_runs_through_its_own_epochs(
    prepared: PreparedData,
):
    reader = SampleReader(prepared, "train", T, seed=0, weights=[0.75, 0.25])
    source, sequence = reader.locate(np.arange(4000))
    for length in (4, 40, 4000):
        assert int((source[:length] == 0).sum()) == length * 3 // 4
    for number in range(2):
        size = -(-(prepared.sources[number].train.tokens - 1) // T)
        mine = sequence[source == number]
        for epoch in range(len(mine) // size):
            assert sorted(mine[epoch * size : (epoch + 1) * size]) == list(range(size))


def test_respected_boundaries_restart_positions_and_hide_the_next_document(
    prepared: PreparedData,
):
    reader = SampleReader(prepared, "train", 40, seed=0, document_boundaries="respect")
    end = prepared.end_of_text_id
    batch = reader.samples(0, reader.num_sequences)
    assert batch.document_ids is not None and batch.positions is not None
    for row in range(len(batch.tokens)):
        document = position = 0
        for column, token in enumerate(batch.tokens[row].tolist()):
            if token == end:  # it stands before the next document, whose first token it predicts
                document, position = document + 1, 0
            assert batch.document_ids[row, column] == document
            assert batch.positions[row, column] == position
            position += 1
    assert int((batch.targets != NO_TARGET).sum()) == reader.tokens_per_epoch
    ignoring = SampleReader(prepared, "train", 40, seed=0)
    assert reader.tokens_per_epoch == ignoring.tokens_per_epoch
    assert np.array_equal(batch.targets, ignoring.samples(0, ignoring.num_sequences).targets)


@pytest.mark.parametrize("microbatch_seqs", [1, 7, 1000])
def test_validation_predicts_every_token_but_the_first_of_each_source_once_in_order(
    prepared: PreparedData, microbatch_seqs: int
):
    targets: list[int] = []
    for batch in validation_batches(prepared, T, microbatch_seqs):
        assert len(batch.tokens) <= microbatch_seqs
        targets += batch.targets[batch.targets != NO_TARGET].tolist()
    assert targets == [t for number in range(2) for t in stream_of(prepared, number, "valid")[1:]]


def test_limited_validation_takes_windows_from_the_whole_split(prepared: PreparedData):
    whole = [row for b in validation_batches(prepared, T, 5) for row in b.tokens.tolist()]
    part = [row for b in validation_batches(prepared, T, 5, T * 6) for row in b.tokens.tolist()]
    assert part == [whole[place * len(whole) // 6] for place in range(6)]
    assert sum(1 for _ in validation_batches(prepared, T, 1, 10**9)) == len(whole)


def test_without_validation_text_there_is_no_batch(make_prepared: MakePrepared):
    prepared = make_prepared(make_texts(5), valid_fraction=0.0)
    assert prepared.tokens("valid") == 0
    assert list(validation_batches(prepared, T, 4, 100)) == []


def test_corpus_shorter_than_a_sequence_is_refused_with_both_numbers(make_prepared: MakePrepared):
    prepared = make_prepared(["short text"], valid_fraction=0.0)
    tokens = prepared.tokens("train")
    message = rf"train split has {tokens} tokens, but one sequence needs seq_len \+ 1 = 101; give"
    with pytest.raises(DataError, match=message):
        SampleReader(prepared, "train", 100, seed=0)
    reader = SampleReader(prepared, "train", tokens - 1, seed=0)
    assert reader.num_sequences == 1


def test_a_weighted_source_without_tokens_is_refused(make_prepared: MakePrepared):
    prepared = make_prepared(make_texts(20), make_texts(20, 1), weights=[1, 1], valid_fraction=0.0)
    with pytest.raises(DataError, match="valid split has 0 tokens"):
        SampleReader(prepared, "valid", T, seed=0)


def test_prefetcher_gives_the_reader_s_batches_and_counts_samples(reader: SampleReader):
    prefetcher = Prefetcher(reader, start=11, batch_seqs=4)
    for step in range(10):
        assert prefetcher.next_sample == 11 + 4 * step
        expected = reader.samples(11 + 4 * step, 4)
        assert np.array_equal(prefetcher.next().tokens, expected.tokens)
    prefetcher.close()
    prefetcher.close()
    assert not any(thread.name == "lascaux-prefetch" for thread in threading.enumerate())


def test_prefetcher_raises_what_its_thread_ran_into(
    reader: SampleReader, monkeypatch: pytest.MonkeyPatch
):
    real = reader.samples

    def samples(start: int, count: int):
        if start >= 8:
            raise DataError("shard is gone")
        return real(start, count)

    monkeypatch.setattr(reader, "samples", samples)
    prefetcher = Prefetcher(reader, start=0, batch_seqs=4)
    prefetcher.next()
    prefetcher.next()
    for _ in range(2):
        with pytest.raises(DataError, match="shard is gone"):
            prefetcher.next()
    assert prefetcher.next_sample == 8
    prefetcher.close()
