"""`lascaux prove` agrees where layouts are right and finds planted faults; its dry run is true."""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

import lascaux.parallel.apply as apply
import lascaux.parallel.context as context
import lascaux.parallel.pipeline as pipeline
import lascaux.parallel.split as split
from lascaux.cli import run_command
from lascaux.config.load import load_config, preset_names
from lascaux.errors import ConfigError
from lascaux.model.accounting import count_parameters
from lascaux.parallel.layout import Layout, check_layout, resolve_layout
from lascaux.parallel.plan import Row, tensor_plan
from lascaux.parallel.world import World
from lascaux.prove.dry_run import dry_run
from lascaux.prove.processes import prove_here
from lascaux.prove.shrink import shrink
from tests.distributed.test_layouts import make_config


@pytest.mark.parametrize("preset", preset_names())
@pytest.mark.parametrize(
    "axes", [dict(tp=4), dict(pp=4), dict(cp=2, dp_replicate=2), dict(tp=2, pp=2, cp=2)], ids=str
)
def test_every_preset_shrinks_to_what_fits_its_layout(preset: str, axes: dict[str, int]) -> None:
    config = load_config(preset, [f"--parallel.{axis}={size}" for axis, size in axes.items()])
    layout = Layout(**axes)
    rows = -(-config.model.vocab_size // layout.tp) * layout.tp
    model = dataclasses.replace(config.model, padded_vocab_size=rows)
    if layout.cp > 1:  # a capacity and jitter are of whole micro-batches
        model = dataclasses.replace(model, capacity_factor=None, router_jitter=0.0)
    if layout.tp > 1 and model.qk_norm == "projection":  # tp cannot split that norm
        model = dataclasses.replace(model, qk_norm="head")
    small, small_layout = shrink(dataclasses.replace(config, model=model), layout)
    check_layout(small, small_layout)
    assert count_parameters(small.model).total < (12_000_000 if model.num_experts else 1_000_000)
    for field in dataclasses.fields(model):
        before, after = getattr(model, field.name), getattr(small.model, field.name)
        if isinstance(before, bool | str):
            assert before == after, field.name


def test_a_layout_too_wide_for_this_machine_is_split_in_two() -> None:
    config = load_config("gpt3-175b", ["--parallel.tp=8", "--parallel.pp=16"])
    _, small = shrink(config, Layout(pp=16, dp_shard=8, tp=8))
    assert small == Layout(pp=2, dp_shard=2, tp=2)


def test_a_right_layout_agrees(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--parallel.tp=2", "--train.precision=bf16", "--data.document_boundaries=respect"]
    assert run_command(["prove", "--json", "--train.microbatch_seqs=8", *flags]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [c["trial"]["optimizer"] for c in found["comparisons"]] == ["sgd", "muon", "sgd"]
    for comparison in found["comparisons"][:2]:
        assert max(comparison[k] for k in ("losses", "grad_norms", "weights")) < 1e-10
    assert {record["axis"] for record in found["traffic"]} == {"tp"}
    assert run_command(["prove", "gptj-6b", "--parallel.tp=2", "--parallel.pp=2"]) == 0
    assert "trains the same model" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch.compile looks at local weights
def test_compiled_blocks_agree_under_every_axis() -> None:
    flags = ["--parallel.tp=2", "--parallel.dp_shard=2", "--train.compile=true"]
    assert run_command(["prove", "small", *flags, "--model.num_layers=2"]) == 0
    flags = ["--parallel.cp=2", "--parallel.pp=2", "--train.compile=true"]
    assert run_command(["prove", "small", *flags, "--model.num_layers=2"]) == 0


def forget_a_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split, "add_tensor_parallel_gradients", lambda *_: None)


def average(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = apply.shard_weights

    def averaged(model: Any, *rest: Any) -> None:
        kept(model, *rest)
        for module in model.modules():
            if hasattr(module, "set_gradient_divide_factor"):
                module.set_gradient_divide_factor(2.0)

    monkeypatch.setattr(apply, "shard_weights", averaged)


def count_own_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(World, "count_targets", lambda self, own: own)


def see_the_future(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context.Context, "whole", lambda self, gathered, dim: gathered)


def start_stages_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = pipeline.make_stage

    def alike(config: Any, layers: range, first: bool, last: bool) -> Any:
        return kept(config, range(len(layers)) if not first else layers, first, last)

    monkeypatch.setattr(pipeline, "make_stage", alike)


def miss_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows(model: Any) -> tuple[Row, ...]:
        found = tensor_plan(model)
        return tuple(
            dataclasses.replace(row, after="gather") if row.pattern == "blocks.*.ffn" else row
            for row in found
        )

    monkeypatch.setattr(apply, "tensor_plan", rows)


FAULTS: list[tuple[Callable[[pytest.MonkeyPatch], None], dict[str, int]]] = [
    (forget_a_sum, dict(tp=2)),
    (average, dict(dp_shard=2)),
    (average, dict(dp_replicate=2)),
    (count_own_targets, dict(dp_replicate=2)),
    (see_the_future, dict(cp=2)),
]


@pytest.mark.parametrize(("fault", "axes"), FAULTS, ids=str)
def test_a_planted_fault_is_found(
    fault: Callable[[pytest.MonkeyPatch], None],
    axes: dict[str, int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fault(monkeypatch)
    flags = [f"--parallel.{axis}={size}" for axis, size in axes.items()]
    assert run_command(["prove", "gpt2-124m", *flags, "--model.padded_vocab_size=50258"]) == 1
    assert "TRAINS ANOTHER MODEL" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("fault", "flag", "words"),
    [
        (start_stages_alike, "--parallel.pp=2", "elements are on no process"),
        (miss_a_row, "--parallel.tp=2", "process 0 of the layout failed"),
    ],
)
def test_a_fault_that_breaks_the_run_is_told(
    fault: Callable[[pytest.MonkeyPatch], None],
    flag: str,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fault(monkeypatch)
    with pytest.raises((AssertionError, RuntimeError), match=words):
        run_command(["prove", "gpt2-124m", flag, "--model.padded_vocab_size=50258"])


@pytest.mark.parametrize(
    ("preset", "processes", "flags"),
    [
        ("gptj-6b", 256, ["--parallel.tp=8"]),
        (
            "gpt3-175b",
            1024,
            ["--parallel.tp=8", "--parallel.pp=16", "--model.padded_vocab_size=50264"],
        ),
    ],
)
def test_a_large_model_builds_on_many_processes(
    preset: str, processes: int, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    size = ["--processes", str(processes)]
    assert run_command(["prove", preset, "--dry-run", "--json", *size, *flags]) == 0
    found = json.loads(capsys.readouterr().out)["processes"]
    assert len(found) == (3 if "pp" in str(flags) else 1)
    for process in found:
        assert process["measured_over_predicted"] == pytest.approx(1, rel=0.01)
        assert process["weights_bytes"] == 4 * process["parameters"]
        assert {record["axis"] for record in process["traffic"]} >= {"fsdp", "tp"}
    config = load_config(preset, flags)
    total = count_parameters(config.model).total
    mean = sum(p["parameters"] for p in found) / len(found)
    assert total / processes < mean < 1.15 * total / processes


@pytest.mark.parametrize(
    "axes",
    [dict(dp_shard=2, tp=2), dict(dp_replicate=2, cp=2), dict(pp=2, tp=2), dict(dp_shard=4)],
    ids=str,
)
def test_a_dry_run_says_what_a_real_one_says(axes: dict[str, int]) -> None:
    """Except all-reduces, of which the real one has some for single numbers."""
    config = make_config("sequential", **axes)
    layout = resolve_layout(config, 4)
    real = prove_here(config, layout)
    dry = dry_run(config, layout)[0]

    def exchanges(table: Any) -> dict[Any, int]:
        return {key: n.times for key, n in table.items() if key[1] != "all-reduce"}

    assert exchanges(dry.traffic) == exchanges(real.traffic)
    whole = count_parameters(config.model).total
    assert dry.parameters == pytest.approx(
        whole / 4 * (2 if "dp_replicate" in axes else 1), rel=0.2
    )


def test_what_passes_keep_is_counted() -> None:
    """With recomputation a network keeps little more than the inputs of its blocks."""
    config = make_config("tied", dp_shard=2)
    again = dataclasses.replace(config.train, recompute="block")
    layout = resolve_layout(config, 2)
    (plain,), (lean,) = (
        dry_run(config, layout),
        dry_run(dataclasses.replace(config, train=again), layout),
    )
    tokens = config.train.microbatch_seqs * config.train.seq_len
    stream = tokens * config.model.d_model * torch.float32.itemsize
    assert lean.kept_bytes < plain.kept_bytes / 2
    assert lean.kept_bytes > (config.model.num_layers + 1) * stream


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "ask for one, such as"),
        (["--processes", "1"], "nothing to compare with"),
        (["--parallel.tp=3"], "does not divide model.num_heads"),
        (["--parallel.tp=2", "--processes", "3"], "needs a multiple of 2 processes"),
        (["--parallel.tp=2", "--train.precision=fp16"], "fp16 is for one process"),
    ],
)
def test_what_cannot_be_proved_is_refused(arguments: list[str], words: str) -> None:
    for kind in ([], ["--dry-run"]):
        with pytest.raises(ConfigError, match=words):
            run_command(["prove", *kind, *arguments])
