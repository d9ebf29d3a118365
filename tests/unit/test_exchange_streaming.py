"""Imports and exports that are killed, that meet each other, and what they hold in memory."""

import fcntl
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from lascaux.checkpoint.load import load_tensors
from lascaux.data.tokenizer import Tokenizer
from lascaux.exchange.exporting import export_folder
from lascaux.exchange.importing import import_folder
from lascaux.generate.load import find_checkpoint
from tests.unit.test_exchange_bad_input import source, tokenizer  # noqa: F401  fixtures

KILLED = """
import io, os, signal, sys
from pathlib import Path
from rich.console import Console
from lascaux.exchange import exporting, importing
module = {"import": importing, "export": exporting}[sys.argv[1]]
name = {"import": "write_part", "export": "encode"}[sys.argv[1]]
setattr(module, name, lambda *arguments: os.kill(os.getpid(), signal.SIGKILL))
run = {"import": importing.import_folder, "export": exporting.export_folder}[sys.argv[1]]
run(Path(sys.argv[2]), Path(sys.argv[3]), Console(file=io.StringIO()))
"""
MEASURED = """
import io, sys
from pathlib import Path
from rich.console import Console
from lascaux.exchange import exporting, importing, folder

def status(key):
    text = Path("/proc/self/status").read_text()
    return int(text.split(key + ":")[1].split()[0]) << 10

importing.FILE_BYTES = 8 << 20
work = Path(sys.argv[1])
console = Console(file=io.StringIO())
importing.import_folder(work / "tiny", work / "tiny_run", console)  # libraries come in
exporting.export_folder(work / "tiny_run", work / "tiny_out", console, "bf16")
base = status("VmRSS")
importing.import_folder(work / "hf", work / "run", console)
print(status("VmHWM") - base)
exporting.export_folder(work / "run", work / "out", console, "bf16")
print(status("VmHWM") - base)
"""


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO())


def killed(command: str, source: Path, out: Path) -> None:  # noqa: F811
    done = subprocess.run([sys.executable, "-c", KILLED, command, str(source), str(out)])
    assert done.returncode == -signal.SIGKILL


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_a_killed_import_or_export_left_goes_with_the_next_one(
    source: Path,  # noqa: F811
    console: Console,
) -> None:
    place = source.parent
    killed("import", source, place / "run")
    assert names(place)[0].startswith(".tmp_run_") and names(place)[1:] == ["hf"]
    import_folder(source, place / "run", console)
    assert names(place) == ["hf", "run"]
    killed("export", place / "run", place / "out")
    assert names(place)[0].startswith(".tmp_out_") and names(place)[1:] == ["hf", "run"]
    export_folder(place / "run", place / "out", console)
    assert names(place) == ["hf", "out", "run"]
    import_folder(place / "out", place / "again", console)
    runs = [load_tensors(find_checkpoint(place / run), "model") for run in ("run", "again")]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_what_somebody_is_writing_and_what_others_have_is_left_alone(
    source: Path,  # noqa: F811
    console: Console,
) -> None:
    place = source.parent
    kept = [".tmp_run_0123abcd", ".tmp_run_notes", ".tmp_other_0123abcd", ".tmp_running_0123abcd"]
    for name in kept:
        (place / name).mkdir()
    (place / ".tmp_run_00000001").touch()
    (place / ".tmp_run_00000002").symlink_to(place / "hf")
    held = os.open(place / kept[0], os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    import_folder(source, place / "run", console)
    left = sorted([*kept, ".tmp_run_00000001", ".tmp_run_00000002", "hf", "run"])
    assert names(place) == left
    os.close(held)


def test_memory_holds_the_largest_tensor_and_a_little(
    tmp_path: Path,
    tokenizer: Tokenizer,  # noqa: F811
) -> None:
    """A model of 260 MB in fp32 whose largest tensor has 16 MB."""
    total = make_folder(tmp_path / "hf", tokenizer, layers=5, width=1024)
    make_folder(tmp_path / "tiny", tokenizer, layers=1, width=64)
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(tmp_path)], capture_output=True, text=True, check=True
    )
    imported, exported = (int(line) for line in done.stdout.split())
    assert total > 250e6
    # a tensor twice over, a file of 8 MB, 8 MB on the way, and what malloc keeps
    assert imported < total / 2.5 and exported < total / 2.5


def make_folder(
    folder: Path,
    tokenizer: Tokenizer,  # noqa: F811
    layers: int,
    width: int,
    rows: int = 300,
) -> int:
    """A llama of ones in bf16; returns its bytes in fp32."""
    wider = 4 * width
    folder.mkdir()
    content = {
        "model_type": "llama",
        "vocab_size": rows,
        "hidden_size": width,
        "hidden_act": "silu",
    }
    content |= {"intermediate_size": wider, "num_hidden_layers": layers, "rms_norm_eps": 1e-6}
    content |= {"num_attention_heads": 8, "max_position_embeddings": 64}
    (folder / "config.json").write_text(json.dumps(content))
    tokenizer.save(folder / "tokenizer.json")
    shapes = {"model.embed_tokens": (rows, width), "lm_head": (rows, width), "model.norm": (width,)}
    for i in range(layers):
        layer = f"model.layers.{i}."
        shapes |= {f"{layer}self_attn.{x}_proj": (width, width) for x in "qkvo"}
        shapes |= {f"{layer}mlp.{x}_proj": (wider, width) for x in ("gate", "up")}
        shapes |= {f"{layer}mlp.down_proj": (width, wider), f"{layer}input_layernorm": (width,)}
        shapes |= {f"{layer}post_attention_layernorm": (width,)}
    weights = {f"{n}.weight": torch.ones(shape).bfloat16() for n, shape in shapes.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return 4 * sum(tensor.numel() for tensor in weights.values())
