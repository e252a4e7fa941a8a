"""Hostile, damaged and unusual `.pth` files: nothing in them is executed, and errors are clean."""

import collections
import io
import os
import pickle
import struct
import zipfile
from pathlib import Path

import pytest
import torch

from moa_train.model.pth_file import read_checkpoint, read_state_dict
from moa_train.runtime.errors import UserError


class Calls:
    """Pickles as a call of ``function(*arguments)``."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def as_checkpoint(
    program: bytes, path: Path, *, storages: dict[str, bytes] | None = None, compress: bool = False
) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", program)
        for key, data in (storages or {}).items():
            archive.writestr(f"archive/data/{key}", data, zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED)
    return path


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_a_file_that_would_run_a_command_runs_nothing(tmp_path, protocol):
    mark = tmp_path / "executed"
    program = pickle.dumps({"model": Calls(os.mkdir, str(mark))}, protocol)
    path = as_checkpoint(program, tmp_path / "evil.pth")
    try:
        called = read_checkpoint(path)["model"]
    except UserError:  # the oldest protocols have instructions that PyTorch never writes
        assert protocol < 2
    else:
        assert (called.name.name, called.arguments) == ("mkdir", (str(mark),))
        with pytest.raises(UserError, match="has no state dict"):
            read_state_dict(path)
    assert not mark.exists()
    pickle.loads(program)  # Python's own unpickler does run it
    assert mark.exists()


def test_sizes_are_checked_before_memory_is_taken(tmp_path):
    buffer = io.BytesIO()
    torch.save({"model": {"w": torch.arange(4.0)}}, buffer)
    with zipfile.ZipFile(buffer) as archive:
        names = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    program, data = names["data.pkl"], names["data/0"]
    assert torch.equal(
        read_state_dict(as_checkpoint(program, tmp_path / "a", storages={"0": data}))["w"], torch.arange(4.0)
    )

    with pytest.raises(UserError, match="contradicts its description"):
        read_state_dict(as_checkpoint(program, tmp_path / "b", storages={"0": data[:8]}))
    with pytest.raises(UserError, match="contradicts its description"):  # could unpack to any size
        read_state_dict(as_checkpoint(program, tmp_path / "c", storages={"0": bytes(1 << 16)}, compress=True))
    with pytest.raises(UserError, match="is damaged"):
        read_state_dict(as_checkpoint(program, tmp_path / "d"))
    # The shape (4,) follows the storage as K\x04 \x85: claim a million elements, then a storage of a million.
    many = program.replace(b"K\x04\x85", b"J" + struct.pack("<i", 10**6) + b"\x85", 1)
    with pytest.raises(UserError, match="extends beyond its storage"):
        read_state_dict(as_checkpoint(many, tmp_path / "e", storages={"0": data}))
    claimed = program.replace(b"K\x04t", b"J" + struct.pack("<i", 10**9) + b"t", 1)
    assert claimed != program
    with pytest.raises(UserError, match="contradicts its description"):
        read_state_dict(as_checkpoint(claimed, tmp_path / "f", storages={"0": data}))


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (b"", "damaged"),
        (b"\x80\x02.", "damaged"),
        (b"\x80\x02K\x01", "damaged"),
        (b"\x80\x02(K\x01", "damaged"),
        (b"\x80\x02R.", "incomplete"),
        (b"\x80\x02K\x01K\x02R.", "calls an object that is not a function"),
        (b"\x80\x02K\x01K\x02a.", "not a list"),
        (b"\x80\x02K\x01K\x02K\x03s.", "not a dictionary"),
        (b"\x80\x02h\x07.", "damaged"),
        (b"\x80\x02\x82\x01.", "EXT1"),
        (b"\x80\x05\x96" + struct.pack("<Q", 1 << 60) + b".", "damaged"),
        (b"\x80\x02X\xff\xff\xff\x7fabc.", "damaged"),
        (b"\x80\x02]]s.", "damaged|incomplete"),
        (b"\x80\x02\xff.", "damaged"),
    ],
)
def test_broken_programs_are_clean_errors(tmp_path, program, message):
    with pytest.raises(UserError, match=message):
        read_checkpoint(as_checkpoint(program, tmp_path / "x.pth"))


def test_containers_that_contain_themselves_or_each_other_many_times_end(tmp_path):
    bomb: list = ["x"]
    for _ in range(60):  # 2^60 elements if every occurrence were visited
        bomb = [bomb, bomb]
    own: list = []
    own.append(own)
    content = read_checkpoint(as_checkpoint(pickle.dumps({"a": bomb, "b": own}, 2), tmp_path / "x.pth"))
    assert content["a"][0] is content["a"][1]


def test_cut_files_and_flipped_bits_end_cleanly(published, tmp_path):
    for zipped in (True, False):
        whole = published[0][zipped].read_bytes()
        damaged = tmp_path / "damaged.pth"
        for length in range(0, len(whole) - 1, len(whole) // 20):
            damaged.write_bytes(whole[:length])
            with pytest.raises(UserError):
                read_state_dict(damaged)
        generator = torch.Generator().manual_seed(0)
        head = min(len(whole), 20_000)  # the description; flips in the numbers go unnoticed but for zip's checksums
        for _ in range(120):
            content = bytearray(whole)
            place = int(torch.randint(head, (1,), generator=generator))
            content[place] ^= 1 << int(torch.randint(8, (1,), generator=generator))
            damaged.write_bytes(content)
            try:
                weights = read_state_dict(damaged)
            except UserError:
                continue
            assert all(isinstance(value, torch.Tensor) for value in weights.values())


def test_tensors_of_all_kinds(tmp_path):
    tensors = {
        "float": torch.randn(2, 3),
        "half": torch.randn(3, 2).half(),
        "bfloat": torch.randn(4).bfloat16(),
        "double": torch.randn(1).double(),
        "long": torch.arange(5),
        "bool": torch.tensor([True, False]),
        "byte": torch.arange(3, dtype=torch.uint8),
        "transposed": torch.randn(3, 4).t(),
        "slice": torch.arange(10.0)[2:8:2],
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
        "parameter": torch.nn.Parameter(torch.randn(2)),
    }
    shared = torch.arange(6.0)
    tensors["one"], tensors["two"] = shared[:3], shared[3:]
    for zipped in (True, False):
        torch.save(collections.OrderedDict(tensors), tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
        found = read_state_dict(tmp_path / "x.pth")
        assert all(
            torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in tensors.items()
        )
