"""What a user gets for each mistake: exit 2, a message that says what to do, nothing half-made."""

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lascaux.train.precision as precision
from lascaux.checkpoint.lock import RunLock
from tests.conftest import last_weights, metrics


def test_a_mistyped_key_is_refused_before_anything_is_made(
    tmp_path: Path, config_file: Path, cli: Any
) -> None:
    run = tmp_path / "run"
    result = cli("train", config_file, "--run", run, "--model.n_layers=3")
    assert result.code == 2
    assert result.err == (
        "lascaux: flag --model.n_layers: unknown key 'model.n_layers'; "
        "did you mean 'model.num_layers'?\n"
    )
    assert not run.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian"], "invalid choice: 'trian'"),
        (["train", "--rum", "x"], "unrecognized arguments: --rum"),
        (["train", "--train.steps"], "--train.steps needs a value"),
        (["train", "tinny"], "no preset or file 'tinny'; did you mean 'tiny'?"),
        (["generate", "/nowhere"], "there is no run or checkpoint folder '/nowhere'"),
        (["verify", "/nowhere"], "there is no run folder '/nowhere'"),
        (["report", "/nowhere"], "/nowhere"),
        (["report", "x", "--train.steps=3"], "`lascaux report` takes no settings"),
        (["prepare", "/nowhere", "--out", "OUT"], "source '/nowhere' does not exist"),
    ],
)
def test_a_wrong_command_is_answered_in_one_message(
    tmp_path: Path, cli: Any, arguments: list[str], words: str
) -> None:
    result = cli(*(tmp_path / "out" if word == "OUT" else word for word in arguments))
    assert result.code == 2
    assert words in result.err and "Traceback" not in result.err
    assert result.out == ""


def write_sources(folder: Path, **files: bytes) -> Path:
    folder.mkdir()
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_bytes(content)
    return folder


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"body": "a text"}\n{"body": "b"}\n', "the text field 'text'; fields: 'body'"),
        (b"", "no training text"),
        (b'{"text": "short"}\n', "one sequence needs seq_len + 1 = 33"),
    ],
)
def test_a_source_that_cannot_train_leaves_nothing_behind(
    tmp_path: Path, config_file: Path, cli: Any, content: bytes, words: str
) -> None:
    source, run = tmp_path / "bad.jsonl", tmp_path / "run"
    source.write_bytes(content)
    flags = [f"--data.sources={source}", "--data.valid_fraction=0"]
    result = cli("train", config_file, "--run", run, *flags)
    assert result.code == 2 and words in result.err, result.err
    assert not (run / "checkpoints").exists() and not (run / "config.toml").exists()


def test_invalid_utf8_is_counted_or_refused(tmp_path: Path, corpus: Path, cli: Any) -> None:
    source = tmp_path / "texts.jsonl"
    good = json.dumps({"text": "a text long enough " * 20}).encode() + b"\n"
    source.write_bytes(good + b'{"text": "\xff"}\n' + good)
    flags = ["--model.vocab_size=300", "--data.valid_fraction=0"]
    out = tmp_path / "out"
    result = cli("prepare", source, "--out", out, "--json", *flags)
    assert result.code == 0
    assert json.loads(result.out)["excluded"] == {"invalid UTF-8": 1}
    listed = json.loads((out / "excluded.jsonl").read_text())
    assert (listed["line"], listed["byte_offset"]) == (2, len(good))
    strict = cli("prepare", source, "--out", tmp_path / "strict", "--data.strict=true", *flags)
    assert strict.code == 2
    assert f"{source}, line 2, byte {len(good)}: invalid UTF-8" in strict.err
    assert not (tmp_path / "strict").exists()


def test_a_tokenizer_larger_than_the_model_is_refused(
    tmp_path: Path, config_file: Path, cli: Any
) -> None:
    run = tmp_path / "run"
    assert cli("train", config_file, "--run", run).code == 0
    flags = [f"--tokenizer.path={run / 'tokenizer.json'}", "--model.vocab_size=280"]
    result = cli("train", config_file, "--run", tmp_path / "other", *flags)
    assert result.code == 2
    assert "set model.vocab_size to at least 300" in result.err


def test_shards_that_changed_since_the_run_began_are_refused(
    tmp_path: Path, config_file: Path, cli: Any
) -> None:
    run = tmp_path / "run"
    assert cli("train", config_file, "--run", run).code == 0
    shutil.rmtree(run / "checkpoints" / "step_00000008")
    shard = run / "data" / "s0.train.00000.tokens"
    content = bytearray(shard.read_bytes())
    content[0] ^= 1
    shard.write_bytes(content)
    result = cli("train", "--run", run)
    assert result.code == 2
    assert str(shard) in result.err and "expected sha256" in result.err
    verified = cli("verify", run)
    assert verified.code == 2 and "DAMAGED" in verified.out


