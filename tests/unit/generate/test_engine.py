"""The engine around a scripted network: texts, ends, queues, cancelling, pages given back."""

import codecs
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lascaux.config.schema import GenerateConfig, ModelConfig
from lascaux.errors import CheckpointError, ConfigError, RequestError
from lascaux.generate.continuation import generate
from lascaux.generate.engine import Engine
from lascaux.generate.request import Piece, QueueFull, Request, Sampling
from lascaux.model.transformer import Transformer
from tests.unit.generate.scripted import (
    CONFIG,
    END,
    SILENT,
    ByteTokenizer,
    loaded_model,
    scripted_engine,
)


def run(
    script: bytes | Sequence[int],
    prompt: Sequence[int] = b"p",
    *,
    top_logprobs: int | None = None,
    score_prompt: bool = False,
    options: dict[str, Any] | None = None,
    **fields: Any,
) -> list[Piece]:
    engine, _ = scripted_engine(list(script), len(prompt), **(options or {}))
    request = Request(
        prompt=tuple(prompt),
        sampling=Sampling(**fields),
        top_logprobs=top_logprobs,
        score_prompt=score_prompt,
    )
    pieces = list(engine.run(request))
    assert engine.figures().cache_pages_used == 0
    return pieces


def joined(pieces: Sequence[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def end(pieces: Sequence[Piece]) -> tuple[str, str, int]:
    outcome = pieces[-1].outcome
    assert outcome is not None
    return joined(pieces), outcome.finish_reason, outcome.drawn_tokens


def ids(pieces: Sequence[Piece]) -> list[int]:
    return [token.id for piece in pieces for token in piece.tokens]


def test_text_comes_as_it_is_made_and_ends_with_an_outcome() -> None:
    *pieces, last = run(b"cave", temperature=0)
    assert [(piece.text, ids([piece])) for piece in pieces] == [
        (letter, [ord(letter)]) for letter in "cave"
    ]
    assert end([last]) == ("", "end_of_text", 5)
    assert ids([last]) == [END]


def test_max_tokens_ends_with_length() -> None:
    assert end(run(b"abcdef", max_tokens=3)) == ("abc", "length", 3)
    assert end(run(b"ab", max_tokens=3))[1] == "end_of_text"
    assert end(run(b"ab", max_tokens=0)) == ("", "length", 0)


def test_text_ends_before_a_stop_string_and_all_tokens_come() -> None:
    pieces = run(b"x = 1\ndef f", stop=("\ndef ", "zzz"))
    assert end(pieces) == ("x = 1", "stop", len(b"x = 1\ndef "))
    assert bytes(ids(pieces)) == b"x = 1\ndef "
    assert joined(run(b"x = 1\ndef f", stop=("\ndef ",), include_stop=True)) == "x = 1\ndef "


def test_a_stop_string_that_does_not_complete_is_released() -> None:
    pieces = run(b"a\nde", stop=("\ndef",))
    assert end(pieces)[:2] == ("a\nde", "end_of_text")
    assert pieces[-1].text == "\nde"
    assert joined(run(b"a\ndeaf", stop=("\ndef",), max_tokens=4)) == "a\nde"


def test_stop_ids_end_the_text_and_count_as_silent() -> None:
    assert end(run(b"abc", stop_token_ids=(ord("c"),))) == ("ab", "stop", 3)
    assert joined(run(b"abc", stop_token_ids=(ord("c"),), include_stop=True)) == "abc"


def test_end_of_text_can_be_ignored() -> None:
    pieces = run([*b"a", END, *b"b", SILENT, *b"c"], ignore_end_of_text=True, max_tokens=5)
    assert end(pieces) == ("abc", "length", 5)


def test_before_min_tokens_nothing_ends_the_text() -> None:
    pieces = run(b"ab", min_tokens=6, max_tokens=20, temperature=0)
    assert end(pieces)[2] == 7
    assert END not in ids(pieces)[:6]
    assert joined(run(b"abab", stop=("b",), min_tokens=2)) == "aba"


def test_characters_are_passed_on_whole_with_their_tokens() -> None:
    pieces = run("a\u00e9\U0001f3a8".encode())
    assert [piece.text for piece in pieces] == ["a", "\u00e9", "\U0001f3a8", ""]
    assert [len(piece.tokens) for piece in pieces] == [1, 2, 4, 1]
    assert joined(run("\U0001f3a8".encode(), max_tokens=3)) == "\ufffd"


def test_a_prompt_that_ends_inside_a_character_is_completed() -> None:
    whole = "\U0001f3a8!".encode()
    for cut in (1, 2, 3):
        assert joined(run(whole[cut:], prompt=b"a" + whole[:cut])) == "\U0001f3a8!"


@settings(max_examples=60, deadline=None)
@given(
    script=st.lists(st.sampled_from([*b"ab\n", *"é🎨".encode(), 255]), max_size=30),
    stops=st.lists(st.text(alphabet="ab\né🎨\ufffd", min_size=1, max_size=4), max_size=3),
    max_tokens=st.integers(1, 35),
    draft_tokens=st.sampled_from([0, 3]),
)
def test_streamed_text_equals_the_text_made_at_once(
    script: list[int], stops: list[str], max_tokens: int, draft_tokens: int
) -> None:
    pieces = run(
        script,
        stop=tuple(stops),
        max_tokens=max_tokens,
        options={"draft_tokens": draft_tokens},
    )
    whole = bytes(script[:max_tokens]).decode(errors="replace")
    ends = [
        (end, -len(stop))
        for end in range(len(whole) + 1)
        for stop in stops
        if whole[:end].endswith(stop)
    ]
    if ends:
        place, minus_length = min(ends)
        assert end(pieces)[:2] == (whole[: place + minus_length], "stop")
    else:
        reason = "end_of_text" if max_tokens > len(script) else "length"
        assert end(pieces)[:2] == (whole, reason)
    assert bytes(ids(pieces)[: len(script)]) == bytes(script[: len(ids(pieces))])
    decoder = codecs.getincrementaldecoder("utf-8")(errors="strict")
    for piece in pieces:
        decoder.decode(piece.text.encode(), final=True)


def test_scores_come_for_the_prompt_and_for_what_is_drawn() -> None:
    pieces = run(b"xy", prompt=b"pqr", top_logprobs=2, score_prompt=True, temperature=0)
    prompt = pieces[0].prompt
    assert [token.id for token in prompt] == list(b"pqr")
    assert prompt[0].logprob is None and prompt[0].top == ()
    drawn = [token for piece in pieces for token in piece.tokens]
    assert [token.id for token in drawn] == [*b"xy", END]
    certain = 50.0 - np.log(np.exp(50.0) + 257)
    assert drawn[0].logprob == pytest.approx(certain)
    assert drawn[0].top[0] == (ord("x"), drawn[0].logprob)
    assert len(drawn[0].top) == 2


def test_long_prompts_are_read_in_chunks_between_tokens_of_others() -> None:
    engine, network = scripted_engine(b"abcdefgh", 1)
    order: list[str] = []
    engine.submit([(Request(prompt=(1,)), lambda piece: order.append("short"))])
    engine.step()
    engine.submit([(Request(prompt=(2,) * 200), lambda piece: order.append("long"))])
    while engine.step():
        pass
    assert network.chunks == [(0, 1), (0, 64), (64, 64), (128, 64), (192, 8)]
    assert order.index("long") >= 5 and "short" in order[4:]


def test_prompts_that_begin_alike_are_read_once() -> None:
    engine, network = scripted_engine(b"ab", 150)
    prompt = tuple(range(150))
    for _ in range(2):
        *_, last = engine.run(Request(prompt=prompt))
    assert last.outcome is not None and last.outcome.cached_tokens == 128
    assert network.chunks == [(0, 64), (64, 64), (128, 22), (128, 22)]
    other = (*prompt[:64], 9, *prompt[65:])
    *_, last = engine.run(Request(prompt=other))
    assert last.outcome is not None and last.outcome.cached_tokens == 64
    assert engine.figures().cached_tokens == 128 + 64


def test_several_answers_to_one_prompt_share_its_reading() -> None:
    engine, network = scripted_engine(b"ab", 150)
    request = Request(prompt=tuple(range(150)))
    engine.submit([(request, lambda piece: None)] * 3)
    while engine.step():
        pass
    assert network.chunks == [(0, 64), (64, 64), (128, 22), (128, 22), (128, 22)]


def test_without_reuse_every_prompt_is_read() -> None:
    engine, network = scripted_engine(b"ab", 70, reuse_prefixes=False)
    for _ in range(2):
        list(engine.run(Request(prompt=(3,) * 70)))
    assert network.chunks == [(0, 64), (64, 6)] * 2


def test_kept_pages_give_way_when_room_is_needed() -> None:
    engine, _ = scripted_engine(b"", 128, cache_tokens=256)
    for number in range(5):
        *_, last = engine.run(Request(prompt=(number,) * 128, sampling=Sampling(max_tokens=8)))
        assert last.outcome is not None and last.outcome.cached_tokens == 0
    *_, last = engine.run(Request(prompt=(4,) * 128, sampling=Sampling(max_tokens=8)))
    assert last.outcome is not None and last.outcome.cached_tokens == 64


def test_answers_wait_for_slots_and_for_pages() -> None:
    engine, network = scripted_engine(b"x" * 50, 1, max_streams=3, cache_tokens=256)
    request = Request(prompt=(1,), sampling=Sampling(max_tokens=100))  # two pages each
    outcomes: list[Piece] = []
    engine.submit([(request, outcomes.append)] * 4)
    engine.step()
    assert (engine.figures().running, engine.figures().waiting) == (2, 2)
    while engine.step():
        pass
    assert max(network.steps) == 2
    assert sum(piece.outcome is not None for piece in outcomes) == 4


def test_a_full_queue_is_refused_as_a_whole() -> None:
    engine, _ = scripted_engine(b"x", 1, max_streams=1, max_waiting=2)
    request = Request(prompt=(1,))
    engine.submit([(request, lambda piece: None)])
    with pytest.raises(QueueFull, match="3 more are asked for; at most 1 are computed and 2 wait"):
        engine.submit([(request, lambda piece: None)] * 3)
    engine.submit([(request, lambda piece: None)] * 2)


def test_cancelling_frees_the_pages_and_says_so() -> None:
    engine, _ = scripted_engine(b"x" * 99, 1)
    pieces: list[Piece] = []
    tickets = engine.submit([(Request(prompt=(1,)), pieces.append)] * 2)
    engine.step()
    assert engine.figures().cache_pages_used > 0
    engine.cancel(tickets)
    assert not engine.step()
    reasons = [piece.outcome.finish_reason for piece in pieces if piece.outcome]
    assert reasons == ["cancelled"] * 2
    assert engine.figures().cache_pages_used == 0
    engine.cancel(tickets)
    assert not engine.step()


def test_a_reader_that_goes_away_frees_its_pages() -> None:
    engine, _ = scripted_engine(b"abc", 1)
    pieces = engine.run(Request(prompt=(1,)))
    assert next(iter(pieces)).text == "a"
    pieces.close()  # type: ignore[attr-defined]
    assert engine.figures().cache_pages_used == 0


def test_logits_that_are_not_finite_end_one_answer_with_an_error() -> None:
    engine, network = scripted_engine(b"abcdef", 1)
    honest = network.decode

    def decode(rows: Sequence[Any]) -> np.ndarray:
        logits = honest(rows)
        if len(rows) == 2:
            logits[0] = np.nan
        return logits

    network.decode = decode  # type: ignore[method-assign]
    first: list[Piece] = []
    second: list[Piece] = []
    request = Request(prompt=(1,), sampling=Sampling(temperature=0))
    engine.submit([(request, first.append), (request, second.append)])
    engine.step()
    engine.step()
    network.decode = honest  # type: ignore[method-assign]
    while engine.step():
        pass
    outcome = first[-1].outcome
    assert outcome is not None and outcome.finish_reason == "error"
    assert outcome.error is not None and "lascaux verify" in outcome.error
    assert end(second)[0] == "abcdef"


def test_whoever_cannot_take_a_piece_loses_their_own_answer_only(
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine, _ = scripted_engine(b"hello", 1)
    engine.start()
    pieces: list[Piece] = []

    def fails(piece: Piece) -> None:
        raise RuntimeError("gone")

    engine.submit([(Request(prompt=(1,)), fails), (Request(prompt=(1,)), pieces.append)])
    engine.stop(drain_seconds=30)
    assert joined(pieces) == "hello"
    assert engine.figures().finished == {"cancelled": 1, "end_of_text": 1}
    assert engine.figures().cache_pages_used == 0
    assert "could not be handed over" in caplog.text


def test_after_our_own_bug_others_are_served_and_nothing_of_it_is_kept(
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine, network = scripted_engine(b"ab", 100)
    honest = network.decode
    failed = threading.Event()

    def fails_once(rows: Sequence[Any]) -> np.ndarray:
        if not failed.is_set():
            failed.set()
            raise ValueError("a bug")
        return honest(rows)

    network.decode = fails_once  # type: ignore[method-assign]
    engine.start()
    answers: list[list[Piece]] = [[], []]
    request = Request(prompt=tuple(range(100)))
    engine.submit([(request, answers[0].append)])
    assert failed.wait(30)
    engine.submit([(request, answers[1].append)])
    engine.stop(drain_seconds=30)
    first, second = (pieces[-1].outcome for pieces in answers)
    assert first is not None and (first.finish_reason, first.error) == ("error", "internal error")
    assert second is not None and second.cached_tokens == 0
    assert end(answers[1])[0] == "ab"
    assert "a bug" in caplog.text


def test_cancelling_one_of_several_leaves_the_pages_they_share() -> None:
    engine, _ = scripted_engine(b"hello", 100)
    pieces: list[list[Piece]] = [[], []]
    request = Request(prompt=tuple(range(100)))
    tickets = engine.submit([(request, each.append) for each in pieces])
    for _ in range(4):
        engine.step()
    engine.cancel(tickets[:1])
    while engine.step():
        pass
    assert joined(pieces[1]) == "hello"
    assert engine.figures().cache_pages_used == 0


def test_an_answer_may_end_with_the_sign_for_an_unfinished_character() -> None:
    assert end(run([0xC3], stop=("\ufffd",)))[:2] == ("", "stop")
    assert end(run([0xC3], stop=("\ufffd",), min_tokens=2, max_tokens=2))[1] == "length"


def test_a_run_that_is_never_read_asks_for_nothing() -> None:
    engine, _ = scripted_engine(b"x", 1)
    engine.run(Request(prompt=(1,)))
    assert engine.figures().waiting == 0


def test_drawn_tokens_are_counted_as_they_are_drawn() -> None:
    engine, _ = scripted_engine(b"abcdef", 1)
    engine.submit([(Request(prompt=(1,)), lambda piece: None)])
    for number in range(3):
        engine.step()
        assert engine.figures().drawn_tokens == number + 2


@pytest.mark.parametrize("tokens", [0, -5, 10**12])
def test_a_cache_that_has_no_room_is_refused(tokens: int) -> None:
    with pytest.raises(ConfigError, match="'serve.cache_tokens' .* are free; give at least 1"):
        scripted_engine(b"x", 1, cache_tokens=tokens)


def test_more_at_once_than_may_ever_wait_is_no_matter_of_waiting() -> None:
    engine, _ = scripted_engine(b"x", 1, max_streams=1, max_waiting=1)
    with pytest.raises(RequestError, match="3 answers are asked for at once; at most 2") as raised:
        engine.submit([(Request(prompt=(1,)), lambda piece: None)] * 3)
    assert not isinstance(raised.value, QueueFull)


def test_the_thread_answers_many_and_stops_when_all_are_done() -> None:
    engine, _ = scripted_engine(b"hello", 1, max_streams=4)
    engine.start()
    answers: list[list[Piece]] = [[] for _ in range(12)]
    for pieces in answers:
        engine.submit([(Request(prompt=(1,)), pieces.append)])
    engine.stop(drain_seconds=30)
    assert [joined(pieces) for pieces in answers] == ["hello"] * 12
    with pytest.raises(QueueFull, match="shutting down"):
        engine.submit([(Request(prompt=(1,)), lambda piece: None)])


def test_stopping_cancels_what_takes_too_long() -> None:
    engine, network = scripted_engine(b"x" * 250, 1)
    honest, seen = network.decode, threading.Event()

    def slow(rows: Sequence[Any]) -> np.ndarray:
        seen.set()
        time.sleep(0.01)
        return honest(rows)

    network.decode = slow  # type: ignore[method-assign]
    pieces: list[Piece] = []
    engine.start()
    engine.submit([(Request(prompt=(1,)), pieces.append)])
    assert seen.wait(30)
    engine.stop(drain_seconds=0)
    assert pieces[-1].outcome is not None
    assert pieces[-1].outcome.finish_reason == "cancelled"


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(prompt=()), "'prompt' is empty"),
        (Request(prompt=(1,) * 256), "'prompt' has 256 tokens; .* is 256, so that 1 to 255 leave"),
        (
            Request(prompt=(1,) * 257, sampling=Sampling(max_tokens=0)),
            "'prompt' has 257 tokens; .* 1 to 256 can be read",
        ),
        (Request(prompt=(1, 258)), "token id 258; the model has ids from 0 to 257"),
        (Request(prompt=(1,), top_logprobs=999), "'logprobs' must be from 0 to 258; got 999"),
        (Request(prompt=(1,), score_prompt=True), "a scored prompt needs 'logprobs'"),
        (Request(prompt=(1,), score_prompt=True, top_logprobs=1, embed=True), "or embedded; ask"),
        (Request(prompt=(1,), sampling=Sampling(top_p=2)), "'top_p' must be between 0 and 1"),
    ],
)
def test_what_cannot_be_done_is_refused_at_once(request_: Request, message: str) -> None:
    engine, _ = scripted_engine(b"x", 1)
    with pytest.raises(RequestError, match=message):
        engine.submit([(request_, lambda piece: None)])
    assert engine.figures().waiting == 0


def test_what_the_cache_cannot_hold_is_refused() -> None:
    engine, _ = scripted_engine(b"x", 1, cache_tokens=64)
    with pytest.raises(RequestError, match=r"may take 101 tokens; the cache holds 64 \(serve.cach"):
        engine.submit([(Request(prompt=(1,), sampling=Sampling(max_tokens=100)), print)])


def test_a_tokenizer_with_more_ids_than_the_model_is_refused() -> None:
    model = Transformer(ModelConfig(num_layers=1, d_model=8, num_heads=1, vocab_size=257))
    with pytest.raises(CheckpointError, match="has 258 ids, model.vocab_size is 257"):
        Engine(loaded_model(model))


def test_a_text_that_is_none_is_refused() -> None:
    with pytest.raises(RequestError, match="not valid text at character 1"):
        generate(loaded_model(), "a\ud800", GenerateConfig())


def test_full_contexts_end_with_length() -> None:
    assert end(run(b"y" * 300, prompt=b"x" * 250, max_tokens=50)) == ("yyyyyy", "length", 6)
    assert end(run(b"y" * 300, prompt=b"x" * 255)) == ("y", "length", 1)
    assert CONFIG.max_context == 256


def test_guesses_change_nothing_and_are_counted() -> None:
    text = b"the cave of the cave of the cave of the bull"
    plain = run(text, temperature=0)
    guessed = run(text, temperature=0, options={"draft_tokens": 4})
    assert end(guessed) == end(plain) and ids(guessed) == ids(plain)
    outcome = guessed[-1].outcome
    assert outcome is not None and outcome.accepted_tokens > 10
    assert outcome.accepted_tokens <= outcome.drafted_tokens
    assert ByteTokenizer.vocab_size == 258
