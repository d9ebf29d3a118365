"""Text to report through the command line alone, with a kill -9 on the way."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from lascaux.data.tokenizer import load_tokenizer
from tests.conftest import last_weights, metrics

LASCAUX = [sys.executable, "-m", "lascaux"]


def test_text_becomes_shards_a_model_text_and_a_report(
    tmp_path: Path, config_file: Path, corpus: Path, cli: Any
) -> None:
    shards, run = tmp_path / "shards", tmp_path / "run"
    prepared = cli("prepare", corpus, "--out", shards, "--model.vocab_size=300", "--json")
    assert prepared.code == 0
    summary = json.loads(prepared.out)
    assert summary["train_documents"] + summary["valid_documents"] == 40

    flags = [f"--data.sources={shards}", "--train.steps=60", "--evaluate.every_steps=30"]
    trained = cli("train", config_file, "--run", run, "--json", *flags)
    assert trained.code == 0
    outcome = json.loads(trained.out)
    first = metrics(run)[0]["loss"]
    assert outcome["valid_loss"] < 0.6 * first, "the model learned something"
    assert outcome["tokens_seen"] == 60 * 256
    assert not (run / "data").exists(), "prepared shards are read in place"

    generated = cli("generate", run, "--prompt", "add(3, ", "--json")
    assert generated.code == 0
    figures = json.loads(generated.out)
    assert figures["tokens"] <= 12 and figures["finish_reason"] in ("length", "end_of_text")
    plain = cli("generate", run, "--prompt", "add(3, ")
    assert plain.out == "add(3, " + figures["text"] + "\n"
    newest = run / "checkpoints" / "step_00000060"
    other = cli("generate", run, "--prompt", "add(3, ", "--generate.seed=1", "--json")
    assert json.loads(other.out)["text"] != figures["text"]

    too_long = cli("generate", run, "--prompt", "ab1 " * 99)
    assert too_long.code == 2 and too_long.out == "" and "max_context is 64" in too_long.err

    assert cli("verify", run).code == 0
    report = cli("report", run)
    assert report.code == 0
    page = Path(report.out.strip()).read_text()
    assert "bits per byte" in page.lower() and page.count("<svg") >= 4
    assert load_file(newest / "model.safetensors")["embed.weight"].shape == (300, 32)
    assert load_tokenizer(run / "tokenizer.json").vocab_size == 300


def test_kill_minus_nine_and_the_same_command_again_is_the_uninterrupted_run(
    tmp_path: Path, config_file: Path, cli: Any
) -> None:
    reference, run = tmp_path / "reference", tmp_path / "run"
    flags = ["--train.steps=20", "--checkpoint.every_steps=4", "--evaluate.every_steps=0"]
    subprocess.run(
        [*LASCAUX, "train", str(config_file), "--run", str(reference), *flags],
        check=True,
        capture_output=True,
    )
    command = [*LASCAUX, "train", str(config_file), "--run", str(run), *flags]
    for wanted_steps in (3, 13):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        log = run / "metrics.jsonl"
        while not log.exists() or log.read_text().count("\n") < wanted_steps:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert last_weights(run) == last_weights(reference)
    assert metrics(run) == metrics(reference)


@pytest.mark.parametrize("command", ["train", "prepare", "generate", "report", "verify", "config"])
def test_every_command_has_help(cli: Any, command: str) -> None:
    result = cli(command, "--help")
    assert result.code == 0 and result.out.startswith(f"usage: lascaux {command}")


def test_config_prints_what_it_reads(tmp_path: Path, cli: Any) -> None:
    printed = cli("config", "gptj-6b", "--train.microbatch_seqs", "2")
    path = tmp_path / "again.toml"
    path.write_text(printed.out)
    assert cli("config", path).out == printed.out
    assert json.loads(cli("config", path, "--json").out)["train"]["microbatch_seqs"] == 2
    assert "gptj-6b: GPT-J." in cli("config", "--list").out
