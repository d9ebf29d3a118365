"""Guesses are what followed the last occurrence, by a search that looks at everything."""

from hypothesis import given
from hypothesis import strategies as st

from lascaux.generate.draft import LONGEST_MATCH, Lookup


def reference(tokens: list[int], count: int) -> list[int]:
    for length in range(LONGEST_MATCH, 0, -1):
        for end in range(len(tokens) - 1, length - 1, -1):
            if len(tokens) >= length and tokens[end - length : end] == tokens[-length:]:
                return tokens[end : end + count]
    return []


@given(st.lists(st.integers(0, 3), max_size=40), st.integers(0, 6))
def test_guesses_follow_the_latest_longest_match(tokens: list[int], count: int) -> None:
    assert Lookup(tokens).guess(count) == reference(tokens, count)