def test_a_run_in_use_is_refused_and_left_alone(
    tmp_path: Path, config_file: Path, cli: Any
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    with RunLock(run):
        before = sorted(os.listdir(run))
        result = cli("train", config_file, "--run", run)
    assert result.code == 2
    assert f"in use by process {os.getpid()}" in result.err
    assert sorted(os.listdir(run)) == before


def test_another_shape_is_refused_with_the_difference(
    tmp_path: Path, config_file: Path, cli: Any
) -> None:
    run = tmp_path / "run"
    assert cli("train", config_file, "--run", run).code == 0
    before = last_weights(run)
    flags = ["--model.d_model=64", "--train.seed=5"]
    result = cli("train", config_file, "--run", run, *flags)
    assert result.code == 2
    assert "model.d_model  run: 32   now: 64" in result.err
    assert "train.seed     run: 0   now: 5" in result.err
    assert last_weights(run) == before


def test_a_longer_schedule_is_announced_and_continues(
    tmp_path: Path, config_file: Path, cli: Any
) -> None:
    run = tmp_path / "run"
    assert cli("train", config_file, "--run", run).code == 0
    result = cli("train", config_file, "--run", run, "--train.steps=10")
    assert result.code == 0
    assert "changed at step 8: train.steps: 8 -> 10" in result.err
    assert [line["step"] for line in metrics(run)] == list(range(1, 11))
    assert "setting changed" in (run / "events.jsonl").read_text()


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_loss_that_is_no_number_stops_before_the_update(
    tmp_path: Path, config_file: Path, cli: Any, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    original: Callable[..., torch.Tensor] = precision.loss_sum
    calls = 0

    def poisoned(*arguments: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        loss = original(*arguments)
        if calls != 2 * 4 + 1:  # the first micro-batch of step 5
            return loss
        if where == "loss":
            return loss * float("nan")
        return loss + (loss - loss.detach()) * float("inf")

    monkeypatch.setattr(precision, "loss_sum", poisoned)
    run = tmp_path / "run"
    result = cli("train", config_file, "--run", run)
    assert result.code == 2
    assert "step 5 was not taken" in result.err and "Samples 32 to 39" in result.err
    assert "Try a lower --optimizer.lr" in result.err
    monkeypatch.undo()
    reference = tmp_path / "reference"
    assert cli("train", config_file, "--run", run).code == 0
    assert cli("train", config_file, "--run", reference).code == 0
    assert last_weights(run) == last_weights(reference)


def test_a_full_disk_fails_the_save_aloud_and_keeps_the_checkpoints_there_are(
    tmp_path: Path, config_file: Path, cli: Any
) -> None:
    run = tmp_path / "run"
    assert cli("train", config_file, "--run", run, "--train.steps=4").code == 0
    before = last_weights(run)
    command = [sys.executable, "-m", "lascaux", "train", str(config_file), "--run", str(run)]

    def small_files_only() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))

    full = subprocess.run(
        [*command, "--train.steps=12"], capture_output=True, text=True, preexec_fn=small_files_only
    )
    assert full.returncode == 2, full.stderr
    assert "checkpoint at step 6 failed, training goes on" in full.stderr
    assert "bytes free" in full.stderr or "are free" in full.stderr
    assert "Traceback" not in full.stderr
    assert last_weights(run) == before
    assert not [name for name in os.listdir(run / "checkpoints") if name.startswith(".")]
    assert cli("train", config_file, "--run", run, "--train.steps=12").code == 0


def test_a_model_larger_than_the_memory_is_refused_with_both_figures(
    tmp_path: Path, corpus: Path, cli: Any
) -> None:
    flags = [f"--data.sources={corpus}", "--model.vocab_size=300", "--train.device=cpu"]
    result = cli("train", "gpt3-175b", "--run", tmp_path / "run", *flags)
    assert result.code == 2
    assert "parameters: weights, gradients and optimizer state take" in result.err
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_prompt_longer_than_the_context_is_refused_before_training(
    tmp_path: Path, config_file: Path, cli: Any
) -> None:
    flags = ["--run", tmp_path / "run", f"--evaluate.sample_prompts={'ab1 ' * 60}"]
    result = cli("train", config_file, *flags)
    assert result.code == 2 and "shorter than model.max_context 64" in result.err


def test_flags_alone_change_the_run_that_is_there(
    tmp_path: Path, config_file: Path, cli: Any
) -> None:
    run = tmp_path / "run"
    assert cli("train", config_file, "--run", run).code == 0
    result = cli("train", "--run", run, "--train.steps=9")
    assert result.code == 0 and "changed at step 8: train.steps: 8 -> 9" in result.err


def test_damaged_checkpoints_ahead_do_not_stop_later_saves(
    tmp_path: Path, config_file: Path, cli: Any
) -> None:
    run, flags = tmp_path / "run", ["--checkpoint.every_steps=2", "--checkpoint.keep=4"]
    assert cli("train", config_file, "--run", run, *flags).code == 0
    for step_name in ("step_00000006", "step_00000008"):
        weights = run / "checkpoints" / step_name / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1])
    result = cli("train", config_file, "--run", run, "--checkpoint.every_steps=1")
    assert result.code == 0 and "failed" not in result.err
    assert "continued at step 4 of 8" in result.err
    assert cli("verify", run).code == 0


