import hashlib
import json
import pickle
import random

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file

from moa_train.engine.tensorfile import CheckpointError, read_tensors, write_tensors

KINDS = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = {kind: torch.randn(3, 5, generator=generator).to(getattr(torch, kind)) for kind in KINDS}
    made["step"] = torch.tensor(17.0)
    made["empty"] = torch.empty(0, 4)
    made["strided"] = torch.randn(4, 6, generator=generator)[::2, 1:].t()
    made["channels last"] = torch.randn(2, 3, 4, 5, generator=generator).to(memory_format=torch.channels_last)
    made["tied"] = made["float32"]
    made["part of it"] = made["float32"][1]
    made["ümläut/…"] = torch.tensor([float("nan"), float("inf"), -0.0])
    return made


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    # viewed as bytes, for NaN and the sign of zero
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and a.contiguous().reshape(-1).view(torch.uint8).equal(b.contiguous().reshape(-1).view(torch.uint8))
    )


def test_the_library_reads_what_was_written_and_the_digest_is_the_files(tmp_path):
    path, made = tmp_path / "a.safetensors", tensors()
    size, digest = write_tensors(path, made, {"format": "1", "config": '{"a": "ä"}'})
    content = path.read_bytes()
    assert (size, digest) == (len(content), hashlib.sha256(content).hexdigest())
    for read in (load_file(path), read_tensors(path)[0]):
        assert read.keys() == made.keys()
        assert all(same(read[name], made[name]) for name in made)
    assert read_tensors(path)[1] == {"format": "1", "config": '{"a": "ä"}'}
    with safetensors.safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "1", "config": '{"a": "ä"}'}
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    start = 8 + int.from_bytes(content[:8], "little")
    for name in made:
        assert (start + header[name]["data_offsets"][0]) % made[name].element_size() == 0


def test_what_the_library_wrote_is_read(tmp_path):
    made = {name: tensor.clone().contiguous() for name, tensor in tensors().items()}
    save_file(made, tmp_path / "a.safetensors")
    read, metadata = read_tensors(tmp_path / "a.safetensors")
    assert all(same(read[name], made[name]) for name in made)
    assert metadata == {}


def test_tensors_outlive_their_file(tmp_path):
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"x": torch.arange(1000)})
    read, _ = read_tensors(path)
    path.write_bytes(b"")  # a mapped file would now end the process with SIGBUS
    read["x"] += 1
    assert torch.equal(read["x"], torch.arange(1, 1001))


def test_an_unknown_kind_of_tensor_is_no_silent_loss(tmp_path):
    with pytest.raises(AssertionError, match="complex128"):
        write_tensors(tmp_path / "a", {"x": torch.zeros(1, dtype=torch.complex128)})


class Bomb:
    def __reduce__(self):
        return (open, ("exploded", "w"))


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors", "weights"])
@pytest.mark.parametrize("how", ["torch", "torch-legacy", "pickle"])
def test_pickles_are_refused_by_name_or_content_and_never_run(tmp_path, monkeypatch, name, how):
    monkeypatch.chdir(tmp_path)
    if how == "pickle":
        (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
    else:
        torch.save(Bomb(), tmp_path / name, _use_new_zipfile_serialization=how == "torch")
    with pytest.raises(CheckpointError, match=r"is a pickle .* can execute code"):
        read_tensors(tmp_path / name)
    assert not (tmp_path / "exploded").exists()


def forged(header: object, data: bytes = b"\0" * 16, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype="F32", shape=(4,), offsets=(0, 16)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


HOSTILE = {
    "nothing": b"",
    "eight bytes": b"\0" * 8,
    "no header": forged(b""),
    "a header of 2**63 bytes": forged({}, length=2**63),
    "a header of 2**64 - 1 bytes": forged({}, length=2**64 - 1),
    "a header longer than the file": forged({"x": entry()}, length=10_000),
    "a header cut short": forged({"x": entry()}, length=20),
    "no JSON": forged(b"{" + b"\xff" * 20),
    "nested 100,000 deep": forged(b'{"a":' * 100_000),
    "a list": forged([1, 2, 3]),
    "an entry that is a number": forged({"x": 3}),
    "an unknown dtype": forged({"x": entry("PICKLE")}),
    "a terabyte of a shape": forged({"x": entry(shape=(2**38,))}),
    "a shape that overflows": forged({"x": entry(shape=(2**40, 2**40))}),
    "a shape that overflows to the right size": forged({"x": entry(shape=(2**63, 2, 4))}),
    "an empty shape that overflows": forged({"x": entry(shape=(2**62, 2**62, 0), offsets=(0, 0))}, b""),
    "a negative shape": forged({"x": entry(shape=(-4,))}),
    "a fractional shape": forged({"x": entry(shape=(4.5,))}),
    "offsets beyond the end": forged({"x": entry(offsets=(0, 2**40))}),
    "offsets backwards": forged({"x": entry(offsets=(16, 0))}),
    "offsets before the start": forged({"x": entry(offsets=(-16, 0))}),
    "offsets that do not fit the shape": forged({"x": entry(offsets=(0, 8))}),
    "overlapping tensors": forged({"x": entry(), "y": entry()}),
    "a hole": forged({"x": entry(offsets=(16, 32))}, b"\0" * 32),
    "data that nothing names": forged({"x": entry()}, b"\0" * 32),
    "metadata that are no strings": forged({"__metadata__": {"a": {"b": 1}}, "x": entry()}),
    "data cut short": forged({"x": entry()}, b"\0" * 15),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_forged_headers_are_clean_errors(tmp_path, name):
    path = tmp_path / "forged.safetensors"
    path.write_bytes(HOSTILE[name])
    with pytest.raises(CheckpointError, match=r"forged\.safetensors is not a valid"):
        read_tensors(path)


def test_a_thousand_mutated_headers_are_read_or_refused(tmp_path):
    path, draw = tmp_path / "mutated.safetensors", random.Random(0)
    write_tensors(path, {"a": torch.arange(4), "b": torch.zeros(2, 3)}, {"k": "v"})
    content, outcomes = path.read_bytes(), {"read": 0, "refused": 0}
    length = int.from_bytes(content[:8], "little")
    for _ in range(1000):
        mutated = bytearray(content)
        for _ in range(draw.randint(1, 3)):
            mutated[draw.randrange(8 + length)] = draw.choice(
                [draw.randrange(256), ord(draw.choice('0123456789[]{},:"'))]
            )
        path.write_bytes(mutated)
        try:
            read, _ = read_tensors(path)
            outcomes["read"] += 1
            assert sum(tensor.numel() * tensor.element_size() for tensor in read.values()) == len(content) - 8 - length
        except CheckpointError:
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 0, outcomes


def test_missing_files_and_folders_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="No such file"):
        read_tensors(tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError, match="Is a directory"):
        read_tensors(tmp_path)
