"""Folders of Hugging Face models in and out, against transformers on both sides."""

import dataclasses
import io
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from lascaux.checkpoint.load import load_tensors
from lascaux.checkpoint.manifest import read_manifest
from lascaux.checkpoint.save import save_checkpoint, whole_pieces
from lascaux.checkpoint.verify import verify_run
from lascaux.config.load import load_config, preset_names, to_tables
from lascaux.config.schema import Config, ModelConfig, TrainConfig
from lascaux.data.tokenizer import Tokenizer, train_tokenizer
from lascaux.errors import ConfigError
from lascaux.exchange import exporting, importing
from lascaux.exchange.choose import choose_family, computed, read_model
from lascaux.exchange.exporting import export_folder
from lascaux.exchange.families import FAMILIES
from lascaux.exchange.importing import import_folder
from lascaux.exchange.settings import Settings
from lascaux.generate.continuation import generate_text
from lascaux.generate.load import LoadedModel, find_checkpoint, load_for_generation
from lascaux.model.accounting import count_parameters
from lascaux.model.init import initialise
from lascaux.model.transformer import Transformer
from lascaux.train.verify import verify_tokenizer
from tests.parity import families
from tests.parity.families import LAYERS, D, F, H, randomised

V = 301
"""rows of every model; the tokenizer has fewer ids"""
CONTEXT = families.CONTEXT
# fp32, logits scaled to 1: both sides round every product, in another order
LOGITS_TOLERANCE = 1e-4
TEXT = "def add(a, b):\n    return a + b  # a sum\n"


@dataclass(frozen=True)
class Case:
    name: str
    make: Callable[[], nn.Module]
    exported_as: str


def small(model: Callable[[Any], nn.Module], config: Callable[..., Any], **settings: Any) -> Any:
    long = dict(hidden_size=D, num_hidden_layers=LAYERS, num_attention_heads=H)
    long |= dict(vocab_size=V, max_position_embeddings=CONTEXT)
    return lambda: model(config(**long | settings))


def in_family(name: str) -> Callable[[], nn.Module]:
    """The model of tests/parity/families.py, with rows for a tokenizer."""

    def make() -> nn.Module:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(families, "V", V)
            (found,) = [family for family in families.FAMILIES if family.name == name]
            return found.reference()

    return make


CASES = [
    *[Case(name, in_family(name), name) for name in "gptj gpt2 gpt_neox opt llama".split()],
    *[Case(name, in_family(name), name) for name in "bloom mixtral olmoe".split()],
    Case(
        "gpt_neo",
        lambda: GPTNeoForCausalLM(
            GPTNeoConfig(
                vocab_size=V,
                hidden_size=64,
                num_layers=2,
                num_heads=4,
                intermediate_size=F,
                max_position_embeddings=CONTEXT,
                attention_types=[[["global", "local"], 1]],
                window_size=CONTEXT,
            )
        ),
        "gpt_neo",
    ),
    Case(
        "neox, one part after the other, tied",
        small(
            GPTNeoXForCausalLM,
            GPTNeoXConfig,
            intermediate_size=F,
            use_parallel_residual=False,
            hidden_act="gelu_new",
            rotary_pct=1.0,
            tie_word_embeddings=True,
        ),
        "gpt_neox",
    ),
    Case(
        "neox without attention biases",
        small(
            GPTNeoXForCausalLM,
            GPTNeoXConfig,
            intermediate_size=F,
            attention_bias=False,
            rotary_pct=0.5,
        ),
        "gpt_neox",
    ),
    Case(
        "opt without biases",
        small(OPTForCausalLM, OPTConfig, ffn_dim=F, enable_bias=False, word_embed_proj_dim=D),
        "opt",
    ),
    Case(
        "bloom of 12 heads",
        lambda: BloomForCausalLM(
            BloomConfig(vocab_size=V, hidden_size=96, n_layer=2, n_head=12, layer_norm_epsilon=1e-6)
        ),
        "bloom",
    ),
    Case(
        "gpt2 with a head of its own",
        small(GPT2LMHeadModel, GPT2Config, n_inner=F, tie_word_embeddings=False),
        "gpt2",
    ),
    Case(
        "llama, tied, biases, wide heads",
        small(
            LlamaForCausalLM,
            LlamaConfig,
            intermediate_size=F,
            num_key_value_heads=1,
            head_dim=16,
            attention_bias=True,
            mlp_bias=True,
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 5e5},
        ),
        "llama",
    ),
    Case(
        "llama stretched as llama 3.1",
        small(
            LlamaForCausalLM,
            LlamaConfig,
            intermediate_size=F,
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 100.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 12,
            },
        ),
        "llama",
    ),
    Case(
        "neox stretched, part of each head",
        small(
            GPTNeoXForCausalLM,
            GPTNeoXConfig,
            intermediate_size=F,
            rope_parameters={
                "rope_type": "linear",
                "rope_theta": 1000.0,
                "factor": 3.0,
                "partial_rotary_factor": 0.5,
            },
        ),
        "gpt_neox",
    ),
    Case(
        "olmoe that divides by the sum",
        small(
            OlmoeForCausalLM,
            OlmoeConfig,
            intermediate_size=24,
            num_key_value_heads=2,
            num_experts=6,
            num_experts_per_tok=2,
            norm_topk_prob=True,
            pad_token_id=None,
            eos_token_id=None,
        ),
        "olmoe",
    ),
]


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer(iter([TEXT * 20, "the words of a text " * 20]), 290)


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO())


