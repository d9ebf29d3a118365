"""The engine around a model that says what it is told to, with a tokenizer of raw bytes."""

import codecs
import dataclasses
import gc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lascaux.config.schema import GenerateConfig, ModelConfig
from lascaux.errors import CheckpointError, RequestError
from lascaux.generate.cache import KVCache
from lascaux.generate.engine import GeneratedPiece, generate, generate_text

CPU = torch.device("cpu")
CONFIG = ModelConfig(
    num_layers=1, d_model=8, num_heads=1, vocab_size=260, padded_vocab_size=320, max_context=64
)
END = 256


class ByteTokenizer:
    """Ids 0 to 255 are bytes, 256 ends the text, 257 stands for no text."""

    vocab_size = 258
    end_of_text_id = END

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < END else b""


class ScriptedModel(nn.Module):
    """Whatever the prompt, the likeliest continuation is `script`, then end-of-text for ever.

    Ids without a token, and rows of padding, have a still higher logit.
    """

    def __init__(self, script: list[int], config: ModelConfig = CONFIG) -> None:
        super().__init__()
        self.config = config
        self.script = script
        self.weight = nn.Parameter(torch.zeros(1))
        self.seen: list[int] = []
        self.modes: set[tuple[bool, bool]] = set()

    def residual(self, tokens: Tensor, *, cache: list[KVCache]) -> Tensor:
        self.modes.add((self.training, torch.is_inference_mode_enabled()))
        if cache[0].length == 0:
            self.seen = []
            self.prompt_length = tokens.shape[1]
        self.seen += tokens[0].tolist()
        k = torch.zeros(1, 1, tokens.shape[1], self.config.head_width)
        cache[0].append(k, k)
        positions = torch.arange(cache[0].length - tokens.shape[1], cache[0].length)
        return positions[None, :, None].double()

    def unembed(self, x: Tensor) -> Tensor:
        logits = torch.zeros(1, x.shape[1], self.config.vocab_rows)
        for column, position in enumerate(x[0, :, 0].long().tolist()):
            index = position - self.prompt_length + 1
            wanted = self.script[index] if index < len(self.script) else END
            logits[0, column, wanted] = 50.0
        logits[:, :, ByteTokenizer.vocab_size :] = 90.0
        return logits


def run(script: bytes | list[int], prompt: str = "p", **fields: object) -> list[GeneratedPiece]:
    config = dataclasses.replace(GenerateConfig(), **fields)  # type: ignore[arg-type]
    model = ScriptedModel(list(script))
    return list(generate(model, ByteTokenizer(), prompt, config, device=CPU))  # type: ignore[arg-type]


def joined(pieces: list[GeneratedPiece]) -> str:
    return "".join(piece.text for piece in pieces)


def test_text_comes_as_it_is_made_and_ends_with_the_figures() -> None:
    *pieces, last = run(b"cave", temperature=0)
    assert [(piece.text, piece.num_tokens) for piece in pieces] == [
        ("c", 1), ("a", 2), ("v", 3), ("e", 4)
    ]  # fmt: skip
    assert all(p.finish_reason is None and p.tokens_per_second is None for p in pieces)
    assert (last.text, last.finish_reason, last.num_tokens) == ("", "end_of_text", 5)
    assert last.tokens_per_second is not None and last.tokens_per_second > 0


def test_max_tokens_ends_with_length() -> None:
    pieces = run(b"abcdef", max_tokens=3)
    assert (joined(pieces), pieces[-1].finish_reason, pieces[-1].num_tokens) == ("abc", "length", 3)


def test_end_of_text_in_the_last_allowed_token_is_end_of_text() -> None:
    assert run(b"ab", max_tokens=3)[-1].finish_reason == "end_of_text"


def test_text_ends_before_a_stop_string() -> None:
    pieces = run(b"x = 1\ndef f", stop=("\ndef ", "zzz"))
    assert (joined(pieces), pieces[-1].finish_reason) == ("x = 1", "stop")
    assert pieces[-1].num_tokens == len(b"x = 1\ndef ")


def test_a_stop_string_that_does_not_complete_is_released() -> None:
    pieces = run(b"a\nde", stop=("\ndef",))
    assert (joined(pieces), pieces[-1].finish_reason) == ("a\nde", "end_of_text")
    assert pieces[-1].text == "\nde"
    assert joined(run(b"a\ndeaf", stop=("\ndef",), max_tokens=4)) == "a\nde"


