"""Published checkpoints are read as data, described, loaded and written; nothing in the file is executed."""

import collections
import io
import os
import pickle
import struct
import sys
import types
import zipfile
from pathlib import Path

import pytest
import torch

from moa_train.model.load import load_weights
from moa_train.model.pickled import Foreign, Name, read_checkpoint, read_state_dict
from moa_train.model.published_weights import published_model, write_published
from moa_train.model.registry import create_model
from moa_train.runtime.errors import UserError


class CfgNode(dict):
    """Like the configuration class of the published training code: a dict with attributes, of a foreign module."""

    def __init__(self, *args):
        super().__init__(*args)
        self.__dict__["_frozen"] = True


@pytest.fixture
def published(tmp_path, monkeypatch, small):
    """Files in the authors' layout, in both containers of PyTorch, and the model whose weights they hold."""
    module = types.ModuleType("yacs_config")
    module.CfgNode, CfgNode.__module__ = CfgNode, "yacs_config"
    monkeypatch.setitem(sys.modules, "yacs_config", module)
    model = small("published").eval()
    config = CfgNode({"MODEL": CfgNode({"NAME": "moa_tiny", "DROP_PATH_RATE": 0.2}), "AMP": True})
    paths = {}
    for zipped in (True, False):
        paths[zipped] = tmp_path / f"{zipped}.pth"
        content = {"model": model.state_dict(), "max_accuracy": 80.5, "epoch": 299, "config": config}
        torch.save(content, paths[zipped], _use_new_zipfile_serialization=zipped)
    monkeypatch.delitem(sys.modules, "yacs_config")
    return paths, model


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_published_file_loads_for_evaluation_and_fine_tuning(published, zipped):
    paths, model = published
    with pytest.raises(ModuleNotFoundError):  # PyTorch's own reader imports what the file names
        torch.load(paths[zipped], weights_only=False)
    weights = read_state_dict(paths[zipped])
    assert list(weights) == list(model.state_dict())

    found = published_model(weights)
    rebuilt = create_model(found.config, image_size=found.image_size, num_classes=found.num_classes).eval()
    assert load_weights(rebuilt, weights).resized == []
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(rebuilt(images), model(images))

    tuned = create_model(found.config, image_size=found.image_size, num_classes=3)
    loaded = load_weights(tuned, weights, head="new")
    assert loaded.new == ["head.bias", "head.weight"]
    assert "yacs_config" not in sys.modules


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_foreign_objects_are_records(published, zipped):
    content = read_checkpoint(published[0][zipped])
    assert (content["epoch"], content["max_accuracy"]) == (299, 80.5)
    config = content["config"]
    assert isinstance(config, Foreign)
    assert config.name == Name("yacs_config", "CfgNode")
    assert config.state == {"_frozen": True}
    assert config.items["MODEL"].items == {"NAME": "moa_tiny", "DROP_PATH_RATE": 0.2}


def test_round_trip_is_exact(published, tmp_path):
    _, model = published
    path = tmp_path / "out.pth"
    write_published(path, model.state_dict(), {"note": "plain"})
    again = read_state_dict(path)
    assert list(again) == list(model.state_dict())
    assert all(
        torch.equal(value, again[name]) and value.dtype == again[name].dtype
        for name, value in model.state_dict().items()
    )
    assert list(torch.load(path, weights_only=True)["model"]) == list(again)  # PyTorch's safe reader accepts it too

    second = tmp_path / "again.pth"
    write_published(second, again, {"note": "plain"})
    assert zip_contents(second) == zip_contents(path)


def zip_contents(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {
            name.partition("/")[2]: archive.read(name) for name in archive.namelist() if "serialization_id" not in name
        }


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"image_size": (32, 32), "depths": (1, 2, 1), "heads": (1, 2, 4), "moa_overlap": 2},
        {"image_size": (24, 24), "patch_size": 3, "window": 8, "mlp_ratio": 2, "num_classes": 7},
        {"embed_dim": 40, "moa_reduction": 32},
    ],
)
def test_the_architecture_is_derived_from_the_weights(small, changes):
    model = small("published", **changes)
    found = published_model(model.state_dict())
    rebuilt = create_model(found.config, image_size=found.image_size, num_classes=found.num_classes)
    assert {name: value.shape for name, value in rebuilt.state_dict().items()} == {
        name: value.shape for name, value in model.state_dict().items()
    }
    assert found.image_size == changes.get("image_size", (16, 16))


def test_without_global_attention_the_image_size_must_be_given(small):
    weights = small("published", moa_enabled=False).state_dict()
    with pytest.raises(UserError, match="do not determine the image size"):
        published_model(weights)
    found = published_model(weights, (16, 16))
    load_weights(create_model(found.config, image_size=(16, 16), num_classes=found.num_classes), weights)


def test_other_weights_are_refused(small, tmp_path):
    with pytest.raises(UserError, match="not the weights of a published MOA-Transformer"):
        published_model(small("vit").state_dict())
    with pytest.raises(UserError, match=r"layers\.0\.moa\."):
        write_published(tmp_path / "x.pth", small().state_dict(), {})
    torch.save({"model": {"a": 1, "b": torch.ones(1)}}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"not tensors: a\."):
        read_state_dict(tmp_path / "x.pth")
    torch.save([torch.ones(1)], tmp_path / "x.pth")
    with pytest.raises(UserError, match="has no state dict"):
        read_state_dict(tmp_path / "x.pth")
    with pytest.raises(UserError, match="There is no file"):
        read_state_dict(tmp_path / "none.pth")


def test_a_bare_state_dict_is_read_too(small, tmp_path):
    weights = small("published").state_dict()
    torch.save(weights, tmp_path / "bare.pth")
    assert list(read_state_dict(tmp_path / "bare.pth")) == list(weights)


# --- hostile and damaged files


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
    with pytest.raises(UserError, match="reaches beyond its storage"):
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
        (b"\x80\x02K\x01K\x02R.", "calls what is no function"),
        (b"\x80\x02K\x01K\x02a.", "no list"),
        (b"\x80\x02K\x01K\x02K\x03s.", "no dictionary"),
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