def save(model: nn.Module, folder: Path, tokenizer: Tokenizer, **options: Any) -> Path:
    model.save_pretrained(folder, **options)  # type: ignore[operator]
    tokenizer.save(folder / "tokenizer.json")
    return folder


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


def tokens(rows: int = V) -> Tensor:
    return torch.randint(2, rows, (2, 37), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def their_logits(model: nn.Module) -> Tensor:
    return model.eval()(tokens()).logits


def assert_close(got: Tensor, wanted: Tensor) -> None:
    scale = wanted.abs().max()
    assert scale > 1, "a trivial model would prove nothing"
    torch.testing.assert_close(got / scale, wanted / scale, atol=LOGITS_TOLERANCE, rtol=0)


def in_fp32(run: Path) -> LoadedModel:
    return load_for_generation(run, ["--generate.weights=fp32"])


def read_all(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            assert file.metadata()["format"] == "pt"
            found |= {name: file.get_tensor(name) for name in file.keys()}
    return found


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype
        and torch.equal(a[n].contiguous().view(torch.uint8), b[n].contiguous().view(torch.uint8))
        for n in a
    )


def test_an_import_computes_what_transformers_computes(
    case: Case, tmp_path: Path, tokenizer: Tokenizer, console: Console
) -> None:
    model = randomised(case.make())
    wanted = their_logits(model)
    found = import_folder(save(model, tmp_path / "hf", tokenizer), tmp_path / "run", console)
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.ignored_tensors == ()
    # transformers' defaults, which are ids of other tokenizers
    assert all(words.startswith("eos_token_id") for words in found.ignored_settings)
    loaded = in_fp32(tmp_path / "run")
    assert loaded.model.config.vocab_rows == V
    assert loaded.model.config.vocab_size == tokenizer.vocab_size < V
    with torch.no_grad():
        assert_close(loaded.model(tokens()), wanted)
    settings = dataclasses.replace(loaded.settings, max_tokens=8, temperature=0.0)
    text = generate_text(
        loaded.model, loaded.tokenizer, "def", settings, device=torch.device("cpu")
    )
    assert isinstance(text, str)


def test_a_round_trip_changes_no_bit(
    case: Case, tmp_path: Path, tokenizer: Tokenizer, console: Console
) -> None:
    model = randomised(case.make())
    wanted = their_logits(model)
    source, out = save(model, tmp_path / "hf", tokenizer), tmp_path / "out"
    import_folder(source, tmp_path / "run", console)
    found = export_folder(tmp_path / "run", out, console)
    assert (found.family, found.zero_biases) == (case.exported_as, ())
    assert same_bits(read_all(source), read_all(out))
    again = AutoModelForCausalLM.from_pretrained(out)
    assert type(again) is type(model) and again.dtype == torch.float32
    assert torch.equal(their_logits(again), wanted)
    assert AutoTokenizer.from_pretrained(out).encode(TEXT) == tokenizer.encode(TEXT)
    import_folder(out, tmp_path / "run2", console)
    first, second = (find_checkpoint(tmp_path / run) for run in ("run", "run2"))
    assert same_bits(load_tensors(first, "model"), load_tensors(second, "model"))
    configs = [read_manifest(path).state["config"]["model"] for path in (first, second)]
    assert configs[0] == configs[1]


def test_an_imported_run_verifies(tmp_path: Path, tokenizer: Tokenizer, console: Console) -> None:
    import_folder(save(CASES[0].make(), tmp_path / "hf", tokenizer), tmp_path / "run", console)
    findings = [*verify_run(tmp_path / "run"), verify_tokenizer(tmp_path / "run")]
    assert len(findings) == 3 and all(finding.ok for finding in findings)
    config = load_config(str(tmp_path / "run" / "config.toml"))
    saved = read_manifest(find_checkpoint(tmp_path / "run")).state
    assert saved["config"] == json.loads(json.dumps(to_tables(config)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "run"]


def test_settings_for_training_are_kept(
    tmp_path: Path, tokenizer: Tokenizer, console: Console
) -> None:
    source = save(CASES[0].make(), tmp_path / "hf", tokenizer)
    flags = ["--train.steps=7", "--optimizer.lr=1e-4", "--schedule.warmup_steps=2"]
    import_folder(source, tmp_path / "run", console, flags)
    config = load_config(str(tmp_path / "run" / "config.toml"))
    assert (config.train.steps, config.optimizer.lr) == (7, 1e-4)
    with pytest.raises(ConfigError, match="--model.d_ff has no effect on an import"):
        import_folder(source, tmp_path / "other", console, ["--model.d_ff=3"])


def run_of(model: ModelConfig, folder: Path, tokenizer: Tokenizer) -> Transformer:
    """A run folder as training leaves it."""
    network = Transformer(model)
    initialise(network, 0)
    randomised(network)
    train = TrainConfig(steps=200, seq_len=16, batch_tokens=512)
    state = {
        "config": to_tables(Config(model=model, train=train)),
        "tokenizer_sha256": tokenizer.sha256,
    }
    tensors = {"model": whole_pieces({n: p.detach() for n, p in network.named_parameters()})}
    folder.mkdir()
    tokenizer.save(folder / "tokenizer.json")
    save_checkpoint(folder / "checkpoints", step=9, tokens_seen=0, tensors=tensors, state=state)
    return network.eval()


def shrunken(preset: str) -> ModelConfig:
    """A preset with few layers, widths and rows; what it computes stays."""
    model = load_config(preset).model
    group = model.num_heads // model.kv_heads
    tiny = dict(num_layers=2, d_model=64, num_heads=4, vocab_size=V, max_context=CONTEXT)
    tiny |= dict(padded_vocab_size=None, d_ff=None if model.d_ff is None else 96)
    tiny |= dict(num_kv_heads=None if group == 1 else 2)
    tiny |= dict(head_dim=16 if model.attention_width == model.d_model else 24)
    tiny |= dict(rotary_dims=None if model.rotary_dims is None else 4)
    if model.num_experts:
        tiny |= dict(num_experts=8, experts_per_token=min(2, model.experts_per_token))
        tiny |= dict(expert_d_ff=None if model.expert_d_ff is None else 32)
    return dataclasses.replace(model, **tiny)


EXPORTS = {
    "tiny": "gpt_neox",
    "small": "gpt_neox",
    "gptj-6b": "gptj",
    "gpt2-124m": "gpt2",
    "opt-175b": "opt",
    "llama-7b": "llama",
    "mixtral-8x7b": "mixtral",
    "olmoe-1b-7b": "olmoe",
}


def test_the_old_spelling_of_stretched_positions_is_read(
    tmp_path: Path, tokenizer: Tokenizer, console: Console
) -> None:
    (case,) = [case for case in CASES if case.name == "llama stretched as llama 3.1"]
    model = randomised(case.make())
    source = save(model, tmp_path / "hf", tokenizer)
    content = json.loads((source / "config.json").read_text())
    rotary = content.pop("rope_parameters")
    content |= {"rope_theta": rotary.pop("rope_theta"), "rope_scaling": rotary}
    (source / "config.json").write_text(json.dumps(content))
    import_folder(source, tmp_path / "run", console)
    with torch.no_grad():
        assert_close(in_fp32(tmp_path / "run").model(tokens()), their_logits(model))


@pytest.mark.parametrize("preset", [name for name in EXPORTS if name in preset_names()])
def test_a_preset_exports_and_transformers_computes_the_same(
    preset: str, tmp_path: Path, tokenizer: Tokenizer, console: Console
) -> None:
    model = shrunken(preset)
    ours = run_of(model, tmp_path / "run", tokenizer)
    found = export_folder(tmp_path / "run", tmp_path / "hf", console)
    assert found.family == EXPORTS[preset]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    with torch.no_grad():
        assert_close(their_logits(theirs), ours(tokens()))
    import_folder(tmp_path / "hf", tmp_path / "again", console)
    again = in_fp32(tmp_path / "again").model
    with torch.no_grad():
        assert torch.equal(again(tokens()), ours(tokens()))
    if not found.zero_biases:
        assert computed(again.config) == computed(model)
        weights = [load_tensors(find_checkpoint(tmp_path / x), "model") for x in ("run", "again")]
        assert same_bits(*weights)


def test_every_preset_has_a_family_or_a_reason() -> None:
    refused: dict[str, str] = {}
    for preset in preset_names():
        try:
            choose_family(load_config(preset).model)
        except ConfigError as error:
            refused[preset] = str(error)
            assert "\n" not in refused[preset]
    assert "model.moe_every" in refused["switch-base-128"]
    assert "model.head_dim" in refused["gpt3-1.3b"]
    assert EXPORTS.keys() & refused.keys() == set()


def test_a_part_of_each_head_comes_back_whole() -> None:
    """58 / 100 of 100 is 57.999…, which transformers cuts to 57."""
    model = ModelConfig(d_model=200, num_heads=2, rotary_dims=58, activation="gelu")
    assert choose_family(model)[1].rotary_width == 58


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(sandwich_norm=True), "model.sandwich_norm True (gpt_neox has False)"),
        (dict(qk_norm="head"), "model.qk_norm 'head'"),
        (dict(position="none"), "model.position 'none'"),
    ],
)
def test_what_no_family_has_is_named(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        choose_family(ModelConfig(**settings))
    assert words in str(caught.value) and "\n" not in str(caught.value)


GPT2_SMALL = dict(n_embd=768, n_layer=12, n_head=12, n_ctx=1024, n_positions=1024)
GPTJ_6B = dict(n_embd=4096, n_layer=28, n_head=16, n_positions=2048, n_inner=None, rotary_dim=64)
LLAMA_LIKE = dict(hidden_act="silu", max_position_embeddings=4096, rms_norm_eps=1e-5)
PUBLISHED: list[tuple[str, dict[str, Any], int]] = [
    ("gptj", GPTJ_6B | dict(vocab_size=50400, tie_word_embeddings=False), 6_050_882_784),
    ("gpt2", GPT2_SMALL | dict(vocab_size=50257, activation_function="gelu_new"), 124_439_808),
    (
        "gpt_neox",  # Pythia 70M
        dict(hidden_size=512, num_hidden_layers=6, num_attention_heads=8, intermediate_size=2048)
        | dict(vocab_size=50304, max_position_embeddings=2048, rotary_pct=0.25)
        | dict(use_parallel_residual=True, tie_word_embeddings=False, rotary_emb_base=10000),
        70_426_624,
    ),
    (
        "opt",  # 125M
        dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, ffn_dim=3072)
        | dict(vocab_size=50272, max_position_embeddings=2048, word_embed_proj_dim=768)
        | dict(_remove_final_layer_norm=False, do_layer_norm_before=True, prefix="</s>"),
        125_239_296,
    ),
    (
        "bloom",  # 560M
        dict(n_embed=1024, n_layer=24, num_attention_heads=16, vocab_size=250880, seq_length=2048)
        | dict(skip_bias_add=True, pretraining_tp=1, offset_alibi=100),
        559_214_592,
    ),
    (
        "llama",  # SmolLM2 135M
        dict(hidden_size=576, num_hidden_layers=30, num_attention_heads=9, intermediate_size=1536)
        | dict(num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True)
        | dict(rope_theta=100000, rope_scaling=None)
        | LLAMA_LIKE,
        134_515_008,
    ),
    (
        "mixtral",  # 8x7B
        dict(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32)
        | dict(intermediate_size=14336, num_key_value_heads=8, vocab_size=32000)
        | dict(num_local_experts=8, num_experts_per_tok=2, rope_theta=1e6, sliding_window=None)
        | LLAMA_LIKE,
        46_702_792_704,
    ),
    (
        "olmoe",  # 1B-7B
        dict(hidden_size=2048, num_hidden_layers=16, num_attention_heads=16)
        | dict(intermediate_size=1024, num_key_value_heads=16, vocab_size=50304)
        | dict(num_experts=64, num_experts_per_tok=8, norm_topk_prob=False, clip_qkv=None)
        | LLAMA_LIKE,
        6_919_161_856,
    ),
]


