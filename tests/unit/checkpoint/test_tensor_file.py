"""The safetensors format, ours against the library's and against files that lie."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from lascaux.checkpoint.tensor_file import CHUNK_BYTES, DTYPES, decode, encode, encoded_bytes
from lascaux.errors import CheckpointError
from tests.unit.checkpoint.builders import same_bits

PATH = Path("model.safetensors")


def encoded(tensors: dict[str, torch.Tensor]) -> bytearray:
    return bytearray(b"".join(encode(tensors)))


def one_of_each() -> dict[str, torch.Tensor]:
    noise = torch.randint(0, 256, (512,), dtype=torch.uint8, generator=torch.manual_seed(1))
    tensors = {
        f"layer.{name}": (noise % 2).bool() if dtype == torch.bool else noise.view(dtype)
        for name, dtype in DTYPES.items()
    }
    base = torch.arange(60, dtype=torch.float32).reshape(3, 4, 5)
    shared = torch.arange(10, dtype=torch.int16)
    return tensors | {
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 7, dtype=torch.float16),
        "transposed": base.permute(2, 0, 1),
        "strided": base[:, ::2, 1:],
        "expanded": torch.tensor([1.0, -0.0]).expand(5, 2),
        "special": torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]),
        "tied.a": shared,
        "tied.b": shared,
        "tied.part": shared[3:7],
        "parameter": torch.nn.Parameter(base),
        'name with é and "quotes"': torch.ones(3, dtype=torch.uint8),
    }


def test_every_dtype_layout_and_sharing_round_trips_to_the_bit():
    tensors = one_of_each()
    assert same_bits(decode(PATH, encoded(tensors)), tensors)


def test_the_size_is_known_beforehand():
    tensors = one_of_each()
    assert encoded_bytes(tensors) == len(encoded(tensors))


def test_the_library_reads_our_files():
    tensors = one_of_each()
    assert same_bits(safetensors.torch.load(bytes(encoded(tensors))), tensors)


def test_we_read_the_librarys_files():
    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in one_of_each().items()}
    theirs = bytearray(safetensors.torch.save(tensors, metadata={"format": "pt"}))
    assert same_bits(decode(PATH, theirs), tensors)


def test_the_order_in_which_tensors_are_given_does_not_show():
    tensors = one_of_each()
    assert encoded(tensors) == encoded(dict(reversed(tensors.items())))


def test_no_tensors_make_a_file_too():
    assert decode(PATH, encoded({})) == {}


def test_large_tensors_come_in_chunks_without_a_copy():
    tensor = torch.zeros(3 * CHUNK_BYTES + 5, dtype=torch.uint8)
    chunks = list(encode({"x": tensor}))
    assert [len(chunk) for chunk in chunks[1:]] == [CHUNK_BYTES] * 3 + [5]
    tensor[0] = 7
    assert chunks[1][0] == 7


def test_loaded_tensors_can_be_written_to():
    loaded = decode(PATH, encoded({"x": torch.ones(3), "y": torch.ones(3)}))
    loaded["x"].add_(1)
    assert loaded["x"].tolist() == [2, 2, 2] and loaded["y"].tolist() == [1, 1, 1]


def lie(header: Any, data: bytes = bytes(16)) -> bytearray:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return bytearray(len(text).to_bytes(8, "little") + text + data)


def entry(dtype: Any = "F32", shape: Any = (4,), begin: Any = 0, end: Any = 16) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_the_honest_header_of_these_tests_is_accepted():
    assert decode(PATH, lie({"x": entry()}))["x"].shape == (4,)


LIES = {
    "ends beyond the file": lie({"x": entry(shape=(8,), end=32)}),
    "leaves bytes over": lie({"x": entry(shape=(2,), end=8)}),
    "begins with a hole": lie({"x": entry(shape=(2,), begin=8, end=16)}),
    "overlaps": lie({"x": entry(), "y": entry()}),
    "end before begin": lie({"x": entry(begin=16, end=0)}),
    "size not of the shape": lie({"x": entry(shape=(3,))}),
    "negative shape": lie({"x": entry(shape=(-4,))}),
    "two negative sizes": lie({"x": entry(shape=(-2, -2))}),
    "negative offset": lie({"x": entry(begin=-16, end=0)}),
    "overflowing shape": lie({"x": entry(shape=(1 << 40, 1 << 40))}),
    "shape that overflows to nothing": lie({"x": entry(shape=(1 << 62, 4, 0), end=0)}, b""),
    "shape of 2**64": lie({"x": entry(shape=(1 << 64, 0), end=0)}, b""),
    "too many dims": lie({"x": entry(shape=[1] * 65, end=4)}, bytes(4)),
    "float size": lie({"x": entry(shape=(4.0,))}),
    "true as size": lie({"x": entry(dtype="U8", shape=(16, True))}),
    "text as shape": lie({"x": entry(shape="4")}),
    "three offsets": lie({"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16, 16]}}),
    "unknown dtype": lie({"x": entry(dtype="F4")}),
    "dtype of another type": lie({"x": entry(dtype=["F32"])}),
    "missing key": lie({"x": {"dtype": "F32", "shape": [4]}}),
    "one key too many": lie({"x": entry() | {"pickle": "x"}}),
    "entry is a list": lie({"x": [1]}),
    "header is a list": lie([entry()]),
    "name twice": lie(
        b'{"x":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},'
        b'"x":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'
    ),
    "deep nesting": lie(b"[" * 100_000),
    "not utf-8": lie(b'{"\xff\xfe": 1}'),
    "huge number": lie(b'{"x": ' + b"9" * 5000 + b"}"),
    "long text": lie({"x" * 10_000: entry(dtype="F" * 10_000)}),
    "not aligned": lie({"a": entry("U8", (1,), 0, 1), "x": entry("F32", (4,), 1, 17)}, bytes(17)),
    "header longer than the file": bytearray((1 << 63).to_bytes(8, "little") + b"{}"),
    "header over the limit": bytearray((17 << 20).to_bytes(8, "little") + b" " * (17 << 20)),
    "seven bytes": bytearray(7),
    "empty file": bytearray(),
    "header of no bytes": bytearray(8),
}


@pytest.mark.parametrize("name", LIES)
def test_a_header_that_lies_is_refused_with_the_files_name(name: str):
    with pytest.raises(CheckpointError, match="^model.safetensors is no valid safetensors") as info:
        decode(PATH, LIES[name])
    assert len(str(info.value)) < 700


def test_random_headers_give_tensors_or_our_error():
    rng = random.Random(7)
    original = encoded({"a": torch.ones(4, 3), "b": torch.ones(5, dtype=torch.int8)})
    header_end = 8 + int.from_bytes(original[:8], "little")
    refused = 0
    for _ in range(5000):
        mutant = bytearray(original)
        for _ in range(rng.randint(1, 4)):
            mutant[rng.randrange(header_end)] = rng.choice(b'0123456789{}[]",:FIUB \x00\xff')
        try:
            decode(PATH, mutant)
        except CheckpointError:
            refused += 1
    assert refused > 4000
