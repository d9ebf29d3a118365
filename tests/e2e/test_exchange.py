"""A model from elsewhere, from import to export, with the command line alone."""

import json
from pathlib import Path
from typing import Any

from tests.conftest import last_weights, metrics

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