def test_characters_are_passed_on_whole() -> None:
    pieces = run("a\u00e9\U0001f3a8".encode())
    assert [piece.text for piece in pieces] == ["a", "\u00e9", "\U0001f3a8", ""]
    assert joined(run("\U0001f3a8".encode(), max_tokens=3)) == "\ufffd"


@settings(max_examples=60, deadline=None)
@given(
    script=st.lists(st.sampled_from([*b"ab\n", *"é🎨".encode(), 255]), max_size=30),
    stops=st.lists(st.text(alphabet="ab\né🎨\ufffd", min_size=1, max_size=4), max_size=3),
    max_tokens=st.integers(1, 35),
)
def test_streamed_text_equals_the_text_made_at_once(
    script: list[int], stops: list[str], max_tokens: int
) -> None:
    pieces = run(script, stop=tuple(stops), max_tokens=max_tokens)
    whole = bytes(script[:max_tokens]).decode(errors="replace")
    ends = [
        (end, -len(stop))
        for end in range(len(whole) + 1)
        for stop in stops
        if whole[:end].endswith(stop)
    ]
    if ends:
        end, minus_length = min(ends)
        assert (joined(pieces), pieces[-1].finish_reason) == (whole[: end + minus_length], "stop")
    else:
        reason = "end_of_text" if max_tokens > len(script) else "length"
        assert (joined(pieces), pieces[-1].finish_reason) == (whole, reason)
    assert all(piece.text for piece in pieces[:-1])
    decoder = codecs.getincrementaldecoder("utf-8")(errors="strict")
    for piece in pieces:
        decoder.decode(piece.text.encode(), final=True)


def test_ids_without_a_token_are_never_drawn() -> None:
    assert joined(run(b"abc", temperature=0)) == "abc"
    assert joined(run(b"abc", temperature=1.0)) == "abc"


def test_an_empty_prompt_starts_from_end_of_text() -> None:
    model = ScriptedModel(list(b"hi"))
    assert generate_text(model, ByteTokenizer(), "", GenerateConfig(), device=CPU) == "hi"  # type: ignore[arg-type]
    assert model.seen == [END, *b"hi"]


def test_a_prompt_that_leaves_no_room_is_refused_before_anything_runs() -> None:
    with pytest.raises(RequestError, match="'prompt' has 64 tokens; .* is 64, .* at most 63"):
        generate(ScriptedModel([]), ByteTokenizer(), "x" * 64, GenerateConfig(), device=CPU)  # type: ignore[arg-type]


def test_a_full_context_ends_with_length() -> None:
    pieces = run(b"y" * 100, prompt="x" * 60, max_tokens=50)
    assert (joined(pieces), pieces[-1].finish_reason) == ("yyyy", "length")
    pieces = run(b"y" * 100, prompt="x" * 63)
    assert (joined(pieces), pieces[-1].finish_reason) == ("y", "length")


def test_settings_are_checked_before_anything_runs() -> None:
    with pytest.raises(RequestError, match="'top_p'"):
        generate(
            ScriptedModel([]),
            ByteTokenizer(),
            "x",
            GenerateConfig(top_p=2),
            device=CPU,  # type: ignore[arg-type]
        )


def test_a_tokenizer_with_more_ids_than_the_model_is_refused() -> None:
    model = ScriptedModel([], dataclasses.replace(CONFIG, vocab_size=257))
    with pytest.raises(CheckpointError, match="has 258 ids, model.vocab_size is 257"):
        generate(model, ByteTokenizer(), "x", GenerateConfig(), device=CPU)  # type: ignore[arg-type]


@pytest.mark.parametrize("training", [True, False])
def test_the_model_runs_in_eval_mode_and_comes_back_as_it_was(training: bool) -> None:
    model = ScriptedModel(list(b"abc")).train(training)
    generate_text(model, ByteTokenizer(), "x", GenerateConfig(), device=CPU)  # type: ignore[arg-type]
    assert model.training == training
    assert model.modes == {(False, True)}


def test_a_reader_that_goes_away_leaves_the_model_as_it_was() -> None:
    model = ScriptedModel(list(b"abc")).train()
    pieces = generate(model, ByteTokenizer(), "x", GenerateConfig(), device=CPU)  # type: ignore[arg-type]
    assert next(pieces).text == "a"
    assert not torch.is_inference_mode_enabled()
    del pieces
    gc.collect()
    assert model.training
