import shutil

import pytest
import torch

from moa_train.engine.checkpoint import CheckpointStore
from moa_train.engine.find_weights import find_weights
from moa_train.engine.tensorfile import CheckpointError, write_tensors


@pytest.fixture
def run_dir(tmp_path):
    """A run folder with the best at step 2, the newest at step 4, and EMA weights from step 3 on."""
    with CheckpointStore(tmp_path / "run", keep_last=9) as store:
        for step, score in ((1, 50.0), (2, 70.0), (3, 60.0), (4, None)):
            parts = ("model", "ema") if step > 2 else ("model",)
            tensors = {part: {"w": torch.tensor([step, part == "ema"])} for part in parts}
            store.save(step, {**tensors, "optimizer": {}}, {}, metadata={"config": "{}"}, score=score)
    return tmp_path / "run"


def taken(path) -> list[int]:
    found = find_weights(path)
    tensors, metadata = found.load()
    if found.checkpoint:
        assert metadata == {"config": "{}"}
    return tensors["w"].tolist()


def test_each_kind_of_path_leads_to_what_is_meant(run_dir, tmp_path):
    checkpoints = run_dir / "checkpoints"
    assert taken(run_dir) == taken(checkpoints) == [2, 0]
    assert taken(checkpoints / "best") == taken(checkpoints / "step-00000002") == [2, 0]
    assert taken(checkpoints / "last") == taken(checkpoints / "step-00000004") == [4, 1]
    assert taken(checkpoints / "last/model.safetensors") == [4, 0]
    (tmp_path / "link").symlink_to(run_dir)
    assert taken(tmp_path / "link") == [2, 0]


def test_it_says_which_it_took(run_dir):
    assert find_weights(run_dir).description == "weights of the best checkpoint, step 2"
    last = run_dir / "checkpoints/last"
    assert find_weights(last).description == "EMA weights of the checkpoint, step 4"
    assert find_weights(last, ("model",)).description == "weights of the checkpoint, step 4"
    assert find_weights(last / "ema.safetensors").description == "ema.safetensors of step 4"
    with pytest.raises(CheckpointError, match="has no ema weights"):
        find_weights(run_dir, ("ema",))


def test_without_an_evaluated_checkpoint_the_newest_is_taken(tmp_path):
    with CheckpointStore(tmp_path) as store:
        store.save(1, {"model": {"w": torch.tensor([7])}}, {}, metadata={"config": "{}"})
    assert taken(tmp_path) == [7]
    assert find_weights(tmp_path).description == "weights of the newest checkpoint, step 1"


def test_a_lone_file_needs_nothing_around_it(run_dir, tmp_path):
    path = tmp_path / "lone.safetensors"
    path.write_bytes((run_dir / "checkpoints/best/model.safetensors").read_bytes())
    found = find_weights(path)
    assert (found.checkpoint, found.description) == (None, "the file lone.safetensors")
    assert found.load()[1] == {"config": "{}"}
    for other in (path, run_dir / "checkpoints/best/model.safetensors"):
        with pytest.raises(CheckpointError, match="holds one set of weights, so weights=ema selects nothing"):
            find_weights(other, ("ema",))
    assert find_weights(run_dir / "checkpoints/best/model.safetensors", ("model",)).checkpoint is not None


def test_damage_beside_a_manifest_is_noticed_in_a_single_file_too(run_dir):
    path = run_dir / "checkpoints/step-00000004/ema.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="SHA-256"):
        find_weights(path).load()


def test_what_holds_no_weights_is_a_clean_error(run_dir, tmp_path):
    with pytest.raises(CheckpointError, match=r"does not exist\. Give a run folder"):
        find_weights(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="contains no checkpoint"):
        find_weights(tmp_path / "empty")
    with pytest.raises(CheckpointError, match="is not a valid safetensors file"):
        find_weights(run_dir / "checkpoints/last/state.json").load()
    with pytest.raises(CheckpointError, match="is the optimizer's state"):
        find_weights(run_dir / "checkpoints/last/optimizer.safetensors")
    torch.save({"w": torch.ones(1)}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"w\.pth is a pickle"):
        find_weights(tmp_path / "w.pth").load()
    write_tensors(tmp_path / "w.pth", {"w": torch.ones(1)})
    assert find_weights(tmp_path / "w.pth").load()[0]["w"].item() == 1.0  # the content decides


def test_last_and_best_are_found_by_looking(run_dir, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run_dir, copy)  # follows links, as do cp -L, rsync -L and zip
    checkpoints = copy / "checkpoints"
    assert not (checkpoints / "last").is_symlink()
    shutil.copytree(run_dir / "checkpoints/step-00000001", checkpoints / "own")
    with CheckpointStore(run_dir, keep_last=9) as store:
        store.save(5, {"model": {"w": torch.tensor([5, 0])}}, {}, metadata={"config": "{}"}, score=80.0)
    shutil.copytree(run_dir / "checkpoints/step-00000005", checkpoints / "step-00000005")
    assert taken(checkpoints / "last") == taken(checkpoints / "best") == [5, 0]
    assert taken(checkpoints / "last/model.safetensors") == [5, 0]
    assert taken(checkpoints / "own") == [1, 0]
    with CheckpointStore(copy, keep_last=1) as store:
        store.save(6, {"model": {"w": torch.tensor([6, 0])}}, {}, metadata={"config": "{}"})
    assert {name: (checkpoints / name).readlink().name for name in ("last", "best")} == {
        "last": "step-00000006",
        "best": "step-00000005",
    }


def test_a_copied_link_without_its_checkpoint_stays(run_dir, tmp_path):
    alone = tmp_path / "alone/checkpoints"
    shutil.copytree(run_dir / "checkpoints/best", alone / "best")
    assert taken(alone / "best") == [2, 0]
    with CheckpointStore(alone.parent) as store:
        store.save(5, {"model": {"w": torch.tensor([5, 0])}}, {}, metadata={"config": "{}"})
    assert (alone / "best/model.safetensors").is_file()  # it may be the only copy
