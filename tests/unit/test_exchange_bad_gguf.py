"""GGUF files and pickles that are damaged, lie, or hide something: one line, nothing written."""

import io
import json
import os
import pickle
import random
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from lascaux.checkpoint.load import load_tensors
from lascaux.data.tokenizer import BYTE_CHARACTERS
from lascaux.errors import CheckpointError, ConfigError, DataError, LascauxError
from lascaux.exchange.importing import import_folder
from lascaux.generate.load import find_checkpoint
from tests.unit.test_exchange_bad_input import source, tokenizer  # noqa: F401  fixtures

WIDTH, WIDER, ROWS = 16, 24, 260
U32, F32, BOOL, STRING, ARRAY, U64 = 4, 6, 7, 8, 9, 10
TOKENS = ["<|endoftext|>", *BYTE_CHARACTERS, "he", "[PAD258]", "[PAD259]"]
TYPES = [3, *[1] * 257, 5, 5]
Metadata = dict[str, tuple[int, Any]]
Entry = dict[str, Any]
METADATA: Metadata = {
    "general.architecture": (STRING, "llama"),
    "llama.block_count": (U32, 2),
    "llama.embedding_length": (U32, WIDTH),
    "llama.attention.head_count": (U32, 4),
    "llama.attention.head_count_kv": (U32, 2),
    "llama.context_length": (U32, 64),
    "llama.feed_forward_length": (U32, WIDER),
    "llama.attention.layer_norm_rms_epsilon": (F32, 1e-5),
    "llama.rope.dimension_count": (U32, 4),
    "tokenizer.ggml.model": (STRING, "gpt2"),
    "tokenizer.ggml.pre": (STRING, "gpt-2"),
    "tokenizer.ggml.tokens": (ARRAY, (STRING, TOKENS)),
    "tokenizer.ggml.token_type": (ARRAY, (5, TYPES)),
    "tokenizer.ggml.merges": (ARRAY, (STRING, ["h e"])),
    "tokenizer.ggml.eos_token_id": (U32, 0),
}


def text(value: str) -> bytes:
    content = value.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(content)) + content


def value(kind: int, content: Any) -> bytes:
    if isinstance(content, bytes):
        return content
    if kind == STRING:
        return text(content)
    if kind == ARRAY:
        inner, items = content
        packed = b"".join(value(inner, item) for item in items)
        return struct.pack("<IQ", inner, len(items)) + packed
    return struct.pack({U32: "<I", 5: "<i", F32: "<f", BOOL: "<?", U64: "<Q"}[kind], content)


