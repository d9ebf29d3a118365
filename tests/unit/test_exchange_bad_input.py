"""What an import or export refuses: one line that names the place, and nothing written."""

import errno
import io
import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor

from lascaux.checkpoint.load import load_tensors
from lascaux.config.check import check_model
from lascaux.config.schema import ModelConfig
from lascaux.data.tokenizer import Tokenizer, train_tokenizer
from lascaux.errors import CheckpointError, ConfigError, DataError, LascauxError
from lascaux.exchange import importing
from lascaux.exchange.exporting import export_folder
from lascaux.exchange.importing import import_folder
from lascaux.generate.load import find_checkpoint

ROWS, WIDTH, WIDER = 300, 16, 24
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": ROWS,
    "hidden_size": WIDTH,
    "intermediate_size": WIDER,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}
INDEX = "model.safetensors.index.json"
Change = Callable[[Path], object]


def weights() -> dict[str, Tensor]:
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (ROWS, WIDTH),
        "model.norm.weight": (WIDTH,),
        "lm_head.weight": (ROWS, WIDTH),
    }
    for i in range(2):
        layer = f"model.layers.{i}."
        shapes |= {
            f"{layer}{name}.weight": shape
            for name, shape in {
                "self_attn.q_proj": (WIDTH, WIDTH),
                "self_attn.k_proj": (WIDTH // 2, WIDTH),
                "self_attn.v_proj": (WIDTH // 2, WIDTH),
                "self_attn.o_proj": (WIDTH, WIDTH),
                "mlp.gate_proj": (WIDER, WIDTH),
                "mlp.up_proj": (WIDER, WIDTH),
                "mlp.down_proj": (WIDTH, WIDER),
                "input_layernorm": (WIDTH,),
                "post_attention_layernorm": (WIDTH,),
            }.items()
        }
    return {name: torch.randn(shape) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(iter(["the words of a text " * 20]), 280)


@pytest.fixture
def source(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file(weights(), folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(folder / "tokenizer.json")
    return folder


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO())


def refused(source: Path, console: Console, kind: type[LascauxError]) -> str:
    """The message; whatever was there before is there now."""
    before = sorted(source.parent.rglob("*"))
    with pytest.raises(kind) as caught:
        import_folder(source, source.parent / "run", console)
    assert sorted(source.parent.rglob("*")) == before
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500, message
    return message


def settings(**changed: object) -> Change:
    def change(source: Path) -> None:
        content = {k: v for k, v in (CONFIG | changed).items() if v != "absent"}
        (source / "config.json").write_text(json.dumps(content))

    return change


def config_text(text: str) -> Change:
    return lambda source: (source / "config.json").write_text(text)


def tensors(edit: Callable[[dict[str, Tensor]], object]) -> Change:
    def change(source: Path) -> None:
        changed = weights()
        edit(changed)
        save_file(changed, source / "model.safetensors", metadata={"format": "pt"})

    return change


def header(edit: Callable[[dict[str, Any]], object]) -> Change:
    def change(source: Path) -> None:
        path = source / "model.safetensors"
        content = path.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        entries = json.loads(content[8 : 8 + length])
        edit(entries)
        text = json.dumps(entries).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])

    return change


def raw(edit: Callable[[bytes], bytes]) -> Change:
    def change(source: Path) -> None:
        path = source / "model.safetensors"
        path.write_bytes(edit(path.read_bytes()))

    return change


def index(placed: object) -> Change:
    def change(source: Path) -> None:
        (source / "model.safetensors").rename(source / "a.safetensors")
        (source / INDEX).write_text(json.dumps({"weight_map": placed}))

    return change


def offsets(begin: int, end: int) -> Change:
    return header(lambda h: h["model.norm.weight"].update(data_offsets=[begin, end]))


EVERYTHING = dict.fromkeys(weights(), "a.safetensors")
DAMAGED = "is no valid safetensors file"
BAD_FILES: dict[str, tuple[Change, str]] = {
    "truncated": (raw(lambda c: c[:-100]), DAMAGED),
    "empty": (raw(lambda c: b""), DAMAGED),
    "too long": (raw(lambda c: c + b"more"), DAMAGED),
    "a header beyond the file": (raw(lambda c: struct.pack("<Q", 1 << 40) + c[8:]), DAMAGED),
    "a header that is no JSON": (raw(lambda c: c[:8] + b"x" * 40 + c[48:]), DAMAGED),
    "offsets beyond the file": (offsets(0, 1 << 40), DAMAGED),
    "offsets of another tensor": (offsets(0, 4 * WIDTH), DAMAGED),
    "offsets backwards": (offsets(64, 0), DAMAGED),
    "negative offsets": (offsets(-64, 0), DAMAGED),
    "a size that overflows": (
        header(lambda h: h["model.norm.weight"].update(shape=[1 << 62, 1 << 62])),
        DAMAGED,
    ),
    "another type than its bytes": (
        header(lambda h: h["model.norm.weight"].update(dtype="F64")),
        DAMAGED,
    ),
    "a tensor missing": (
        tensors(lambda t: t.pop("model.layers.1.mlp.up_proj.weight")),
        "lacks tensor 'model.layers.1.mlp.up_proj.weight' of the llama model",
    ),
    "a tensor too many": (
        tensors(lambda t: t.update({"model.layers.2.norm.weight": torch.ones(2)})),
        "has tensor 'model.layers.2.norm.weight', which the llama model",
    ),
    "a bias that looks like a mask": (
        tensors(lambda t: t.update({"model.layers.0.attn.bias": torch.ones(WIDTH)})),
        "has tensor 'model.layers.0.attn.bias'",
    ),
    "another shape": (
        tensors(lambda t: t.update({"model.norm.weight": torch.ones(WIDTH + 1)})),
        f"'model.norm.weight' is F32 ({WIDTH + 1},); config.json wants F32 or F16 or BF16",
    ),
    "a transposed tensor": (
        tensors(lambda t: t.update({"lm_head.weight": torch.ones(WIDTH, ROWS)})),
        f"'lm_head.weight' is F32 ({WIDTH}, {ROWS})",
    ),
    "whole numbers": (
        tensors(lambda t: t.update({"model.norm.weight": torch.ones(WIDTH, dtype=torch.int32)})),
        "'model.norm.weight' is I32",
    ),
    "no weights": (lambda s: (s / "model.safetensors").unlink(), "has none of model.safetensors"),
    "pickled weights": (
        lambda s: (s / "model.safetensors").rename(s / "pytorch_model.bin"),
        "pytorch_model.bin has more than tensors",
    ),
    "an index that climbs out": (
        index(EVERYTHING | {"lm_head.weight": "../a.safetensors"}),
        "'lm_head.weight' in file '../a.safetensors'; expected the name of a .safetensors file",
    ),
    "an index of the root": (index({"lm_head.weight": "/etc/passwd"}), "'/etc/passwd'"),
    "an index into a folder": (index({"x": "b/a.safetensors"}), "'b/a.safetensors'"),
    "an index of numbers": (index({"x": 3}), "in file 3"),
    "an index without a map": (index([]), "expected an object 'weight_map'; found []"),
    "an index of a missing file": (
        index(EVERYTHING | {"lm_head.weight": "b.safetensors"}),
        "b.safetensors is missing",
    ),
    "an index of a missing tensor": (index(EVERYTHING | {"x": "a.safetensors"}), "no tensor 'x'"),
    "an index that leaves one out": (
        index({name: file for name, file in EVERYTHING.items() if name != "lm_head.weight"}),
        "has tensor 'lm_head.weight', which model.safetensors.index.json places in no file",
    ),
    "no config.json": (lambda s: (s / "config.json").unlink(), "config.json cannot be read"),
    "config.json as a pipe": (
        lambda s: ((s / "config.json").unlink(), os.mkfifo(s / "config.json")),
        "must be a file",
    ),
    "NaN": (config_text('{"model_type": "llama", "rms_norm_eps": NaN}'), "NaN is no number"),
    "Infinity": (config_text('{"rms_norm_eps": -Infinity}'), "-Infinity is no number"),
    "no JSON": (config_text("{"), "config.json is not valid JSON"),
    "no object": (config_text("[1]"), "expected a JSON object, found list"),
    "a nest": (config_text("[" * 100_000), "config.json is not valid JSON"),
    "not UTF-8": (lambda s: (s / "config.json").write_bytes(b"\xff\xfe"), "not valid"),
    "an unknown model": (
        settings(model_type="gpt_neoxx"),
        "model_type 'gpt_neoxx' is not known to Lascaux; did you mean 'gpt_neox'?",
    ),
    "no model_type": (settings(model_type="absent"), "model_type None"),
    "quantised": (settings(quantization_config={"bits": 4}), "quantised"),
    "more layers than tensors": (
        settings(num_hidden_layers=1 << 20),
        "num_layers 1,048,576, but there are only 21 tensors",
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_folder_is_refused(name: str, source: Path, console: Console) -> None:
    change, words = BAD_FILES[name]
    change(source)
    assert words in refused(source, console, CheckpointError)


BAD_SETTINGS: dict[str, tuple[dict[str, object], str]] = {
    "absent": (dict(hidden_size="absent"), "'hidden_size' must be there; got None"),
    "a word": (dict(hidden_size="16"), "'hidden_size' must be a whole number"),
    "a yes": (dict(num_hidden_layers=True), "'num_hidden_layers' must be a whole number"),
    "none at all": (dict(num_hidden_layers=0), "got 0"),
    "below zero": (dict(intermediate_size=-4), "got -4"),
    "huge": (dict(hidden_size=1 << 40), "from 1 to 1,048,576"),
    "heads that divide nothing": (dict(num_attention_heads=3), "must be a divisor of the width"),
    "key heads that divide nothing": (dict(num_key_value_heads=3), "not a multiple of"),
    "too large a number": (dict(rms_norm_eps=1e999), "Infinity is no number"),
    "an unknown activation": (dict(hidden_act="gelu"), "'hidden_act' must be one of silu"),
    "positions stretched otherwise": (
        dict(rope_scaling={"rope_type": "yarn", "factor": 8.0}),
        "'rope_type' must be 'default', 'linear' or 'llama3'",
    ),
    "positions stretched as they come": (dict(rope_scaling={"type": "dynamic"}), "'type' must be"),
    "a stretch without a factor": (dict(rope_scaling={"type": "linear"}), "'factor' must be there"),
    "a stretch below one": (
        dict(rope_scaling={"type": "linear", "factor": 0.5}),
        "'model.rotary_factor' must be 1 or above; got 0.5",
    ),
    "half of llama3": (
        dict(rope_parameters={"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}),
        "'high_freq_factor' must be there",
    ),
    "llama3 upside down": (
        dict(
            rope_scaling={
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 4.0,
                "high_freq_factor": 1.0,
            }
        ),
        "rotary_low_freq_factor 4.0 must be below",
    ),
    "a part of each head": (dict(partial_rotary_factor=0.5), "must be 1.0"),
    "rope that is no object": (dict(rope_parameters=[1]), "'rope_parameters' must be an object"),
    "gpt2 by layer": (
        dict(model_type="gpt2", scale_attn_by_inverse_layer_idx=True),
        "'scale_attn_by_inverse_layer_idx' must be false",
    ),
    "opt 350m": (
        dict(model_type="opt", do_layer_norm_before=False, ffn_dim=WIDER),
        "'do_layer_norm_before' must be true",
    ),
    "opt with projections": (
        dict(model_type="opt", word_embed_proj_dim=8, hidden_act="relu"),
        "'word_embed_proj_dim' must be hidden_size 16",
    ),
    "gpt_neo with a window": (
        dict(model_type="gpt_neo", window_size=32, attention_types=[[["global", "local"], 1]]),
        "'window_size' must be at least max_position_embeddings 64",
    ),
    "mixtral with a window": (
        dict(model_type="mixtral", sliding_window=32),
        "'sliding_window' must be at least max_position_embeddings 64",
    ),
    "olmoe that clips": (dict(model_type="olmoe", clip_qkv=8.0), "'clip_qkv' must be null"),
    "bloom with the norm's residual": (
        dict(model_type="bloom", apply_residual_connection_post_layernorm=True),
        "'apply_residual_connection_post_layernorm' must be false",
    ),
}


@pytest.mark.parametrize("name", BAD_SETTINGS)
def test_a_setting_that_our_network_has_not_is_refused(
    name: str, source: Path, console: Console
) -> None:
    changed, words = BAD_SETTINGS[name]
    settings(**changed)(source)
    message = refused(source, console, (ConfigError, CheckpointError))  # type: ignore[arg-type]
    assert words in message and str(source / "config.json") in message


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch, lambda p: p.symlink_to("/nowhere")])
def test_what_is_there_stays(
    make: Callable[[Path], object], source: Path, console: Console
) -> None:
    make(source.parent / "run")
    assert "run exists already; give --out a new folder" in refused(
        source, console, CheckpointError
    )


def test_a_tokenizer_that_does_not_fit_is_refused(
    source: Path, console: Console, tokenizer: Tokenizer
) -> None:
    rows = tokenizer.vocab_size - 1
    settings(vocab_size=rows)(source)
    cut = {"model.embed_tokens.weight", "lm_head.weight"}
    tensors(lambda t: t.update({n: t[n][:rows].contiguous() for n in cut}))(source)
    assert "ids, the embedding only" in refused(source, console, CheckpointError)
    (source / "tokenizer.json").unlink()
    assert "has neither tokenizer.json" in refused(source, console, DataError)


def test_a_full_disk_leaves_nothing(
    source: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(importing, "write_part", full)
    assert "No space left on device; it needs" in refused(source, console, CheckpointError)


def test_any_flipped_byte_is_read_or_refused(source: Path, console: Console) -> None:
    """No exception but ours, whatever a header says."""
    draw = random.Random(0)
    for name, first, last in (("config.json", 0, 300), ("model.safetensors", 0, 1500)):
        intact = (source / name).read_bytes()
        for _ in range(150):
            content = bytearray(intact)
            content[draw.randrange(first, min(last, len(intact)))] = draw.randrange(256)
            (source / name).write_bytes(content)
            try:
                import_folder(source, source.parent / "run", console)
            except LascauxError as error:
                assert "\n" not in str(error)
            else:
                shutil.rmtree(source.parent / "run")
            assert sorted(p.name for p in source.parent.iterdir()) == ["hf"]
        (source / name).write_bytes(intact)


def test_an_export_refuses_damage_and_what_is_there(source: Path, console: Console) -> None:
    run, out = source.parent / "run", source.parent / "out"
    import_folder(source, run, console)
    out.mkdir()
    with pytest.raises(CheckpointError, match="out exists already"):
        export_folder(run, out, console)
    out.rmdir()
    (path,) = find_checkpoint(run).glob("*.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="no intact checkpoint") as caught:
        export_folder(run, out, console)
    assert "\n" not in str(caught.value) and not out.exists()
    content[-1] ^= 1
    path.write_bytes(content)
    other = train_tokenizer(iter(["other words " * 20]), 270)
    other.save(run / "tokenizer.json")
    with pytest.raises(CheckpointError, match="not the tokenizer the model was trained with"):
        export_folder(run, out, console)
    assert sorted(p.name for p in source.parent.iterdir()) == ["hf", "run"]


def test_the_good_folder_is_accepted(source: Path, console: Console) -> None:
    import_folder(source, source.parent / "run", console)
    saved = load_tensors(find_checkpoint(source.parent / "run"), "model")
    assert saved["blocks.1.attn.k.weight"].shape == (WIDTH // 2, WIDTH)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (dict(rotary_factor=2.0), "'model.rotary_factor' has no effect"),
        (dict(rotary_original_context=9), "'model.rotary_original_context' has no effect"),
        (dict(rotary_scaling="linear", rotary_low_freq_factor=2.0), "low_freq_factor' has no"),
        (dict(rotary_scaling="linear", rotary_factor=0.5), "must be 1 or above; got 0.5"),
        (dict(rotary_scaling="llama3", rotary_factor=2.0), "needs model.rotary_original_context"),
        (dict(rotary_scaling="linear", position="alibi"), "'model.rotary_scaling' has no effect"),
    ],
)
def test_each_way_to_stretch_positions_has_settings_of_its_own(
    changed: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        check_model(ModelConfig(**changed))
    assert words in str(caught.value)