@pytest.mark.parametrize(("name", "content", "parameters"), PUBLISHED, ids=lambda x: str(x)[:8])
def test_a_published_config_is_understood(
    name: str, content: dict[str, Any], parameters: int
) -> None:
    settings = Settings(content | {"model_type": name}, Path("config.json"))
    model = read_model(FAMILIES[name], settings)
    assert count_parameters(model).total == parameters
    assert settings.unread() == []
    assert choose_family(model)[0].name == name


def test_several_files_are_read_and_written(
    tmp_path: Path, tokenizer: Tokenizer, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = randomised(in_family("mixtral")())
    source = save(model, tmp_path / "hf", tokenizer, max_shard_size="40KB")
    assert len(list(source.glob("*.safetensors"))) > 3
    monkeypatch.setattr(importing, "FILE_BYTES", 60_000)
    monkeypatch.setattr(exporting, "LARGEST_FILE_BYTES", 50_000)
    import_folder(source, tmp_path / "run", console)
    assert len(list(find_checkpoint(tmp_path / "run").glob("*.safetensors"))) > 3
    found = export_folder(tmp_path / "run", tmp_path / "out", console)
    assert len(found.files) > 3
    assert same_bits(read_all(source), read_all(tmp_path / "out"))
    assert torch.equal(
        their_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), their_logits(model)
    )


