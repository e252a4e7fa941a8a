"""How the settings of data and augmentation take effect."""

import numpy as np
import pytest
import torch

from moa_train.assembly import inputs
from moa_train.assembly.inputs import build_train_loader, build_train_transform, open_splits
from moa_train.data.augment import Normalize
from moa_train.data.dataset import open_split
from moa_train.data.digits import Digits
from moa_train.runtime.distributed import Distributed
from moa_train.runtime.errors import UserError

ALONE = Distributed(torch.device("cpu"))


def test_limit_takes_evenly_spaced_images(tiny):
    whole, part = (open_split(tiny({"data.limit": limit}).data, "train") for limit in ("null", 50))
    assert len(part) == 50
    labels = whole.labels[np.linspace(0, len(whole) - 1, 50).astype(int)]
    assert part.labels.tolist() == labels.tolist()
    assert set(part.labels.tolist()) == set(range(10))
    assert part.fingerprint != whole.fingerprint
    assert len(open_split(tiny({"data.limit": 50}).data, "test")) == 359  # other splits are not limited
    assert len(open_split(tiny({"data.limit": 10**6}).data, "train")) == len(whole)


def test_strong_augmentation_and_mixing_end_at_weak_from(tiny):
    config = tiny({"augment.mixup": 0.8, "augment.cutmix": 1.0, "augment.erasing": 1.0, "augment.crop": "none"})
    config.augment.flip = config.augment.label_smoothing = 0.0
    source = open_split(config.data, "train")
    transform = build_train_transform(config, source, weak_from=1)
    batches = build_train_loader(config, source, ALONE).batches()
    _, mixed = transform(next(batches), 0)
    assert ((mixed > 0).sum(dim=1) == 2).any()
    batch = next(batches)
    images, targets = transform(batch, 1)
    assert targets.argmax(1).tolist() == batch.labels.tolist()
    assert set(targets.unique().tolist()) == {0.0, 1.0}
    assert images.flatten(1).unique(dim=0).shape[0] == 32
    assert torch.equal(images, Normalize.of(config.data)(batch.images))  # otherwise unchanged


def test_channels_last_is_the_layout_of_images(tiny):
    config = tiny({"runtime.channels_last": "true"})
    source = open_split(config.data, "train")
    batch = next(build_train_loader(config, source, ALONE).batches())
    images, _ = build_train_transform(config, source, weak_from=1)(batch, 0)
    assert images.is_contiguous(memory_format=torch.channels_last)


def test_rank_0_downloads_the_data_before_the_other_ranks_open_it(tiny, monkeypatch):
    events = []

    class Second(Distributed):
        def on_main(self, function):  # rank 0 runs the function, this rank waits
            events.append("waited")

    monkeypatch.setattr(Digits, "downloads", True)
    monkeypatch.setattr(inputs, "open_split", lambda config, split: events.append(split) or open_split(config, split))
    for download, expected in ((True, ["waited", "train"]), (False, ["train"])):
        config = tiny()
        config.data.download = download
        open_splits(config, Second(1, 1, 2, 2, torch.device("cpu")))
        assert events[: len(expected)] == expected
        events.clear()


def test_a_split_that_does_not_exist_cannot_choose_checkpoints(tiny):
    config = tiny({"data.val_fraction": 0.0, "engine.eval_split": "val"})
    with pytest.raises(UserError, match=r"eval_split=val, but digits has only train, test\. Hold out some training"):
        open_splits(config, ALONE)
