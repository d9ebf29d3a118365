"""The config tree: layers, round trips, and every message word for word."""

import json
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lascaux.config.describe import describe_section, field_help
from lascaux.config.load import (
    from_tables,
    known_keys,
    load_config,
    preset_header,
    preset_names,
    to_tables,
    to_toml,
)
from lascaux.errors import ConfigError


def message(target: str | None, *flags: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(target, flags)
    return str(caught.value)


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        (
            "--model.n_layers=3",
            "flag --model.n_layers: unknown key 'model.n_layers'; did you mean 'model.num_layers'?",
        ),
        (
            "--num_layers=3",
            "flag --num_layers: unknown key 'num_layers'; did you mean 'model.num_layers'?",
        ),
        (
            "--optim.lr=3",
            "flag --optim.lr: unknown key 'optim.lr'; did you mean 'optimizer.lr'?",
        ),
        (
            "--model.num_layers=two",
            "flag --model.num_layers: 'model.num_layers' must be int; got 'two' (str)",
        ),
        (
            "--model.num_layers=2.5",
            "flag --model.num_layers: 'model.num_layers' must be int; got 2.5 (float)",
        ),
        (
            "--model.num_layers=true",
            "flag --model.num_layers: 'model.num_layers' must be int; got True (bool)",
        ),
        (
            "--model.block=paralel",
            "flag --model.block: 'model.block' must be one of 'sequential', 'parallel', "
            "'parallel_two_norms'; got 'paralel'; did you mean 'parallel'?",
        ),
        (
            "--model.num_heads=3",
            "[model] d_model 64 is not a multiple of num_heads 3; num_heads 2 or 4 would divide "
            "it, or set model.head_dim",
        ),
        (
            "--model.num_kv_heads=3",
            "[model] num_heads 4 is not a multiple of num_kv_heads 3; each key-value head serves "
            "the same number of query heads",
        ),
        (
            "--train.batch_tokens=1000",
            "train.batch_tokens 1000 is not a multiple of train.microbatch_seqs 4 x "
            "train.seq_len 64 = 256; nearest: 768 or 1024",
        ),
        (
            "--train.seq_len=2048",
            "train.seq_len 2048 is above model.max_context 1024",
        ),
        (
            "--optimizer.muon_momentum=0.9",
            "'optimizer.muon_momentum' has no effect with optimizer.name = 'adamw'; remove it, "
            "or unset it with --optimizer.muon_momentum=none",
        ),
        ("--optimizer.lr=-1", "'optimizer.lr' must be above 0; got -1.0"),
        ("--optimizer.lr=nan", "'optimizer.lr' must be above 0; got nan"),
        (
            "--data.valid_fraction=1",
            "'data.valid_fraction' must be at least 0 and below 1; got 1.0",
        ),
        (
            "--schedule.warmup_steps=10",
            "schedule.warmup_steps 10 leaves nothing of the 10 steps of train.steps; lower one or "
            "raise the other",
        ),
        (
            '--data.sources=[{path="a", wieght=1}]',
            "flag --data.sources: unknown key 'data.sources[0].wieght'; did you mean 'weight'?",
        ),
    ],
)
def test_a_bad_setting_is_answered_in_these_words(file: Path, flag: str, words: str) -> None:
    assert message(str(file), flag) == words


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(
        "[model]\nd_model = 64\n[train]\nsteps = 10\nbatch_tokens = 256\nmicrobatch_seqs = 4\n"
        "seq_len = 64\n[schedule]\nwarmup_steps = 2\n"
    )
    return path


def test_a_file_is_held_to_the_same_words(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("[model]\nn_layers = 3\n")
    assert message(str(path)) == (
        f"{path}: unknown key 'model.n_layers'; did you mean 'model.num_layers'?"
    )
    path.write_text('[model]\nnum_layers = "12"\n')
    assert message(str(path)) == f"{path}: 'model.num_layers' must be int; got '12' (str)"
    path.write_text("num_layers = 3\n")
    assert message(str(path)) == (
        f"{path}: 'num_layers' stands outside any section; it belongs in [model]"
    )
    path.write_text("[model\n")
    assert message(str(path)).startswith(f"{path} is not valid TOML: ")
    path.write_bytes(b"\xff\xfe")
    assert message(str(path)) == f"{path} is not UTF-8 text (byte 0)"


def test_an_unknown_preset_is_answered_with_the_nearest() -> None:
    assert message("gptj6b").splitlines()[0] == (
        "no preset or file 'gptj6b'; did you mean 'gptj-6b'?"
    )
    assert message("missing.toml") == "cannot read missing.toml: No such file or directory"


def test_flags_win_over_the_file_and_the_file_over_the_preset(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('preset = "gptj-6b"\n[train]\nsteps = 7\n[schedule]\nwarmup_steps = 3\n')
    config = load_config(str(path), ["--schedule.warmup_steps=5"])
    assert config.model.num_layers == 28
    assert (config.train.steps, config.schedule.warmup_steps) == (7, 5)


def test_steps_and_tokens_replace_each_other_between_layers(file: Path) -> None:
    config = load_config(str(file), ["--train.tokens=5e3"])
    assert (config.train.steps, config.train.tokens) == (None, 5000)
    assert message(str(file), "--train.tokens=5000", "--train.steps=9") == (
        "give either train.steps or train.tokens; got both"
    )


def test_numbers_pass_between_int_and_float_only_when_nothing_is_lost(file: Path) -> None:
    config = load_config(str(file), ["--train.steps=1e2", "--optimizer.grad_clip=2"])
    assert (config.train.steps, config.optimizer.grad_clip) == (100, 2.0)
    assert isinstance(config.optimizer.grad_clip, float)
    assert load_config(str(file), ["--optimizer.grad_clip=none"]).optimizer.grad_clip is None


@pytest.mark.parametrize("preset", preset_names())
def test_every_preset_loads_and_has_a_header(preset: str) -> None:
    config = load_config(preset)
    header = preset_header(preset)
    assert header.startswith(f"{preset}: ")
    for word in ("Source:", "Parameters:", "Hardware:"):
        assert word in header
    assert config == from_tables(json.loads(json.dumps(to_tables(config))), "manifest")


@given(
    prompts=st.lists(st.text(), max_size=3),
    lr=st.floats(min_value=1e-12, max_value=1e3),
    clip=st.none() | st.floats(min_value=1e-6, max_value=1e6),
    path=st.text(min_size=1).filter(lambda text: text != "none"),
    weight=st.floats(min_value=1e-6, max_value=1e6),
)
def test_toml_reads_back_to_an_equal_tree(
    prompts: list[str], lr: float, clip: float | None, path: str, weight: float
) -> None:
    tables = to_tables(load_config(None))
    tables["evaluate"]["sample_prompts"] = prompts
    tables["optimizer"] |= {"lr": lr, "grad_clip": clip}
    tables["tokenizer"]["path"] = path
    tables["data"]["sources"] = [{"path": path, "weight": weight}]
    config = from_tables(tables, "test")
    again = from_tables(tomllib.loads(to_toml(config)), "test")
    assert again == config


def test_every_setting_has_a_help_text() -> None:
    for key in known_keys():
        section, name = key.split(".")
        assert f"--{section}.{name}=" in describe_section(section)
    assert all(text and not text.endswith(".") for text in field_help().values())
