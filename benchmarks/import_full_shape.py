"""GPT-J 6B's shape in and out: bytes, seconds and memory of `lascaux import` and `export`.

Writes 12 GB of pseudo-random bf16 in three shards, imports them (24 GB in fp32), checks a sample of
the run bit by bit, exports as bf16 and compares every tensor with the source bit by bit. Needs 49
GB of disk at its peak and deletes everything at the end.

    python benchmarks/import_full_shape.py [--layers 28] [--folder DIR]
"""

import argparse
import io
import json
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from safetensors import safe_open

from lascaux.checkpoint.load import load_slabs
from lascaux.data.tokenizer import train_tokenizer
from lascaux.exchange.exporting import export_folder
from lascaux.exchange.importing import import_folder
from lascaux.generate.load import find_checkpoint

D, F, V, HEADS, ROTARY, CONTEXT = 4096, 16384, 50400, 16, 64, 2048
SHARD_BYTES = 4_500_000_000
CHUNK = 4 << 20
SAMPLES = 12


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """Every tensor of a GPT-J folder."""
    found: dict[str, tuple[int, ...]] = {"transformer.wte.weight": (V, D)}
    for i in range(layers):
        layer = f"transformer.h.{i}."
        found |= {f"{layer}ln_1.{kind}": (D,) for kind in ("weight", "bias")}
        found |= {f"{layer}attn.{x}_proj.weight": (D, D) for x in ("q", "k", "v", "out")}
        found |= {f"{layer}mlp.fc_in.weight": (F, D), f"{layer}mlp.fc_in.bias": (F,)}
        found |= {f"{layer}mlp.fc_out.weight": (D, F), f"{layer}mlp.fc_out.bias": (D,)}
    found |= {f"transformer.ln_f.{kind}": (D,) for kind in ("weight", "bias")}
    return found | {"lm_head.weight": (V, D), "lm_head.bias": (V,)}


def numbers(number: int, count: int) -> Iterator[np.ndarray]:
    """The bits of a tensor in bf16, below 2 in size so that none is infinite or no number."""
    draw = np.random.SFC64(number)
    for first in range(0, count, CHUNK):
        size = min(CHUNK, count - first)
        words = draw.random_raw(-(-size // 4)).view(np.uint16)[:size]
        yield words & np.uint16(0xBFFF)


def write_folder(folder: Path, layers: int) -> int:
    """A Hugging Face folder in shards; returns the bytes of its tensors."""
    folder.mkdir(parents=True)
    wanted = shapes(layers)
    order = {name: number for number, name in enumerate(wanted)}
    parts: list[dict[str, tuple[int, ...]]] = [{}]
    held = 0
    for name, shape in wanted.items():
        size = 2 * math.prod(shape)
        if held + size > SHARD_BYTES:
            parts.append({})
            held = 0
        parts[-1][name] = shape
        held += size
    placed: dict[str, str] = {}
    for number, part in enumerate(parts, start=1):
        file_name = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, shape in part.items():
            begin, end = end, end + 2 * math.prod(shape)
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
            placed[name] = file_name
        text = json.dumps(header).encode()
        with open(folder / file_name, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name, shape in part.items():
                for chunk in numbers(order[name], math.prod(shape)):
                    file.write(chunk.tobytes())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    config = {"model_type": "gptj", "vocab_size": V, "n_positions": CONTEXT, "n_embd": D}
    config |= {"n_layer": layers, "n_head": HEADS, "rotary_dim": ROTARY, "n_inner": None}
    (folder / "config.json").write_text(json.dumps(config))
    train_tokenizer(iter(["the words of a text " * 20]), 300).save(folder / "tokenizer.json")
    return 2 * sum(map(math.prod, wanted.values()))


def memory(key: str) -> int:
    """VmRSS: bytes in memory now; VmHWM: the most since `forget_peak`."""
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{key}:")[1].split()[0]) << 10


def measured(work: Callable[[], object]) -> tuple[float, int]:
    """Seconds, and the most bytes in memory above those before."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, started = memory("VmRSS"), time.perf_counter()
    work()
    return time.perf_counter() - started, memory("VmHWM") - before


def check_run(run: Path, layers: int) -> int:
    """Compare a sample of the run's tensors with what was drawn; returns how many."""
    names = list(shapes(layers))
    ours = {
        "transformer.wte.weight": "embed.weight",
        "lm_head.bias": "head.bias",
        f"transformer.h.{layers - 1}.mlp.fc_out.weight": f"blocks.{layers - 1}.ffn.down.weight",
    }
    for i in range(0, layers, max(1, layers // (SAMPLES - len(ours)))):
        ours[f"transformer.h.{i}.attn.q_proj.weight"] = f"blocks.{i}.attn.q.weight"
    checkpoint = find_checkpoint(run)
    for theirs, name in ours.items():
        shape = shapes(layers)[theirs]
        slab = {name: tuple(slice(0, size) for size in shape)}
        tensor = load_slabs(checkpoint, "model", slab)[name].reshape(-1).view(torch.int32)
        first = 0
        for bits in numbers(names.index(theirs), tensor.numel()):
            found = tensor[first : first + len(bits)].numpy().view(np.uint32)
            assert np.array_equal(found, bits.astype(np.uint32) << 16), theirs
            first += len(bits)
    return len(ours)


def compare(out: Path, layers: int) -> int:
    """Compare every tensor of the export with what was drawn; returns how many."""
    wanted = shapes(layers)
    count = 0
    for path in sorted(out.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                tensor = file.get_tensor(name)
                assert tensor.dtype == torch.bfloat16 and tuple(tensor.shape) == wanted[name], name
                flat, first = tensor.reshape(-1).view(torch.int16).numpy().view(np.uint16), 0
                for bits in numbers(list(wanted).index(name), len(flat)):
                    assert np.array_equal(flat[first : first + len(bits)], bits), name
                    first += len(bits)
                count += 1
    assert count == len(wanted)
    return count


def main() -> None:
    """Measure, print one JSON object, leave nothing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--folder", type=Path, help="where to work; default: a temporary folder")
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="full_shape_", dir=options.folder))
    try:
        print(json.dumps(exercise(work, options.layers), indent=2))
    finally:
        shutil.rmtree(work)


def exercise(work: Path, layers: int) -> dict[str, Any]:
    """Make, import, check, export, compare."""
    console = Console(file=io.StringIO())
    weight_bytes = sum(map(math.prod, shapes(layers).values()))
    free = shutil.disk_usage(work).free
    if free < 8.2 * weight_bytes:
        raise SystemExit(
            f"needs {8.2 * weight_bytes / 1e9:.0f} GB in {work}, free {free / 1e9:.0f}"
        )
    started = time.perf_counter()
    source_bytes = write_folder(work / "hf", layers)
    made = time.perf_counter() - started
    reading, read_peak = measured(lambda: import_folder(work / "hf", work / "run", console))
    sampled = check_run(work / "run", layers)
    writing, written_peak = measured(
        lambda: export_folder(work / "run", work / "out", console, "bf16")
    )
    compared = compare(work / "out", layers)
    return {
        "layers": layers,
        "parameters": weight_bytes,
        "source_bytes": source_bytes,
        "largest_tensor_fp32_bytes": 4 * V * D,
        "make_seconds": round(made, 1),
        "import_seconds": round(reading, 1),
        "import_peak_bytes": read_peak,
        "tensors_sampled_bit_by_bit": sampled,
        "export_seconds": round(writing, 1),
        "export_peak_bytes": written_peak,
        "tensors_compared_bit_by_bit": compared,
    }


if __name__ == "__main__":
    main()
