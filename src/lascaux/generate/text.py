"""From drawn tokens to pieces of text that are certain: whole characters, no part of a stop."""

import codecs
from collections.abc import Sequence

from lascaux.data.tokenizer import Tokenizer
from lascaux.generate.request import Sampling, ScoredToken
from lascaux.generate.stops import StopMatcher

LONGEST_CHARACTER_BYTES = 4


class TextStream:
    """The text of an answer as it grows; texts and tokens stay together.

    A prompt of token ids may end inside a character: the answer then begins with all of it.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], sampling: Sampling) -> None:
        self.stopped = False
        self._tokenizer, self._min_tokens = tokenizer, sampling.min_tokens
        self._matcher = StopMatcher(sampling.stop, include=sampling.include_stop)
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._utf8.decode(_unfinished_character(tokenizer, prompt))
        self._drawn = 0
        self._made = self._released = 0
        self._waiting: list[tuple[ScoredToken, int | None]] = []
        """tokens not yet handed out, with the characters made up to their end once that is known"""

    def feed(self, token: ScoredToken, *, silent: bool = False) -> tuple[str, list[ScoredToken]]:
        """The text that is now certain, and the tokens whose text it completes.

        The text of a silent token does not count.
        """
        text = self._utf8.decode(b"" if silent else self._tokenizer.token_bytes(token.id))
        self._drawn += 1
        self._made += len(text)
        unfinished = bool(self._utf8.getstate()[0])
        self._waiting.append((token, None))
        if not unfinished:
            self._waiting = [
                (held, self._made if end is None else end) for held, end in self._waiting
            ]
        if self._drawn <= self._min_tokens:
            certain = self._matcher.skip(text)
        else:
            certain = self._matcher.feed(text)
        self.stopped = self._matcher.found
        return self._hand_out(certain)

    def finish(self) -> tuple[str, list[ScoredToken]]:
        """What was held back, at the end of the answer, and all tokens that are left."""
        text = ""
        if not self.stopped:
            last = self._utf8.decode(b"", final=True)
            early = self._drawn <= self._min_tokens
            text = self._matcher.skip(last) if early else self._matcher.feed(last)
            text += self._matcher.flush()
            self.stopped = self._matcher.found
        tokens = [token for token, _ in self._waiting]
        self._waiting = []
        return text, tokens

    def _hand_out(self, text: str) -> tuple[str, list[ScoredToken]]:
        self._released += len(text)
        count = 0
        for _, end in self._waiting:
            if end is None or end > self._released:
                break
            count += 1
        ready, self._waiting = self._waiting[:count], self._waiting[count:]
        return text, [token for token, _ in ready]


def _unfinished_character(tokenizer: Tokenizer, tokens: Sequence[int]) -> bytes:
    """The bytes at the end of the tokens' text that begin a character and do not complete it."""
    tail = b""
    for token in reversed(tokens[-LONGEST_CHARACTER_BYTES:]):
        tail = tokenizer.token_bytes(token) + tail
    tail = tail[1 - LONGEST_CHARACTER_BYTES :]
    for start in range(len(tail)):
        decoder = codecs.getincrementaldecoder("utf-8")(errors="strict")
        try:
            decoder.decode(tail[start:])
        except UnicodeDecodeError:
            continue
        pending = decoder.getstate()[0]
        return pending
    return b""
