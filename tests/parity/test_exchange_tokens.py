"""Tokenizers and the roles of tokens, in and out, against transformers on both sides."""

import io
import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import tokenizers
from rich.console import Console
from tokenizers import AddedToken, processors
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from lascaux.data.roles import read_roles
from lascaux.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from lascaux.errors import DataError
from lascaux.exchange.exporting import export_folder
from lascaux.exchange.importing import import_folder
from tests.parity.test_exchange_gguf import add_settings, gguf_tensors
from tests.unit.data.test_tokenizer_byte_fallback import BYTE_TOKENS, KINDS, VOCABULARY

TEXTS = ["the words of a text", " the", "é🎉\n\n    x = 3", "a</s>b <s> c"]
CHATML = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "{{ eos_token }}\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TALK = [{"role": "user", "content": "hello é"}, {"role": "assistant", "content": "x"}]


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO())


def chat_tokenizer(begins: bool) -> Any:
    plain = train_tokenizer(iter(["user assistant hello the words of a text\n" * 20]), 300)
    inner = tokenizers.Tokenizer.from_str(plain.json)
    names = ["<|begin|>", "<|im_start|>", "<|im_end|>", "<|eom|>"]
    inner.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    if begins:
        begin = inner.token_to_id("<|begin|>")
        inner.post_processor = processors.TemplateProcessing(
            single="<|begin|> $A",
            pair="<|begin|> $A $B",
            special_tokens=[("<|begin|>", begin)],
        )
    return inner


def folder_of(inner: Any, folder: Path, eos: Any, **tokens: Any) -> Path:
    """A tiny Llama with this tokenizer, as people publish one."""
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=inner.get_vocab_size() + 5,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=64,
            bos_token_id=None,
            eos_token_id=eos,
            pad_token_id=None,
        )
    )
    model.save_pretrained(folder)
    inner.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"} | tokens
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def rendered(folder: Path, prompted: bool) -> str:
    return AutoTokenizer.from_pretrained(folder).apply_chat_template(
        TALK, tokenize=False, add_generation_prompt=prompted
    )


def same_for_transformers(source: Path, out: Path) -> None:
    """Everything that transformers makes of the two tokenizers."""
    theirs, ours = (AutoTokenizer.from_pretrained(folder) for folder in (source, out))
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text)
        ids = theirs.encode(text, add_special_tokens=False)
        assert ours.decode(ids) == theirs.decode(ids)
    for name in ("bos_token", "eos_token", "pad_token"):
        assert getattr(ours, name) == getattr(theirs, name)


@pytest.mark.parametrize("begins", [True, False])
@pytest.mark.parametrize("place", ["tokenizer_config.json", "chat_template.jinja"])
def test_a_chat_models_roles_go_in_and_out(
    begins: bool, place: str, tmp_path: Path, console: Console
) -> None:
    inner = chat_tokenizer(begins)
    ids = {name: inner.token_to_id(name) for name in ("<|begin|>", "<|im_end|>", "<|eom|>")}
    eos = [ids["<|im_end|>"], ids["<|eom|>"]]
    source = folder_of(
        inner,
        tmp_path / "hf",
        eos,
        bos_token={"__type": "AddedToken", "content": "<|begin|>", "special": True},
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        **({"chat_template": CHATML} if place == "tokenizer_config.json" else {}),
    )
    if place == "chat_template.jinja":
        (source / place).write_text(CHATML)
    found = import_folder(source, tmp_path / "run", console)
    assert found.ignored_settings == ()
    tokenizer = load_tokenizer(tmp_path / "run" / "tokenizer.json")
    roles = read_roles(tmp_path / "run", tokenizer)
    assert roles.begin_ids == ((ids["<|begin|>"],) if begins else ())
    assert roles.end_ids == (tokenizer.end_of_text_id, *eos)
    assert (roles.begin_token, roles.end_token) == ("<|begin|>", "<|im_end|>")
    assert (roles.pad_token, roles.chat_template) == ("<|endoftext|>", CHATML)
    export_folder(tmp_path / "run", tmp_path / "out", console)
    same_for_transformers(source, tmp_path / "out")
    for prompted in (True, False):
        assert rendered(tmp_path / "out", prompted) == rendered(source, prompted)
    generation = GenerationConfig.from_pretrained(tmp_path / "out")
    assert generation.eos_token_id[0] == eos[0]
    assert set(generation.eos_token_id) == {*eos, tokenizer.end_of_text_id}
    assert generation.bos_token_id == ids["<|begin|>"]
    import_folder(tmp_path / "out", tmp_path / "again", console)
    assert read_roles(tmp_path / "again", tokenizer) == roles


def test_old_folders_say_it_in_other_files(tmp_path: Path, console: Console) -> None:
    """special_tokens_map.json; add_bos_token, where tokenizer.json has no rule of its own."""
    source = folder_of(chat_tokenizer(False), tmp_path / "hf", None, add_bos_token=True)
    (source / "special_tokens_map.json").write_text(
        json.dumps({"bos_token": "<|begin|>", "eos_token": {"content": "<|im_end|>"}})
    )
    (source / "generation_config.json").unlink()
    import_folder(source, tmp_path / "run", console)
    tokenizer = load_tokenizer(tmp_path / "run" / "tokenizer.json")
    roles = read_roles(tmp_path / "run", tokenizer)
    assert roles.begin_ids == (tokenizer.token_id("<|begin|>"),)
    assert roles.end_token == "<|im_end|>" and roles.chat_template is None
    export_folder(tmp_path / "run", tmp_path / "out", console)
    marked = AutoTokenizer.from_pretrained(tmp_path / "out").encode("the")
    assert marked == [*roles.begin_ids, *tokenizer.encode("the")]


