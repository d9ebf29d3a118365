"""Pages: what is stored comes back in order, and none is held twice or lost."""

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lascaux.config.schema import ModelConfig
from lascaux.generate.pages import PAGE_TOKENS, ChunkCache, PagePool, RowsCache, page_keys
from lascaux.model.accounting import cache_bytes_per_token

CPU = torch.device("cpu")
CONFIG = ModelConfig(num_layers=2, d_model=32, num_heads=4, num_kv_heads=2)


def pool(pages: int, **fields: Any) -> PagePool:
    return PagePool(dataclasses.replace(CONFIG, **fields), pages, torch.float32, CPU)


def test_a_sequence_over_pages_comes_back_in_order() -> None:
    some, (k, v) = pool(4), torch.randn(2, 1, 2, 150, 8).unbind()
    table = torch.tensor([2, 0, 3])
    for start, end in [(0, 64), (64, 128), (128, 140)]:
        cache = ChunkCache(some, 1, table, start)
        got_k, got_v = cache.append(k[:, :, start:end], v[:, :, start:end])
        assert torch.equal(got_k, k[:, :, :end]) and torch.equal(got_v, v[:, :, :end])
    for position in range(140, 150):
        rows = RowsCache(some, 1, table[None], torch.tensor([position]))
        got_k, _ = rows.append(k[:, :, position : position + 1], v[:, :, position : position + 1])
        assert torch.equal(got_k, k[:, :, : position + 1])
    assert some.keys[0].count_nonzero() == 0


def test_a_chunk_may_have_several_pages() -> None:
    some, (k, v) = pool(4), torch.randn(2, 1, 2, 150, 8).unbind()
    got_k, got_v = ChunkCache(some, 0, torch.tensor([3, 1, 2]), 0).append(k, v)
    assert torch.equal(got_k, k) and torch.equal(got_v, v)


def test_pages_take_the_bytes_accounted_for() -> None:
    some = pool(5)
    assert some.num_bytes == 5 * PAGE_TOKENS * cache_bytes_per_token(CONFIG, 4)


def test_names_of_pages_follow_from_all_tokens_before_their_end() -> None:
    tokens = list(range(200))
    keys = page_keys(tokens)
    assert len(keys) == 3 and len(set(keys)) == 3
    assert page_keys(tokens[:130]) == keys[:2]
    assert page_keys([5, *tokens[1:]])[1] != keys[1]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("takes gives finds".split()), st.integers(0, 9))))
def test_no_page_is_held_twice_unless_shared_and_none_is_lost(
    moves: list[tuple[str, int]],
) -> None:
    some = pool(6, num_layers=1)
    held: list[tuple[list[int], int]] = []  # a sequence's pages, and which prompt it has
    owner: dict[int, int] = {}
    for move, number in moves:
        prompt = [number % 3] * 100
        keys = page_keys(prompt)
        if move == "takes" and some.num_available >= 2:
            pages = some.take(2)
            assert not {page for other, _ in held for page in other} & set(pages)
            some.keep(pages[0], keys[0])
            for page in pages:
                owner[page] = number % 3
            held.append((pages, number % 3))
        elif move == "finds":
            page = some.find(prompt, keys, 0)
            if page is not None:
                assert owner[page] == number % 3
                held.append(([page], number % 3))
        elif move == "gives" and held:
            pages, _ = held.pop(number % len(held))
            some.give_back(pages)
        assert some.num_held == len({page for pages, _ in held for page in pages})
    for pages, _ in held:
        some.give_back(pages)
    assert some.num_available == 6
    assert sorted(some.take(6)) == list(range(6))


def test_more_pages_than_there_are_is_our_own_bug() -> None:
    with pytest.raises(AssertionError, match="3 of 2 pages"):
        pool(2).take(3)


def test_the_last_token_of_a_prompt_is_never_found() -> None:
    some, tokens = pool(2), [1] * 64
    keys = page_keys(tokens)
    some.keep(some.take(1)[0], keys[0])
    assert some.find(tokens, keys, 0) is None
    assert some.find([*tokens, 1], keys, 0) is not None
