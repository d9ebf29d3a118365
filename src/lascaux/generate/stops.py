"""Stop strings in a stream of text: not shown unless asked for, and nothing is held back for long.

The stop string that is complete first ends the text, the longest if several are complete at the
same character. So where text ends does not depend on how it arrives in pieces.
"""

from collections.abc import Sequence


class StopMatcher:
    """Passes text on until a stop string is complete.

    What may still become a stop string, the longest tail that starts one, waits until it does or
    cannot any more.
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        self.found = False
        self._include = include
        self._stops = tuple(stops)
        self._held = ""

    def feed(self, text: str) -> str:
        """The text that is now certain to come before any stop string; nothing once one came."""
        if self.found:
            return ""
        self._held += text
        complete = [
            (start + len(stop), start)
            for stop in self._stops
            if (start := self._held.find(stop)) >= 0
        ]
        if complete:
            self.found = True
            end, start = min(complete)
            return self._release(end if self._include else start)
        return self._release(len(self._held) - self._unfinished())

    def skip(self, text: str) -> str:
        """Text in which no stop string counts."""
        return self.flush() + text

    def flush(self) -> str:
        """What is held back, at the end of the text; nothing once a stop string came."""
        return "" if self.found else self._release(len(self._held))

    def _release(self, count: int) -> str:
        released, self._held = self._held[:count], self._held[count:]
        return released

    def _unfinished(self) -> int:
        """Characters of the longest tail that is the start of a stop string."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        for count in range(min(longest, len(self._held)), 0, -1):
            tail = self._held[-count:]
            if any(stop.startswith(tail) for stop in self._stops):
                return count
        return 0
