"""`prepare` killed at random instants: no folder that opens, and the next run is as if new."""

import hashlib
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lascaux.data.shards import open_prepared
from lascaux.errors import DataError

KILLS = 10

PROGRAM = """
import sys, time
from pathlib import Path
from lascaux.config.schema import DataConfig, SourceConfig, TokenizerConfig
from lascaux.data import prepare as module, writer
module.BATCH_CHARS = 20_000
writer.SHARD_TOKENS = 20_000
data = DataConfig(sources=(SourceConfig(path="corpus.jsonl"),), valid_fraction=0.1)
print("ready", flush=True)
started = time.monotonic()
module.prepare(data, TokenizerConfig(), 500, Path(sys.argv[1]))
print(time.monotonic() - started)
"""


def start(folder: Path, out: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, out], cwd=folder, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def tree_hash(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def test_killed_prepare_leaves_nothing_that_opens_and_reruns_to_the_same_tree(tmp_path: Path):
    draw = random.Random(0)
    words = [f"word{n}" for n in range(300)]
    with (tmp_path / "corpus.jsonl").open("w") as file:
        for _ in range(3000):
            file.write(json.dumps({"text": " ".join(draw.choices(words, k=100))}) + "\n")

    with start(tmp_path, "reference") as process:
        seconds = float(process.communicate()[0])
    assert process.returncode == 0
    reference = tree_hash(tmp_path / "reference")

    killed = 0
    for number in range(KILLS):
        with start(tmp_path, "out") as process:
            time.sleep(seconds * (number + draw.random()) / KILLS)
            process.kill()
            process.wait()
        if (tmp_path / "out").exists():  # it had finished before the kill
            assert tree_hash(tmp_path / "out") == reference
            for path in (tmp_path / "out").iterdir():
                path.unlink()
            (tmp_path / "out").rmdir()
            continue
        killed += 1
        with pytest.raises(DataError):
            open_prepared(tmp_path / "out")
    assert killed >= KILLS // 2

    with start(tmp_path, "out") as process:
        process.communicate()
    assert process.returncode == 0
    assert tree_hash(tmp_path / "out") == reference
    open_prepared(tmp_path / "out").check_hashes()
    assert sorted(os.listdir(tmp_path)) == ["corpus.jsonl", "out", "reference"]
