"""The step of generating in compiled code, for a model on a CPU: `decode.c`, built when first used.

A step of the model in torch makes some thousand calls for a token, which for models of this size
take longer than reading the weights. The C compiler of the machine builds the code for its own
processor, once, into the user's cache folder.
Shapes: N rows (a token each), P pages, V rows of the vocabulary.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import time
import weakref
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lascaux.errors import LascauxError
from lascaux.generate.pages import PagePool, Row
from lascaux.generate.quantize import QuantizedMatrix
from lascaux.model.moe import MixtureOfExperts
from lascaux.model.positions import alibi_slopes, rotation
from lascaux.model.transformer import Block, FeedForward, Transformer
from lascaux.parallel.runtime import cache_folder

SOURCE, HEADER = (Path(__file__).with_name(name) for name in ("decode.c", "matrix.h"))
COMPILERS = ("cc", "gcc", "clang")
OPTIONS = ("-O3", "-march=native", "-fPIC", "-shared", "-pthread")
MOST_ROWS = 64
MOST_LOST = 0.4
"""of a step's time, in waiting for threads that do not run"""
STEPS_WITH_FEWER = 200
FORMATS = {torch.float32: 0, torch.bfloat16: 1}
ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "relu_squared", "swiglu")
ARRANGEMENTS = ("sequential", "parallel", "parallel_two_norms")


_int, _double, _pointer = ctypes.c_int64, ctypes.c_double, ctypes.c_void_p


class _Matrix(ctypes.Structure):
    _fields_ = [(name, _pointer) for name in ("data", "scale", "bias")] + [
        (name, _int) for name in ("rows", "columns", "format")
    ]


class _Norm(ctypes.Structure):
    _fields_ = [("weight", _pointer), ("bias", _pointer), ("rms", _int), ("eps", _double)]


class _FeedForward(ctypes.Structure):
    _fields_ = [(name, _Matrix) for name in ("up", "gate", "down")] + [("width", _int)]


class _Layer(ctypes.Structure):
    _fields_ = [
        *((n, _Norm) for n in ("norm1", "norm2", "q_norm", "k_norm", "attn_out", "ffn_out")),
        *((name, _Matrix) for name in ("q", "k", "v", "o")),
        *((name, _FeedForward) for name in ("dense", "experts")),
        *((name, _pointer) for name in ("router", "router_bias")),
    ]


class _Network(ctypes.Structure):
    _fields_ = [
        *(
            (name, _int)
            for name in (
                "layers d_model heads kv_heads head_dim rotary_width interleaved arrangement "
                "activation qk_norm_whole num_experts experts_per_token sigmoid normalise "
                "position_offset cache_format pages most_rows threads"
            ).split()
        ),
        ("router_scale", _double),
        ("layer", ctypes.POINTER(_Layer)),
        *((name, _Matrix) for name in ("embedding", "head")),
        *((name, _pointer) for name in ("positions", "slopes")),
        *((name, _Norm) for name in ("embed_norm", "final_norm")),
        *((name, _pointer) for name in ("keys", "values")),
    ]


class _Batch(ctypes.Structure):
    _fields_ = [
        ("rows", _int),
        *((name, _pointer) for name in ("tokens", "positions", "tables")),
        ("table_width", _int),
        *((name, _pointer) for name in ("cos", "sin", "outputs", "logits")),
        ("threads", _int),
    ]