def entries() -> list[Entry]:
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (WIDTH, ROWS),
        "output_norm.weight": (WIDTH,),
    }
    for i in range(2):
        shapes |= {
            f"blk.{i}.{name}.weight": shape
            for name, shape in {
                "attn_q": (WIDTH, WIDTH),
                "attn_k": (WIDTH, WIDTH // 2),
                "attn_v": (WIDTH, WIDTH // 2),
                "attn_output": (WIDTH, WIDTH),
                "ffn_gate": (WIDTH, WIDER),
                "ffn_up": (WIDTH, WIDER),
                "ffn_down": (WIDER, WIDTH),
                "attn_norm": (WIDTH,),
                "ffn_norm": (WIDTH,),
            }.items()
        }
    found: list[Entry] = []
    offset = 0
    for name, dims in shapes.items():
        found.append({"name": name, "dims": dims, "kind": 0, "offset": offset})
        count = 4
        for size in dims:
            count *= size
        offset += -(-count // 32) * 32
    return found


def build(
    metadata: Metadata,
    tensors: list[Entry],
    version: int = 3,
    counts: tuple[int, int] | None = None,
) -> bytes:
    counts = counts or (len(tensors), len(metadata))
    head = b"GGUF" + struct.pack("<IQQ", version, *counts)
    for key, (kind, content) in metadata.items():
        head += text(key) + struct.pack("<I", kind) + value(kind, content)
    for entry in tensors:
        dims = entry["dims"]
        head += text(entry["name"]) + struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
        head += struct.pack("<IQ", entry["kind"], entry["offset"])
    head += bytes(-len(head) % 32)
    data = torch.randn(6000, generator=torch.Generator().manual_seed(0))
    end = max(each["offset"] for each in entries()) + 4 * WIDTH
    return head + data.numpy().tobytes()[:end].ljust(end, b"\0")


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO())


def refused(path: Path, console: Console, kind: Any) -> str:
    before = sorted(path.parent.rglob("*"))
    with pytest.raises(kind) as caught:
        import_folder(path, path.parent / "run", console)
    assert sorted(path.parent.rglob("*")) == before
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600, message
    return message


def changed(**keys: Any) -> Callable[[], bytes]:
    """Other values for keys of metadata; None leaves a key out."""
    renamed = {name.replace("__", "."): given for name, given in keys.items()}
    merged = {k: v for k, v in (METADATA | renamed).items() if v is not None}
    return lambda: build(merged, entries())


def moved(number: int, **fields: Any) -> Callable[[], bytes]:
    def make() -> bytes:
        tensors = entries()
        tensors[number] |= fields
        return build(METADATA, tensors)

    return make


def without(number: int) -> Callable[[], bytes]:
    return lambda: build(METADATA, [e for i, e in enumerate(entries()) if i != number])


def added(**fields: Any) -> Callable[[], bytes]:
    extra = {"name": "x.weight", "dims": (4,), "kind": 0, "offset": 0} | fields
    return lambda: build(METADATA, [*entries(), extra])


def good() -> bytes:
    return build(METADATA, entries())


NO_FILE = "is no valid GGUF file"
HUGE = struct.pack("<Q", 1 << 62)
BAD: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", NO_FILE),
    "another file": (lambda: b"PK\x03\x04" + bytes(100), "another beginning than 'GGUF'"),
    "four bytes": (lambda: b"GGUF", "4 bytes announced at byte 4 of 4"),
    "version 1": (lambda: build(METADATA, entries(), version=1), "GGUF of version 1"),
    "big-endian": (lambda: build(METADATA, entries(), version=3 << 24), "little-endian"),
    "a huge count of tensors": (
        lambda: build(METADATA, entries(), counts=(1 << 62, 3)),
        "4,611,686,018,427,387,904 entries announced",
    ),
    "a huge count of keys": (
        lambda: build(METADATA, entries(), counts=(3, 1 << 62)),
        "entries announced",
    ),
    "more keys than there are": (
        lambda: build(METADATA, entries(), counts=(20, 900)),
        NO_FILE,
    ),
    "truncated in the header": (lambda: good()[:300], NO_FILE),
    "truncated in the data": (lambda: good()[:-200], "of the data, which is"),
    "a text beyond the file": (
        changed(general__name=(STRING, HUGE)),
        "4,611,686,018,427,387,904 entries announced",
    ),
    "an array beyond the file": (
        changed(general__x=(ARRAY, struct.pack("<I", U64) + HUGE)),
        "entries announced",
    ),
    "an array of eight times the file": (
        changed(general__x=(ARRAY, struct.pack("<IQ", U64, 9000))),
        "72,000 bytes announced",
    ),
    "many texts announced": (
        changed(general__x=(ARRAY, struct.pack("<IQ", STRING, 1 << 40))),
        "entries announced",
    ),
    "arrays in arrays": (
        changed(general__x=(ARRAY, struct.pack("<IQ", ARRAY, 3))),
        "an array of the type 9",
    ),
    "an unknown type of metadata": (changed(general__x=(99, b"abcd")), "the unknown type 99"),
    "text that is not UTF-8": (changed(general__name=(STRING, "\udcff")), "not UTF-8"),
    "a key twice": (
        lambda: build(METADATA, entries()).replace(
            text("llama.context_length"), text("general.architecture"), 1
        ),
        "the key 'general.architecture' twice",
    ),
    "no alignment": (changed(general__alignment=(U32, 0)), "general.alignment 0"),
    "a huge alignment": (changed(general__alignment=(U32, 1 << 31)), "general.alignment"),
    "an offset beyond the file": (moved(3, offset=1 << 40), "bytes 1,099,511,627,776 to"),
    "an offset that wraps around": (moved(3, offset=(1 << 64) - 32), NO_FILE),
    "an offset between": (moved(3, offset=33), "not a multiple of 32"),
    "an offset of another tensor": (moved(3, offset=0), "which are those of"),
    "a huge shape": (moved(0, dims=(1 << 40, 1 << 40)), "of shape"),
    "a large shape": (moved(0, dims=(1 << 20, 1 << 20)), "of the data, which is"),
    "a shape of nothing": (moved(0, dims=(0, 4)), "of shape [0, 4]"),
    "no shape": (moved(1, dims=()), "of shape []"),
    "many dimensions": (moved(1, dims=(1,) * 9), "9 entries announced"),
    "an unknown type": (moved(1, kind=77), "of the unknown type 77"),
    "a type of broken blocks": (moved(1, kind=2, dims=(20,)), "of shape [20]"),
    "whole numbers": (moved(1, kind=26), "tensors of type I32"),
    "a tensor twice": (added(name="output_norm.weight", offset=0, dims=(1,)), NO_FILE),
    "a tensor missing": (without(5), "lacks tensor 'blk.0.attn_output.weight' of the llama model"),
    "no embedding": (without(0), "'vocab_size' must be there"),
    "a tensor too many": (
        lambda: build(METADATA, [*entries()[:-1], entries()[-1] | {"name": "what.weight"}]),
        "lacks tensor 'blk.1.ffn_norm.weight'",
    ),
    "another shape": (moved(1, dims=(8,)), "is F32 (8,); its metadata wants F32 (16,)"),
    "an unknown architecture": (
        changed(general__architecture=(STRING, "llamas")),
        "general.architecture 'llamas' is not known to Lascaux; did you mean 'llama'?",
    ),
    "an architecture that is a number": (
        changed(general__architecture=(U32, 3)),
        "general.architecture 3 is not known",
    ),
    "a part of a model": (changed(split__count=(U32, 3)), "is one of 3 parts"),
    "more layers than tensors": (
        changed(llama__block_count=(U32, 1 << 19)),
        "its metadata has num_layers 524,288, but there are only 20 tensors",
    ),
    "huge widths": (changed(llama__embedding_length=(U32, 1 << 31)), "from 1 to 1,048,576"),
    "no layers": (changed(llama__block_count=None), "'llama.block_count' must be there"),
    "heads for each layer": (
        changed(**{"llama__attention__head_count": (ARRAY, (U32, [4, 2]))}),
        "'llama.attention.head_count' must be a whole number",
    ),
    "yarn": (changed(llama__rope__scaling__type=(STRING, "yarn")), "'llama.rope.scaling.type'"),
    "a part of each head": (
        changed(llama__rope__dimension_count=(U32, 2)),
        "'llama.rope.dimension_count' must be the width of a head, 4",
    ),
    "a window": (
        changed(llama__attention__sliding_window=(U32, 8)),
        "at least context_length 64",
    ),
    "no tokenizer": (changed(tokenizer__ggml__model=None), "tokenizer.ggml.model None"),
    "another tokenizer": (
        changed(tokenizer__ggml__model=(STRING, "bert")),
        "tokenizer.ggml.model 'bert' cannot be rebuilt",
    ),
    "no tokens": (changed(tokenizer__ggml__tokens=None), "must be a list of names"),
    "tokens that are numbers": (
        changed(tokenizer__ggml__tokens=(ARRAY, (U32, [1, 2]))),
        "must be a list of names",
    ),
    "a token twice": (
        changed(tokenizer__ggml__tokens=(ARRAY, (STRING, [*TOKENS[:-1], TOKENS[-2]]))),
        "has a name twice",
    ),
    "types of other tokens": (
        changed(tokenizer__ggml__token_type=(ARRAY, (5, TYPES[:-1]))),
        "must have a number for each token",
    ),
    "no merges": (changed(tokenizer__ggml__merges=None), "merges must be a list; found None"),
    "a merge of three": (
        changed(tokenizer__ggml__merges=(ARRAY, (STRING, ["h e l"]))),
        "has 'h e l', not two tokens",
    ),
    "a merge of unknown tokens": (
        changed(tokenizer__ggml__merges=(ARRAY, (STRING, ["h zz"]))),
        "tokens and merges of the tokenizer disagree",
    ),
    "an end beyond the tokens": (
        changed(tokenizer__ggml__eos_token_id=(U32, 7000)),
        "eos_token_id must be an id below 260; got 7000",
    ),
    "a begin that is a word": (
        changed(tokenizer__ggml__add_bos_token=(STRING, "yes")),
        "add_bos_token must be true or false",
    ),
    "a template that is a number": (
        changed(**{"tokenizer__chat_template": (U32, 7)}),
        "tokenizer.chat_template a text",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_gguf_file_is_refused(name: str, tmp_path: Path, console: Console) -> None:
    make, words = BAD[name]
    (tmp_path / "m.gguf").write_bytes(make())
    kinds = (CheckpointError, ConfigError, DataError)
    assert words in refused(tmp_path / "m.gguf", console, kinds)


def test_the_good_file_is_read_alone_in_its_folder_and_through_a_link(
    tmp_path: Path, console: Console
) -> None:
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "m.gguf"
    path.write_bytes(good())
    import_folder(path, tmp_path / "a", console)
    (tmp_path / "in" / "config.json").write_text("{}")  # as many repositories have it
    import_folder(tmp_path / "in", tmp_path / "b", console)
    (tmp_path / "link.gguf").symlink_to(path)
    import_folder(tmp_path / "link.gguf", tmp_path / "c", console)
    runs = [load_tensors(find_checkpoint(tmp_path / run), "model") for run in "abc"]
    assert all(torch.equal(runs[0][n], other[n]) for other in runs[1:] for n in runs[0])
    (tmp_path / "in" / "other.gguf").write_bytes(good())
    with pytest.raises(CheckpointError, match="has 2 GGUF files, such as m.gguf and other.gguf"):
        import_folder(tmp_path / "in", tmp_path / "d", console)


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_a_folder_or_a_pipe_of_that_name_is_refused(
    make: Callable[[Path], None], tmp_path: Path, console: Console
) -> None:
    (tmp_path / "in").mkdir()
    make(tmp_path / "in" / "m.gguf")
    with pytest.raises(CheckpointError, match="must be a file"):
        import_folder(tmp_path / "in", tmp_path / "run", console)


def test_any_flipped_byte_is_read_or_refused(tmp_path: Path, console: Console) -> None:
    """No exception but ours, and no memory to speak of, whatever a header says."""
    draw = random.Random(0)
    intact = good()
    start = len(intact) - len(build({}, [])) + 32
    path = tmp_path / "m.gguf"
    numbers = [i for i in range(24, start) if intact[i] < 16]
    for number in range(400):
        content = bytearray(intact)
        place = draw.choice(numbers) if number % 2 else draw.randrange(start)
        content[place] = draw.choice([0, 1, 2, 8, 9, 127, 128, 255, draw.randrange(256)])
        path.write_bytes(content)
        try:
            import_folder(path, tmp_path / "run", console)
        except LascauxError as error:
            assert "\n" not in str(error)
        else:
            shutil.rmtree(tmp_path / "run")
        assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


# Pickled weights, in the folder of test_exchange_bad_input.py


def pickled(folder: Path, content: object, **options: Any) -> None:
    (folder / "model.safetensors").unlink(missing_ok=True)
    torch.save(content, folder / "pytorch_model.bin", **options)


def state(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_weights_are_the_same_weights(
    zipped: bool,
    source: Path,  # noqa: F811
    console: Console,
) -> None:
    import_folder(source, source.parent / "a", console)
    pickled(source, state(source), _use_new_zipfile_serialization=zipped)
    import_folder(source, source.parent / "b", console)
    runs = [load_tensors(find_checkpoint(source.parent / run), "model") for run in "ab"]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def in_parts(folder: Path) -> dict[str, str]:
    tensors = state(folder)
    (folder / "model.safetensors").unlink()
    placed: dict[str, str] = {}
    for number in (0, 1):
        name = f"pytorch_model-{number}.bin"
        part = dict(list(tensors.items())[number::2])
        torch.save(part, folder / name)
        placed |= dict.fromkeys(part, name)
    return placed


def write_index(folder: Path, placed: dict[str, str]) -> None:
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": placed}))


def test_pickled_parts_are_put_together(source: Path, console: Console) -> None:  # noqa: F811
    import_folder(source, source.parent / "a", console)
    placed = in_parts(source)
    write_index(source, placed)
    import_folder(source, source.parent / "b", console)
    runs = [load_tensors(find_checkpoint(source.parent / run), "model") for run in "ab"]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    for name in ("../x.bin", "/etc/passwd", "a.safetensors"):
        write_index(source, placed | {"lm_head.weight": name})
        words = refused(source, console, CheckpointError)
        assert "expected the name of a .bin file beside the index" in words


class Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch owned",)


def compressed(folder: Path, content: object) -> None:
    pickled(folder, content)
    path = folder / "pytorch_model.bin"
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)


BAD_PICKLES: dict[str, tuple[Callable[[Path], object], str]] = {
    "code": (lambda f: pickled(f, state(f) | {"x": Code()}), "asks for 'posix.system' while it is"),
    "code of old": (
        lambda f: pickled(f, {"x": Code()}, _use_new_zipfile_serialization=False),
        "asks for 'posix.system' while it is read: a pickle that could run code; nothing of it was",
    ),
    "a bare pickle with code": (
        lambda f: (f / "pytorch_model.bin").write_bytes(pickle.dumps(Code(), protocol=2)),
        "asks for 'posix.system'",
    ),
    "a pickle of another protocol": (
        lambda f: (f / "pytorch_model.bin").write_bytes(pickle.dumps(Code(), protocol=4)),
        "has more than tensors",
    ),
    "a list": (lambda f: pickled(f, [1]), "expected a dictionary of tensors, found list"),
    "nothing": (lambda f: pickled(f, {}), "expected a dictionary of tensors, found dict"),
    "a number": (lambda f: pickled(f, {"a": 3}), "found 'a' with int"),
    "a number for a name": (lambda f: pickled(f, {3: torch.ones(2)}), "found 3 with"),
    "a sparse tensor": (lambda f: pickled(f, {"a": torch.eye(3).to_sparse()}), "found 'a' with"),
    "a tensor missing": (
        lambda f: pickled(f, {"lm_head.weight": torch.ones(2, 2)}),
        "there are only 1 tensors",
    ),
    "no pickle": (lambda f: (f / "pytorch_model.bin").write_bytes(b"hello" * 9), "bin "),
    "a broken zip": (
        lambda f: (f / "pytorch_model.bin").write_bytes(b"PK\x03\x04" + bytes(90)),
        "is no file of weights that torch reads",
    ),
    "empty": (lambda f: (f / "pytorch_model.bin").write_bytes(b""), "is no file of weights"),
    "compressed": (lambda f: compressed(f, state(f)), "compressed, which torch never writes"),
    "a folder": (lambda f: (f / "pytorch_model.bin").mkdir(), "has none of model.safetensors"),
}


@pytest.mark.parametrize("name", BAD_PICKLES)
def test_a_bad_pickle_is_refused(
    name: str,
    source: Path,  # noqa: F811
    console: Console,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make, words = BAD_PICKLES[name]
    make(source)
    (source / "model.safetensors").unlink(missing_ok=True)
    monkeypatch.chdir(source.parent)
    assert words in refused(source, console, CheckpointError)
    assert not (source.parent / "owned").exists()


def test_any_flipped_byte_of_a_pickle_is_read_or_refused(
    source: Path,  # noqa: F811
    console: Console,
) -> None:
    pickled(source, state(source))
    path = source / "pytorch_model.bin"
    intact = path.read_bytes()
    draw = random.Random(0)
    for _ in range(200):
        content = bytearray(intact)
        for _ in range(draw.choice([1, 3])):
            content[draw.randrange(min(2500, len(intact)))] = draw.randrange(256)
        if draw.random() < 0.3:
            content = content[: draw.randrange(len(content))]
        path.write_bytes(content)
        try:
            import_folder(source, source.parent / "run", console)
        except LascauxError as error:
            assert "\n" not in str(error)
        else:
            shutil.rmtree(source.parent / "run")
        assert sorted(p.name for p in source.parent.iterdir()) == ["hf"]
