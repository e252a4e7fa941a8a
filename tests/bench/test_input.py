"""Input pipelines: all candidates run and produce equivalent batches."""

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from moa_train.bench import input as input_part
from moa_train.bench import input_peers
from moa_train.data.augment import Normalize
from moa_train.data.dataset import open_split
from moa_train.runtime.errors import UserError
from moa_train.runtime.seed import seed_everything

CPU = torch.device("cpu")
FULL = {
    "augment.crop": "pad", "augment.flip": 0.5, "augment.randaugment_ops": 2, "augment.randaugment_magnitude": 10,
    "augment.erasing": 0.25, "augment.mixup": 0.8, "augment.cutmix": 1.0,
}  # fmt: skip
PEERS = {
    "timm": input_peers.timm,
    "timm prefetcher": lambda *given: input_peers.timm(*given, prefetcher=True),
    "torchvision": input_peers.torchvision,
}


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """The settings for a tree of JPEG files: crops of photographs that are larger than the model's images."""
    root, rng = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for label, pixels in enumerate(load_sample_images().images):
        folder = root / "train" / f"class{label}"
        folder.mkdir(parents=True)
        for number in range(4):
            left, top = int(rng.integers(400)), int(rng.integers(200))
            piece = Image.fromarray(pixels).crop((left, top, left + 240, top + 200))
            piece.save(folder / f"{number}.jpg", quality=90)
    return {"data.name": "folder", "data.root": str(root), "data.image_size": 96, "data.val_fraction": 0}


def test_tables_contain_all_candidates_stages_and_ratios(job):
    training, evaluation = input_part.prepare(job(FULL, against=("timm", "torchvision")))()
    whole = ["moa-train", "timm", "timm prefetcher", "torchvision"]
    ratios = [f"moa-train / {name}" for name in whole[1:]]
    stages = ["gather", "crop", "flip", "randaugment", "normalize", "erase", "mixup", "cutmix"]
    assert [row.what for row in training.rows] == [*whole, *(f"  {name}" for name in stages), *ratios]
    assert [row.what for row in evaluation.rows] == [*whole, "  gather", "  normalize", *ratios]
    ours, its = training.rows[:2]
    assert ours.facts["us"] == pytest.approx(1e6 / ours.values[0])
    assert training.rows[-3].values == [ours.values[0] / its.values[0]]


def test_files_are_read_decoded_and_cropped(job, photographs):
    training, evaluation = input_part.prepare(job({**photographs, "augment.crop": "resized"}, batches=(3,)))()
    for table in (training, evaluation):
        names = [row.what.strip() for row in table.rows]
        assert names[:4] == ["moa-train", "read", "decode", "decode, crop, resize"]


def test_measurements_use_one_thread_and_restore_the_number(job, monkeypatch):
    seen = []
    monkeypatch.setattr(torch, "set_num_threads", seen.append)
    list(input_part.prepare(job(modes=("infer",)))())
    assert seen == [1, torch.get_num_threads()]


@pytest.mark.parametrize("name", PEERS)
def test_evaluation_pixels_equal_those_of_peers(job, photographs, name):
    for changes, bound in (({}, 0.51), (photographs, 2.51)):  # of 255; larger for resized images, as in test_view
        work = job(changes)
        config, source = work.config, open_split(work.config.data, "train")
        source = source.subset(np.arange(8), source.title)
        config.engine.eval_batch_size, config.data.workers = 4, 0
        ours = islice(input_part._ours(work, config, source, "infer"), 2)
        theirs = islice(PEERS[name](config, source, "infer", 4, CPU), 2)
        undo = Normalize.of(config.data).undo
        for (mine, labels), (its, others) in zip(ours, theirs, strict=True):
            assert torch.equal(labels, others)
            assert (undo(mine).int() - undo(its).int()).abs().max() <= bound


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("crop", ["pad", "resized", "none"])
@pytest.mark.parametrize("files", [False, True])
def test_training_batches_resemble_those_of_peers(job, photographs, name, crop, files):
    work = job({**FULL, **(photographs if files else {}), "augment.crop": crop})
    config, source = work.config, open_split(work.config.data, "train")
    size, count = (4, 6) if files else (64, 4)
    config.engine.batch_size = config.engine.micro_batch_size = size
    config.data.workers = 0
    seed_everything(0)  # the peers use the global generators
    made = {
        "ours": islice(input_part._ours(work, config, source, "train"), count),
        name: islice(PEERS[name](config, source, "train", size, CPU), count),
    }
    spread = {}
    for who, batches in made.items():
        images, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
        assert images.dtype == torch.float32
        assert images.shape == (size * count, 3, *source.image_size)
        assert targets.shape == (size * count, len(source.classes))
        torch.testing.assert_close(targets.sum(1), torch.ones(size * count))
        assert ((targets > 0.01) & (targets < 0.9)).any()  # mixed
        spread[who] = images.std()
    assert spread["ours"] / spread[name] == pytest.approx(1, abs=0.35 if files else 0.15)


def test_peers_return_labels_without_mixing(job):
    work = job({"augment.mixup": 0, "augment.cutmix": 0})
    source = open_split(work.config.data, "train")
    for peer in PEERS.values():
        _, labels = next(peer(work.config, source, "train", 4, CPU))
        assert labels.dtype == torch.int64


def test_an_unknown_peer_is_rejected_before_data_is_opened(job):
    with pytest.raises(UserError, match="--against=timmm"):
        input_part.prepare(job({"data.name": "folder", "data.root": str(Path("nowhere"))}, against=("timmm",)))