@pytest.mark.parametrize(("dtype", "name"), [(torch.bfloat16, "bf16"), (torch.float16, "fp16")])
def test_half_precision_comes_back_as_it_was(
    dtype: torch.dtype, name: str, tmp_path: Path, tokenizer: Tokenizer, console: Console
) -> None:
    source = save(randomised(in_family("llama")()).to(dtype), tmp_path / "hf", tokenizer)
    import_folder(source, tmp_path / "run", console)
    export_folder(tmp_path / "run", tmp_path / "out", console, name)
    assert same_bits(read_all(source), read_all(tmp_path / "out"))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == dtype


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    tensors = change(read_all(folder))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("name", "prefix"),
    [("gpt2", "transformer."), ("bloom", "transformer."), ("opt", "model.")],
)
def test_old_files_without_the_prefix_are_read(
    name: str, prefix: str, tmp_path: Path, tokenizer: Tokenizer, console: Console
) -> None:
    model = randomised(in_family(name)())
    source = save(model, tmp_path / "hf", tokenizer)
    rewrite(source, lambda t: {n.removeprefix(prefix): tensor for n, tensor in t.items()})
    import_folder(source, tmp_path / "run", console)
    with torch.no_grad():
        assert_close(in_fp32(tmp_path / "run").model(tokens()), their_logits(model))


