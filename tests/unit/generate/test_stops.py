"""Stop strings against a character-by-character reference, for every way to cut the text."""

from hypothesis import example, given, settings
from hypothesis import strategies as st

from lascaux.generate.stops import StopMatcher

TEXT = st.text(alphabet="abc\n\u00e9", max_size=40)
STOPS = st.lists(st.text(alphabet="abc\n\u00e9", min_size=1, max_size=6), max_size=4)


def reference(text: str, stops: list[str]) -> tuple[str, bool]:
    """The text before the stop string that is complete first."""
    for end in range(1, len(text) + 1):
        lengths = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if lengths:
            return text[: end - max(lengths)], True
    return text, False


def chunks(text: str, cuts: list[int]) -> list[str]:
    places = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    return [text[a:b] for a, b in zip(places, places[1:], strict=False)]


@settings(max_examples=400, deadline=None)
@given(text=TEXT, stops=STOPS, cuts=st.lists(st.integers(0, 40), max_size=40))
@example(text="xabc", stops=["abcd", "b"], cuts=[1, 2, 3])
@example(text="aab", stops=["ab"], cuts=[1, 2])
def test_any_chunking_gives_the_text_before_the_stop(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    matcher = StopMatcher(stops)
    pieces = [matcher.feed(chunk) for chunk in chunks(text, cuts)]
    released = "".join(pieces) + matcher.flush()
    assert (released, matcher.found) == reference(text, stops)


@settings(max_examples=200, deadline=None)
@given(text=TEXT, stops=STOPS)
def test_no_more_is_held_back_than_may_become_a_stop(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    shown = ""
    for end, character in enumerate(text, start=1):
        shown += matcher.feed(character)
        if matcher.found:
            return
        held = text[len(shown) : end]
        assert held == "" or any(stop.startswith(held) for stop in stops)


def test_a_partial_stop_waits_and_is_released_when_it_fails() -> None:
    matcher = StopMatcher(["\ndef "])
    assert matcher.feed("x = 1\nde") == "x = 1"
    assert matcher.feed("l x") == "\ndel x"
    assert matcher.feed("\nd") == ""
    assert matcher.flush() == "\nd"


def test_nothing_comes_after_a_stop() -> None:
    matcher = StopMatcher(["END"])
    assert matcher.feed("a END b") == "a "
    assert matcher.feed("more") == ""
    assert matcher.flush() == ""
