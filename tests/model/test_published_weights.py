"""Published checkpoints are read as data, described, loaded and written; nothing in the file is executed."""

import sys
import zipfile
from pathlib import Path

import pytest
import torch

from moa_train.model.load import load_weights
from moa_train.model.pth_file import Foreign, Name, read_checkpoint, read_state_dict
from moa_train.model.published_weights import published_model, write_published
from moa_train.model.registry import create_model
from moa_train.runtime.errors import UserError


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
