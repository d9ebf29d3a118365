"""Speed and memory of `prepare` against the bare tokenizers library on the same text.

    python benchmarks/prepare.py [--megabytes 1000] [--vocab 4096] [--rounds 3]

Makes a .jsonl.zst of so many megabytes of text (uncompressed, UTF-8) out of pieces of the Python
standard library in shuffled order, trains a tokenizer beforehand, and then measures in turn:
`prepare` in a process of its own (its peak memory is sampled from /proc), and
`tokenizers.Tokenizer.encode_batch` alone on the same text, already in memory batch by batch.
"""

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers
import zstandard

from lascaux.config.schema import SourceConfig
from lascaux.data.sources import SourceReader
from lascaux.data.tokenizer import train_tokenizer

RESULTS = Path(__file__).parent / "results" / "prepare.json"
PIECE_CHARS = 4000
BATCH_CHARS = 1 << 20

PREPARE = """
import json, sys
from pathlib import Path
from lascaux.config.schema import DataConfig, SourceConfig, TokenizerConfig
from lascaux.data.prepare import prepare
source, tokenizer, vocab_size, out = sys.argv[1:]
data = DataConfig(sources=(SourceConfig(path=source),))
summary = prepare(data, TokenizerConfig(path=tokenizer), int(vocab_size), Path(out))
print(json.dumps([summary.seconds, summary.text_bytes, summary.train_tokens]))
"""


def make_corpus(path: Path, num_bytes: int) -> int:
    """Write the corpus; returns its bytes of text."""
    pieces = [
        document.text[start : start + PIECE_CHARS]
        for document in SourceReader(SourceConfig()).documents()
        for start in range(0, len(document.text), PIECE_CHARS)
    ]
    draw = random.Random(0)
    written = 0
    with path.open("wb") as file, zstandard.ZstdCompressor().stream_writer(file) as packed:
        while written < num_bytes:
            text = "".join(draw.choices(pieces, k=draw.randint(1, 4)))
            packed.write(json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n")
            written += len(text.encode())
    return written


def run_prepare(folder: Path, vocab_size: int, round_number: int) -> dict[str, float]:
    """`prepare` in its own process: wall time of the process, its own figure, peak memory."""
    out = folder / f"out{round_number}"
    arguments = [folder / "corpus.jsonl.zst", folder / "tokenizer.json", vocab_size, out]
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-c", PREPARE, *map(str, arguments)], stdout=subprocess.PIPE, text=True
    )
    peak = 0
    while process.poll() is None:
        peak = max(peak, resident_bytes(process.pid))
        time.sleep(0.02)
    wall = time.monotonic() - started
    assert process.stdout is not None and process.returncode == 0
    with process.stdout:
        seconds, text_bytes, tokens = json.loads(process.stdout.read())
    return {
        "process_seconds": wall,
        "seconds": seconds,
        "megabytes_per_second": text_bytes / 1e6 / seconds,
        "train_tokens": tokens,
        "peak_resident_bytes": peak,
    }


def resident_bytes(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    high = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")]
    return int(high[0]) * 1024 if high else 0


def batches(path: Path) -> Iterator[list[str]]:
    texts: list[str] = []
    chars = 0
    for document in SourceReader(SourceConfig(path=str(path))).documents():
        texts.append(document.text)
        chars += len(document.text)
        if chars >= BATCH_CHARS:
            yield texts
            texts, chars = [], 0
    if texts:
        yield texts


def run_bare(folder: Path) -> dict[str, float]:
    """The library alone: only the calls of `encode_batch` are timed, not reading the text."""
    inner = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    seconds, text_bytes = 0.0, 0
    for texts in batches(folder / "corpus.jsonl.zst"):
        started = time.monotonic()
        inner.encode_batch(texts, add_special_tokens=False)
        seconds += time.monotonic() - started
        text_bytes += sum(len(text.encode()) for text in texts)
    return {"seconds": seconds, "megabytes_per_second": text_bytes / 1e6 / seconds}


def measure(folder: Path, megabytes: int, vocab_size: int, num_rounds: int) -> dict[str, Any]:
    text_bytes = make_corpus(folder / "corpus.jsonl.zst", megabytes * 1_000_000)
    stdlib = (document.text for document in SourceReader(SourceConfig()).documents())
    train_tokenizer(stdlib, vocab_size, "code").save(folder / "tokenizer.json")
    rounds = []
    for number in range(num_rounds):
        rounds.append(
            {"prepare": run_prepare(folder, vocab_size, number), "bare": run_bare(folder)}
        )
        print(json.dumps(rounds[-1]), file=sys.stderr)

    def median(kind: str) -> float:
        return sorted(each[kind]["megabytes_per_second"] for each in rounds)[num_rounds // 2]

    return {
        "text_bytes": text_bytes,
        "compressed_bytes": (folder / "corpus.jsonl.zst").stat().st_size,
        "vocab_size": vocab_size,
        "cpus": os.cpu_count(),
        "machine": platform.platform(),
        "load_average": os.getloadavg()[0],
        "prepare_megabytes_per_second": median("prepare"),
        "bare_megabytes_per_second": median("bare"),
        "prepare_over_bare": median("prepare") / median("bare"),
        "peak_resident_bytes": max(each["prepare"]["peak_resident_bytes"] for each in rounds),
        "rounds": rounds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3, help="pairs of runs, in turn")
    parser.add_argument("--folder", type=Path, default=None, help="where to work (default: /tmp)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        result = measure(Path(folder), options.megabytes, options.vocab, options.rounds)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "rounds"}, indent=1))


if __name__ == "__main__":
    main()
