"""The cache returns what was appended, in order, and refuses to overflow."""

import pytest
import torch

from lascaux.config.schema import ModelConfig
from lascaux.generate.cache import KVCache, make_cache
from lascaux.model.accounting import cache_bytes_per_token


def test_appended_keys_and_values_come_back_in_order() -> None:
    k, v = torch.randn(2, 2, 3, 9, 4).unbind()
    cache = KVCache(2, 3, 9, 4, torch.float32, torch.device("cpu"))
    for start, end in [(0, 5), (5, 6), (6, 9)]:
        all_k, all_v = cache.append(k[:, :, start:end], v[:, :, start:end])
        assert cache.length == end
        assert torch.equal(all_k, k[:, :, :end])
        assert torch.equal(all_v, v[:, :, :end])


def test_overflow_is_our_own_bug() -> None:
    cache = KVCache(1, 1, 4, 2, torch.float32, torch.device("cpu"))
    cache.append(torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 4, 2))
    with pytest.raises(AssertionError, match="5 tokens in a cache of 4"):
        cache.append(torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 2))
    assert cache.length == 4


def test_a_cache_for_each_layer_takes_the_bytes_accounted_for() -> None:
    config = ModelConfig(num_layers=3, d_model=32, num_heads=4, num_kv_heads=2)
    caches = make_cache(config, 2, 10, torch.bfloat16, torch.device("cpu"))
    assert len(caches) == 3
    taken = sum(t.nbytes for cache in caches for t in (cache._keys, cache._values))
    assert taken == 2 * 10 * cache_bytes_per_token(config, 2)