def test_what_the_tokenizer_has_not_is_left_out_and_said(tmp_path: Path, console: Console) -> None:
    source = folder_of(
        chat_tokenizer(False), tmp_path / "hf", [7, 90_000], pad_token="<pad>", bos_token=None
    )
    found = import_folder(source, tmp_path / "run", console)
    assert found.ignored_settings == (
        "pad_token '<pad>', which the tokenizer has not",
        "eos_token_id 7, which is no special token's",
        "eos_token_id 90000, which is no special token's",
    )


def test_a_run_of_our_own_exports_as_before(tmp_path: Path, console: Console) -> None:
    source = folder_of(chat_tokenizer(False), tmp_path / "hf", None)
    import_folder(source, tmp_path / "run", console)
    (tmp_path / "run" / "tokenizer_config.json").unlink()
    export_folder(tmp_path / "run", tmp_path / "out", console)
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert loaded.eos_token == "<|endoftext|>" and loaded.chat_template is None


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("tokenizer_config.json", "{", "is not valid JSON"),
        ("tokenizer_config.json", '{"bos_token": 3}', "'bos_token' must be the name of a token"),
        ("tokenizer_config.json", '{"chat_template": 3}', "'chat_template' must be a text"),
        ("generation_config.json", "[]", "expected a JSON object, found list"),
        ("special_tokens_map.json", "nope", "is not valid JSON"),
        ("chat_template.jinja", b"\xff\xfe", "is not UTF-8 at byte 0"),
    ],
)
def test_malformed_files_are_refused(
    name: str, content: Any, words: str, tmp_path: Path, console: Console
) -> None:
    source = folder_of(chat_tokenizer(False), tmp_path / "hf", None)
    (source / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as caught:
        import_folder(source, tmp_path / "run", console)
    assert words in str(caught.value) and name in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_with_byte_fallback_goes_in_and_out(
    kind: str, tmp_path: Path, console: Console
) -> None:
    inner = KINDS[kind]()
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    source = folder_of(inner, tmp_path / "hf", 2, bos_token="<s>", eos_token="</s>")
    import_folder(source, tmp_path / "run", console)
    tokenizer = load_tokenizer(tmp_path / "run" / "tokenizer.json")
    roles = read_roles(tmp_path / "run", tokenizer)
    assert (roles.begin_ids, roles.end_ids) == ((1,), (2,))
    export_folder(tmp_path / "run", tmp_path / "out", console)
    same_for_transformers(source, tmp_path / "out")


def sentencepiece(text: str, scores: dict[str, float]) -> list[str]:
    """SentencePiece's BPE as its paper has it: the best-scored neighbours merge, leftmost first."""
    symbols = list("▁" + text.replace(" ", "▁"))
    while True:
        pairs = [
            (-scores[a + b], i)
            for i, (a, b) in enumerate(zip(symbols, symbols[1:], strict=False))
            if a + b in scores
        ]
        if not pairs:
            break
        _, i = min(pairs)
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
    spelt = [[s] if s in scores else [f"<0x{b:02X}>" for b in s.encode()] for s in symbols]
    return [token for tokens in spelt for token in tokens]


def test_a_gguf_file_with_scores_gives_sentencepieces_ids(tmp_path: Path, console: Console) -> None:
    tokens = list(VOCABULARY)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokens),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=64,
        )
    )
    plain = [token for token in tokens[3:] if token not in BYTE_TOKENS]
    scores = {token: -float(number) for number, token in enumerate(plain)}
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    add_settings(writer, "llama", model.config)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores([scores.get(token, 0.0) for token in tokens])
    kinds = [2, 3, 3, *[6] * 256]
    writer.add_token_types([*kinds, *[1] * (len(tokens) - len(kinds))])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, array in gguf_tensors("llama", model, tmp_path / "hf").items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    import_folder(tmp_path / "m.gguf", tmp_path / "run", console)
    tokenizer = load_tokenizer(tmp_path / "run" / "tokenizer.json")
    roles = read_roles(tmp_path / "run", tokenizer)
    assert (roles.begin_ids, roles.end_ids, roles.end_token) == ((1,), (2,), "</s>")
    text = "the words  of   a     text: def f(x): 日本 é\n\n        x = 12  # the"
    for each in (text, *TEXTS, " " * 11, "text" * 9):
        wanted = sentencepiece(each, scores)
        assert [tokenizer._inner.id_to_token(i) for i in tokenizer.encode(each)] == wanted
        assert tokenizer.decode(tokenizer.encode(each)) == each


def test_a_loaded_tokenizer_stays_itself(tmp_path: Path) -> None:
    """Nothing of the roles changes the ids of a text."""
    inner = chat_tokenizer(True)
    inner.save(str(tmp_path / "tokenizer.json"))
    tokenizer: Tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("the") == chat_tokenizer(False).encode("the").ids