def test_verify_finds_missing_data_and_another_tokenizer(
    tmp_path: Path, config_file: Path, corpus: Path, cli: Any
) -> None:
    run, shards = tmp_path / "run", tmp_path / "shards"
    assert cli("prepare", corpus, "--out", shards, "--model.vocab_size=300").code == 0
    flags = [f"--data.sources={shards}"]
    assert cli("train", config_file, "--run", run, *flags).code == 0
    assert cli("verify", run).code == 0
    shards.rename(tmp_path / "moved")
    missing = cli("verify", run)
    assert missing.code == 2 and f"DAMAGED  {shards}" in missing.out
    tokenizer = json.loads((run / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (run / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert f"DAMAGED  {run / 'tokenizer.json'}" in cli("verify", run).out
    assert "is not the tokenizer the model was trained with" in cli("generate", run).err


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--optimizer.lr=5", "--optimizer.lr has no effect on preparing"),
        ("--data.sources=x", "give the sources as arguments"),
    ],
)
def test_prepare_refuses_settings_it_does_not_read(
    tmp_path: Path, corpus: Path, cli: Any, flag: str, words: str
) -> None:
    result = cli("prepare", corpus, "--out", tmp_path / "out", flag)
    assert result.code == 2 and words in result.err


def test_a_run_without_held_out_text_says_so(tmp_path: Path, config_file: Path, cli: Any) -> None:
    flags = ["--run", tmp_path / "run", "--data.valid_fraction=0"]
    result = cli("train", config_file, *flags)
    assert result.code == 0 and "nothing held out: no validation" in result.err


def test_prepare_takes_the_name_of_the_text_field(tmp_path: Path, cli: Any) -> None:
    source = tmp_path / "texts.jsonl"
    source.write_text(json.dumps({"content": "some text " * 50}) + "\n")
    flags = ["--text-field", "content", "--model.vocab_size=300", "--data.valid_fraction=0"]
    result = cli("prepare", source, "--out", tmp_path / "out", *flags)
    assert result.code == 0 and "nothing is held out" in result.out


def test_a_torn_event_does_not_spoil_the_report(
    tmp_path: Path, config_file: Path, cli: Any
) -> None:
    run = tmp_path / "run"
    assert cli("train", config_file, "--run", run, "--train.steps=4").code == 0
    with open(run / "events.jsonl", "a") as file:
        file.write('{"time": "2026')
    assert cli("train", config_file, "--run", run).code == 0
    assert cli("report", run).code == 0


def test_a_prompt_that_is_no_text_and_an_empty_stop_are_refused(
    tmp_path: Path, config_file: Path, cli: Any
) -> None:
    run = tmp_path / "run"
    assert cli("train", config_file, "--run", run).code == 0
    assert "not valid text" in cli("generate", run, "--prompt", "a\udcff").err
    refused = cli("train", config_file, "--run", tmp_path / "other", "--generate.stop=")
    assert refused.code == 2 and "has an empty string" in refused.err


def test_training_outlives_the_reader_of_its_messages(tmp_path: Path, config_file: Path) -> None:
    run = tmp_path / "run"
    command = f"{sys.executable} -m lascaux train {config_file} --run {run} 2>&1 >/dev/null"
    subprocess.run(f"{command} | true", shell=True, check=True)
    assert len(metrics(run)) == 8 and (run / "checkpoints" / "step_00000008").exists()


def test_an_unwritable_run_folder_is_said_at_once(config_file: Path, cli: Any) -> None:
    result = cli("train", config_file, "--run", "/proc/lascaux")
    assert result.code == 2
    assert "cannot make the run folder /proc/lascaux" in result.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--train.device=cuda", "torch sees no GPU"),
        ("--train.precision=fp16", "fp16 needs a GPU"),
    ],
)
def test_hardware_that_is_not_there_is_named(
    tmp_path: Path, config_file: Path, cli: Any, flag: str, words: str
) -> None:
    flags = [flag] if "cuda" in flag else ["--train.device=auto", flag]
    result = cli("train", config_file, "--run", tmp_path / "run", *flags)
    assert result.code == 2 and words in result.err