class NativeDecoder:
    """The compiled step over the pages of a pool, with threads of its own; not for several threads.

    Raises: LascauxError where there is no memory for it.
    """

    def __init__(self, weights: "NativeWeights", pool: PagePool) -> None:
        self._weights, self._pool = weights, pool
        self._config, self._threads = weights.config, weights.threads
        self._active, self._steps_left = weights.threads, 0
        self._cos = self._sin = np.zeros((0, 0), dtype=np.float32)
        self._library = library()
        network = _Network.from_buffer_copy(weights.network)
        network.pages = pool.num_pages
        network.cache_format = FORMATS[pool.keys.dtype]
        network.keys, network.values = pool.keys.data_ptr(), pool.values.data_ptr()
        self._decoder = self._library.decoder_open(ctypes.byref(network), weights.widest_hidden)
        if not self._decoder:
            raise LascauxError("there is not enough memory to generate; free some and try again")
        weakref.finalize(self, self._library.decoder_close, self._decoder).atexit = False

    def decode(self, rows: Sequence[Row]) -> NDArray[np.float32]:
        """What comes after each row, (N V); keys and values go to the rows' pages."""
        if len(rows) <= MOST_ROWS:
            return self._decode(rows)
        parts = [rows[i : i + MOST_ROWS] for i in range(0, len(rows), MOST_ROWS)]
        return np.concatenate([self._decode(part) for part in parts])

    def head(self, outputs: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits (N V) of outputs of the final norm (N D), at most MOST_ROWS."""
        outputs = np.ascontiguousarray(outputs)
        return self._step(len(outputs), outputs=outputs)

    def _decode(self, rows: Sequence[Row]) -> NDArray[np.float32]:
        width = max(len(row.table) for row in rows)
        tables = np.zeros((len(rows), width), dtype=np.int64)
        for number, row in enumerate(rows):
            tables[number, : len(row.table)] = row.table
        positions = np.array([row.position for row in rows], dtype=np.int64)
        arrays = {
            "tokens": np.array([row.token for row in rows], dtype=np.int64),
            "positions": positions,
            "tables": tables,
        }
        if self._config.position == "rotary":
            cos, sin = self._angles(int(positions.max()))
            arrays |= {"cos": cos[positions], "sin": sin[positions]}
        return self._step(len(rows), **arrays)

    def _angles(self, position: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Cosines and sines of all positions up to this one, made for twice as many if need be."""
        if position >= len(self._cos):
            positions = torch.arange(2 * position + 1)[None]
            angles = rotation(positions, self._config)
            self._cos, self._sin = (t[0, 0].numpy() for t in angles)
        return self._cos, self._sin

    def _step(self, rows: int, **arrays: NDArray[Any]) -> NDArray[np.float32]:
        logits = np.empty((rows, self._config.vocab_rows), dtype=np.float32)
        batch = _Batch(rows=rows, logits=logits.ctypes.data, threads=self._active)
        for name, array in arrays.items():
            setattr(batch, name, array.ctypes.data)
        if "tables" in arrays:
            batch.table_width = arrays["tables"].shape[1]
        started = time.perf_counter()
        lost = self._library.decoder_step(self._decoder, ctypes.byref(batch))
        self._choose_threads(lost / (time.perf_counter() - started))
        return logits

    def _choose_threads(self, lost: float) -> None:
        """Fewer threads for a while where they had to wait for each other.

        A thread that is not running, because other programs are, holds up all others at each of
        some hundred meetings of a step. How many there are changes no bit.
        """
        if lost > MOST_LOST and self._active > 1:
            self._active, self._steps_left = self._active // 2, STEPS_WITH_FEWER
        elif self._active < self._threads:
            self._steps_left -= 1
            if self._steps_left <= 0:
                self._active = self._threads


class NativeWeights:
    """A model's weights as the compiled step reads them; they stay where the model has them."""

    def __init__(self, model: Transformer, threads: int) -> None:
        library()  # before anything else, as it may not be there
        self.config, self.threads = model.config, threads
        shared = model.config.num_shared_experts * model.config.expert_width
        self.widest_hidden = max(model.config.ffn_width, model.config.expert_width, shared)
        self._kept: list[Any] = [model]
        self.network = self._describe(model)

    def _describe(self, model: Transformer) -> _Network:
        config = self.config
        layers = (_Layer * config.num_layers)(
            *(self._layer(block) for block in model.blocks.values())  # type: ignore[arg-type]
        )
        self._kept.append(layers)
        head = model.embed if config.tie_embeddings else model.head
        bias = getattr(model, "head_bias", None) if config.tie_embeddings else model.head.bias
        network = _Network(
            layers=config.num_layers,
            d_model=config.d_model,
            heads=config.num_heads,
            kv_heads=config.kv_heads,
            head_dim=config.head_width,
            rotary_width=config.rotary_width if config.position == "rotary" else 0,
            interleaved=config.rotary_layout == "interleaved",
            arrangement=ARRANGEMENTS.index(config.block),
            activation=ACTIVATIONS.index(config.activation),
            qk_norm_whole=config.qk_norm == "projection",
            num_experts=config.num_experts,
            experts_per_token=config.experts_per_token if config.num_experts else 0,
            sigmoid=config.router_score == "sigmoid",
            normalise=config.normalises_weights,
            position_offset=config.learned_position_offset,
            most_rows=MOST_ROWS,
            threads=self.threads,
            router_scale=config.router_scale,
            layer=layers,
            embedding=self._matrix(model.embed, None),
            head=self._matrix(head, bias),
            embed_norm=self._norm(model.embed_norm),
            final_norm=self._norm(model.final_norm),
        )
        if config.position == "learned":
            network.positions = self._floats(model.position_embed.weight)
        if config.position == "alibi":
            network.slopes = self._floats(torch.tensor(alibi_slopes(config.num_heads)))
        return network

    def _layer(self, block: Block) -> _Layer:
        attn, ffn = block.attn, block.ffn
        none = nn.Identity()
        layer = _Layer(
            norm1=self._norm(block.norm1),
            norm2=self._norm(getattr(block, "norm2", none)),
            q_norm=self._norm(getattr(attn, "q_norm", none)),
            k_norm=self._norm(getattr(attn, "k_norm", none)),
            attn_out=self._norm(block.attn_out_norm),
            ffn_out=self._norm(block.ffn_out_norm),
            **{name: self._linear(getattr(attn, name)) for name in ("q", "k", "v", "o")},
        )
        dense = ffn
        if isinstance(ffn, MixtureOfExperts):
            dense = ffn.shared
            layer.experts = self._feed_forward(ffn.experts, self.config.expert_width)
            layer.router = self._floats(ffn.router.weight)
            if hasattr(ffn.router, "bias"):
                layer.router_bias = self._floats(ffn.router.bias)
        if isinstance(dense, FeedForward):
            layer.dense = self._feed_forward(dense, _rows(dense.up))
        return layer

    def _feed_forward(self, ffn: nn.Module, width: int) -> _FeedForward:
        gate = getattr(ffn, "gate", None)
        return _FeedForward(
            up=self._linear(ffn.up),  # type: ignore[arg-type]
            gate=_Matrix() if gate is None else self._linear(gate),
            down=self._linear(ffn.down),  # type: ignore[arg-type]
            width=width,
        )

    def _linear(self, module: nn.Module) -> _Matrix:
        return self._matrix(module, getattr(module, "bias", None))

    def _matrix(self, module: nn.Module, bias: Tensor | None) -> _Matrix:
        """A module's weight where it lies; experts' matrices below each other."""
        pointer = None if bias is None else self._floats(bias)
        if isinstance(module, QuantizedMatrix):
            return _Matrix(
                data=module.packed.data_ptr(),
                scale=module.scale.data_ptr(),
                bias=pointer,
                rows=module.packed.shape[0],
                columns=module.columns,
                format=2 if module.bits == 8 else 3,
            )
        weight: Any = module.weight
        assert weight.is_contiguous()
        columns = weight.shape[-1]
        return _Matrix(
            data=weight.data_ptr(),
            bias=pointer,
            rows=weight.numel() // columns,
            columns=columns,
            format=FORMATS[weight.dtype],
        )

    def _norm(self, module: nn.Module) -> _Norm:
        if isinstance(module, nn.Identity):
            return _Norm()
        bias: Any = getattr(module, "bias", None)
        return _Norm(
            weight=self._floats(module.weight),  # type: ignore[arg-type]
            bias=None if bias is None else self._floats(bias),
            rms=isinstance(module, nn.RMSNorm),
            eps=module.eps,  # type: ignore[arg-type]
        )

    def _floats(self, tensor: Tensor) -> int:
        """The address of a copy in fp32."""
        copy = tensor.detach().to(torch.float32).contiguous().clone()
        self._kept.append(copy)
        return copy.data_ptr()


def _rows(module: nn.Module) -> int:
    return module.packed.shape[0] if isinstance(module, QuantizedMatrix) else len(module.weight)  # type: ignore[arg-type]


def suits(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the compiled step computes such a model: on a CPU, in fp32 or bf16."""
    return device.type == "cpu" and dtype in FORMATS


def compiler() -> str | None:
    """The machine's C compiler; None if there is none."""
    return next((path for name in COMPILERS if (path := shutil.which(name))), None)


@cache
def library() -> ctypes.CDLL:
    """The compiled step, built where this is the first use on this kind of processor.

    Raises: LascauxError saying why there is none.
    """
    path = library_path()
    try:
        if not path.exists():
            build(path)
        try:
            loaded = ctypes.CDLL(str(path))
        except OSError:  # damaged, or from a system that is no more
            path.unlink()
            build(path)
            loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise LascauxError(f"the compiled step cannot be kept as {path}: {error}") from error
    loaded.decoder_open.restype = _pointer
    loaded.decoder_open.argtypes = [_pointer, _int]
    loaded.decoder_step.argtypes = [_pointer, _pointer]
    loaded.decoder_close.argtypes = [_pointer]
    loaded.decoder_step.restype, loaded.decoder_close.restype = _double, None
    return loaded


def library_path() -> Path:
    """The shared library in the cache folder, named by all that it depends on."""
    sources = [SOURCE.read_text(), HEADER.read_text()]
    words = [*sources, *OPTIONS, str(compiler()), platform.machine(), _processor()]
    name = hashlib.sha256("\n".join(words).encode()).hexdigest()[:24]
    return cache_folder() / "native" / f"decode-{name}.so"


def build(path: Path) -> None:
    """Compile the step. Raises: LascauxError with what the compiler says; OSError."""
    found = compiler()
    if found is None:
        raise LascauxError("there is no C compiler; install gcc or clang")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        made = Path(scratch) / path.name
        command = [found, *OPTIONS, str(SOURCE), "-o", str(made), "-lm"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise LascauxError(f"{found} cannot build {SOURCE}: {done.stderr.strip()[:500]}")
        os.replace(made, path)


def _processor() -> str:
    """What the processor can do, as far as the system says."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor()
    lines = cpuinfo.read_text().splitlines()
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))
