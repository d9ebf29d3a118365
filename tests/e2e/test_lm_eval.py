"""lm_eval over HTTP gives the numbers of a computation in process, without any network."""

import json
import math
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from lascaux.generate.load import LoadedModel, load_for_generation
from tests.conftest import SMALL_RUN
from tests.e2e.serving import serving

pytestmark = pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm_eval is not installed")

KEY = "k-eval"
CHOICES = [
    {
        "question": f"add({a}, {b}) =",
        "choices": [f"{a + b}", f"{a + b + 1}", "# file", "a much longer answer"][: 2 + a % 3],
        "answer": 0,
    }
    for a, b in [(1, 2), (3, 4), (10, 11), (7, 5), (2, 2), (15, 3), (9, 9), (0, 1), (4, 13)]
]
TEXTS = [{"text": "".join(f"add({i}, {j}) = {i + j}\n" for i in range(j + 1))} for j in (1, 5, 9)]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
output_type: {kind}
metadata: {{version: 1}}
{rest}
"""
CHOICE_REST = """
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
ROLLING_REST = """
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: byte_perplexity}, {metric: bits_per_byte}]
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    from lascaux.cli import run_command

    folder = tmp_path_factory.mktemp("lm_eval")
    config = folder / "small.toml"
    config.write_text(SMALL_RUN.format(corpus=corpus))
    assert run_command(["train", str(config), "--run", str(folder / "run")]) == 0
    return folder / "run"


def write_tasks(folder: Path) -> None:
    for name, kind, documents, rest in (
        ("sums_choice", "multiple_choice", CHOICES, CHOICE_REST),
        ("sums_rolling", "loglikelihood_rolling", TEXTS, ROLLING_REST),
    ):
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(each) + "\n" for each in documents))
        task = TASK.format(name=name, kind=kind, path=path, rest=rest)
        (folder / f"{name}.yaml").write_text(task)


def score(loaded: LoadedModel, context: list[int], target: list[int]) -> tuple[float, bool]:
    """Log-probability of the target, and whether it is what a greedy reader would say."""
    tokens = torch.tensor([context + target])
    with torch.inference_mode():
        logits = loaded.model.unembed(loaded.model.residual(tokens[:, :-1]))[0].double()
    rows = torch.log_softmax(logits[:, : loaded.tokenizer.vocab_size], -1)[-len(target) :]
    wanted = torch.tensor(target)
    chosen = rows[torch.arange(len(target)), wanted]
    return float(chosen.sum()), bool((rows.argmax(-1) == wanted).all())


def expected(loaded: LoadedModel, max_length: int) -> dict[str, list[Any]]:
    """What lm_eval should find: its own splitting of texts, our network in process."""
    encode, end = loaded.tokenizer.encode, loaded.tokenizer.end_of_text_id
    choices = []
    for document in CHOICES:
        found = []
        for choice in document["choices"]:
            context = encode(document["question"])
            whole = encode(f"{document['question']} {choice}")
            found.append(score(loaded, context, whole[len(context) :]))
        choices.append(found)
    rolling = []
    for document in TEXTS:
        tokens, total = encode(document["text"]), 0.0
        window = max_length - 2  # lm_eval's own count, less the token it has generated
        first, rest = tokens[:window], tokens[window:]
        total += score(loaded, [end], first)[0]
        done = len(first)
        while rest:
            part, rest = rest[:window], rest[window:]
            done += len(part)
            context = tokens[max(0, done - window - 1) : done - len(part)]
            total += score(loaded, context, part)[0]
        rolling.append(total)
    return {"sums_choice": choices, "sums_rolling": rolling}


def lm_eval(tmp_path: Path, *arguments: str) -> str:
    offline = {
        name: "1" for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
    }
    environment = os.environ | offline | {"HF_HOME": str(tmp_path / "hf"), "OPENAI_API_KEY": KEY}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def check(found: dict[str, Any], wanted: dict[str, list[Any]]) -> None:
    for document, resps in found["samples"]["sums_choice"]:
        for (value, greedy), (our_value, our_greedy) in zip(
            resps, wanted["sums_choice"][document], strict=True
        ):
            assert float(value) == pytest.approx(our_value, abs=1e-4)
            assert (greedy in (True, "True")) == our_greedy
    for document, resps in found["samples"]["sums_rolling"]:
        (value,) = resps
        assert float(value) == pytest.approx(wanted["sums_rolling"][document], abs=1e-4)
    bits = found["results"]["sums_rolling"]["bits_per_byte,none"]
    num_bytes = sum(len(document["text"].encode()) for document in TEXTS)
    assert bits == pytest.approx(-sum(wanted["sums_rolling"]) / num_bytes / math.log(2), abs=1e-4)


def test_lm_eval_agrees_with_the_network_in_process(run: Path, tmp_path: Path) -> None:
    """Batches of 1 and 8, one and four requests at once, without and with a key."""
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    write_tasks(tasks)
    keys = tmp_path / "keys"
    keys.write_text(f"{KEY}\n")
    fp32 = "--generate.weights=fp32"
    loaded = load_for_generation(run, [fp32])
    max_length = loaded.model.config.max_context
    wanted = expected(loaded, max_length)
    with serving(run, fp32) as free, serving(run, fp32, f"--serve.api_keys_file={keys}") as locked:
        plain = f"model=run,base_url={free.url}/v1/completions,max_length={max_length}"
        keyed = plain.replace(free.url, locked.url) + f",auth_token={KEY}"
        jobs = [
            {"batch_size": batch_size, "model_args": f"{arguments},num_concurrent={at_once}"}
            for arguments, batch_size, at_once in (
                (plain, 1, 1),
                (plain, 8, 1),
                (plain, 1, 4),
                (keyed, 8, 4),
                (keyed, 1, 1),
            )
        ]
        file = tmp_path / "jobs.json"
        names = list(wanted)
        file.write_text(json.dumps({"tasks": str(tasks), "names": names, "jobs": jobs}))
        client = str(Path(__file__).with_name("lm_eval_client.py"))
        found = json.loads(lm_eval(tmp_path, client, str(file)).splitlines()[-1])
    assert len(found) == len(jobs)
    for each in found:
        check(each, wanted)
