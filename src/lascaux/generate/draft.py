"""Guesses of the next tokens from earlier text, to be checked in one pass (prompt lookup).

Text repeats itself: code, quotations, answers about a text. If the last tokens occurred before,
what followed then is guessed to follow now. Every guess is checked against what the model would
have drawn, so that the text stays the same (Saxena 2023; Leviathan et al. 2023 for the check).
"""

from collections.abc import Sequence

LONGEST_MATCH, SHORTEST_MATCH = 3, 1


class Lookup:
    """Where the latest occurrence of every short run of tokens ended; grows with the text."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}
        for token in tokens:
            self.append(token)

    def append(self, token: int) -> None:
        """One more token; runs that end just before it are known from now on."""
        end = len(self._tokens)
        for length in range(SHORTEST_MATCH, LONGEST_MATCH + 1):
            if length <= end:
                self._after[tuple(self._tokens[end - length :])] = end
        self._tokens.append(token)

    def guess(self, count: int) -> list[int]:
        """At most `count` tokens that followed the longest run the text now ends with."""
        for length in range(LONGEST_MATCH, SHORTEST_MATCH - 1, -1):
            if length > len(self._tokens):
                continue
            place = self._after.get(tuple(self._tokens[-length:]))
            if place is not None:
                return self._tokens[place : place + count]
        return []