def test_old_buffers_and_a_saved_tied_head_are_left_out(
    tmp_path: Path, tokenizer: Tokenizer, console: Console
) -> None:
    source = save(randomised(in_family("gpt2")()), tmp_path / "hf", tokenizer)
    extra = {
        "transformer.h.0.attn.bias": torch.ones(1, 1, CONTEXT, CONTEXT),
        "transformer.h.0.attn.masked_bias": torch.tensor(-1e4),
    }
    rewrite(source, lambda t: t | extra | {"lm_head.weight": t["transformer.wte.weight"].clone()})
    found = import_folder(source, tmp_path / "run", console)
    assert found.ignored_tensors == ("lm_head.weight", *sorted(extra))
    shutil.rmtree(tmp_path / "run")
    rewrite(source, lambda t: t | {"lm_head.weight": t["transformer.wte.weight"] + 1})
    with pytest.raises(importing.CheckpointError, match="differs from the embedding"):
        import_folder(source, tmp_path / "run", console)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (
            "gpt_neox",
            lambda c: {"rotary_pct": 0.5, "rotary_emb_base": c["rope_parameters"]["rope_theta"]},
        ),
        ("llama", lambda c: {"rope_theta": 1e4, "rope_scaling": None, "head_dim": None}),
        ("mixtral", lambda c: {"rope_theta": 1e6, "head_dim": None, "sliding_window": 4096}),
        ("bloom", lambda c: {"n_embed": c["hidden_size"], "hidden_size": None}),
    ],
)
def test_old_spellings_of_config_json_are_read(
    name: str, change: Any, tmp_path: Path, tokenizer: Tokenizer, console: Console
) -> None:
    model = randomised(in_family(name)())
    source = save(model, tmp_path / "hf", tokenizer)
    content = json.loads((source / "config.json").read_text())
    old = content | change(content)
    old.pop("rope_parameters", None)
    (source / "config.json").write_text(json.dumps(old))
    import_folder(source, tmp_path / "run", console)
    with torch.no_grad():
        assert_close(in_fp32(tmp_path / "run").model(tokens()), their_logits(model))
