"""A model from elsewhere, from import to export, with the command line alone."""

import json
from pathlib import Path
from typing import Any

from lascaux.data.tokenizer import Tokenizer
from tests.conftest import last_weights, metrics
from tests.unit.data.test_tokenizer_byte_fallback import KINDS, VOCABULARY
from tests.unit.test_exchange_bad_gguf import METADATA, STRING, build, entries
from tests.unit.test_exchange_streaming import make_folder

FLAGS = ["--train.steps=6", "--train.seq_len=32", "--train.batch_tokens=256", "--train.device=cpu"]
FLAGS += ["--schedule.warmup_steps=2", "--evaluate.sample_tokens=4", "--optimizer.lr=1e-2"]


def test_a_model_is_exported_imported_fine_tuned_and_exported_again(
    tmp_path: Path, config_file: Path, corpus: Path, cli: Any
) -> None:
    run, again = tmp_path / "run", tmp_path / "again"
    assert cli("train", config_file, "--run", run).code == 0
    result = cli("export", run, "--out", tmp_path / "hf", "--json")
    assert result.code == 0 and json.loads(result.out)["family"] == "gpt_neox"
    result = cli("import", tmp_path / "hf", "--out", again, f"--data.sources={corpus}", *FLAGS)
    assert result.code == 0 and "next: lascaux generate" in result.out
    assert cli("verify", again).code == 0
    prompt = ["--prompt", "add(", "--generate.temperature=0", "--generate.max_tokens=8"]
    assert cli("generate", again, *prompt).out == cli("generate", run, *prompt).out
    assert cli("train", "--run", again).code == 0
    assert metrics(again)[0]["loss"] < metrics(run)[0]["loss"] - 0.5, "it began trained"
    assert cli("verify", again).code == 0
    assert len(last_weights(again)) == 2
    assert cli("export", again, "--out", tmp_path / "hf2", "--dtype", "bf16").code == 0


def test_an_import_over_something_is_refused(tmp_path: Path, cli: Any) -> None:
    result = cli("import", tmp_path, "--out", tmp_path)
    assert (result.code, result.out) == (2, "")
    assert result.err == f"lascaux: {tmp_path} exists already; give --out a new folder\n"
    result = cli("export", tmp_path, "--out", tmp_path / "x", "--train.steps=3")
    assert result.code == 2 and "`lascaux export` takes no settings" in result.err


def test_a_gguf_file_with_a_chat_template_is_fine_tuned_and_exported(
    tmp_path: Path, corpus: Path, cli: Any
) -> None:
    path = tmp_path / "model.gguf"
    template = {"tokenizer.chat_template": (STRING, "{{ messages[0].content }}")}
    path.write_bytes(build(METADATA | template, entries()))
    run = tmp_path / "run"
    result = cli("import", path, "--out", run, f"--data.sources={corpus}", *FLAGS, "--json")
    assert result.code == 0 and json.loads(result.out)["family"] == "llama (GGUF)"
    assert cli("train", "--run", run).code == 0
    assert cli("verify", run).code == 0
    assert cli("generate", run, "--prompt", "add(", "--generate.max_tokens=4").code == 0
    assert cli("export", run, "--out", tmp_path / "hf").code == 0
    written = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    assert written["chat_template"] == "{{ messages[0].content }}"


def test_a_file_that_lies_is_one_line_and_exit_2(tmp_path: Path, cli: Any) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(build(METADATA, entries())[:-500])
    result = cli("import", path, "--out", tmp_path / "run")
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith(f"lascaux: {path} is no valid GGUF file: found tensor")
    assert result.err.count("\n") == 1 and [p.name for p in tmp_path.iterdir()] == ["model.gguf"]


def test_a_model_with_llama_2s_tokenizer_is_trained(tmp_path: Path, corpus: Path, cli: Any) -> None:
    source, run = tmp_path / "hf", tmp_path / "run"
    make_folder(source, Tokenizer(KINDS["llama 2"]()), layers=1, width=64, rows=len(VOCABULARY))
    result = cli("import", source, "--out", run, f"--data.sources={corpus}", *FLAGS)
    assert result.code == 0, result.err
    assert cli("train", "--run", run).code == 0
    assert cli("verify", run).code == 0
    asked = ["--prompt", "the words", "--generate.max_tokens=4", "--generate.temperature=0"]
    assert cli("generate", run, *asked).code == 0
