"""What the knobs of data and augmentation arrive as."""

import numpy as np
import torch

from moa_train.assembly import data
from moa_train.assembly.inputs import build_source, build_train_transform, open_splits
from moa_train.data import STATISTICS, Order, TrainLoader
from moa_train.runtime.distributed import Distributed


def test_the_parts_of_a_limit_are_evenly_spaced(tiny):
    whole, part = (build_source(tiny({"data.limit": limit}).data, "train") for limit in ("null", 50))
    assert len(part) == 50
    labels = whole.labels[np.linspace(0, len(whole) - 1, 50).astype(int)]
    assert part.labels.tolist() == labels.tolist()
    assert set(part.labels.tolist()) == set(range(10))
    assert part.fingerprint != whole.fingerprint
    assert len(build_source(tiny({"data.limit": 50}).data, "test")) == 359  # the others are whole
    assert len(build_source(tiny({"data.limit": 10**6}).data, "train")) == len(whole)


def test_augmentation_ends_where_it_is_switched_off(tiny):
    config = tiny({"augment.mixup": 0.8, "augment.cutmix": 1.0, "augment.erasing": 1.0, "augment.crop": "none"})
    config.augment.flip = config.augment.label_smoothing = 0.0
    source = build_source(config.data, "train")
    loader = TrainLoader(source, order=Order(len(source), 32, 0), micro_batch_size=32)
    transform = build_train_transform(config, source, off_step=1)
    batches = loader.batches()
    _, mixed = transform(next(batches), 0)
    assert ((mixed > 0).sum(dim=1) == 2).any()
    batch = next(batches)
    images, targets = transform(batch, 1)
    assert targets.argmax(1).tolist() == batch.labels.tolist()
    assert set(targets.unique().tolist()) == {0.0, 1.0}
    assert images.flatten(1).unique(dim=0).shape[0] == 32
    known = STATISTICS["digits"]
    mean, std = (torch.tensor(values)[:, None, None] for values in (known.mean, known.std))
    torch.testing.assert_close(images, (batch.images / 255 - mean) / std, rtol=1e-4, atol=1e-4)  # as they are


def test_channels_last_is_the_layout_of_images(tiny):
    config = tiny({"runtime.channels_last": "true"})
    source = build_source(config.data, "train")
    loader = TrainLoader(source, order=Order(len(source), 32, 0), micro_batch_size=32)
    images, _ = build_train_transform(config, source, off_step=1)(next(loader.batches()), 0)
    assert images.is_contiguous(memory_format=torch.channels_last)


def test_what_is_to_be_fetched_is_fetched_by_rank_0_before_the_others_look(tiny, monkeypatch):
    events = []

    class Second(Distributed):
        def on_main(self, function):  # which rank 0 runs meanwhile
            events.append("waited")

    monkeypatch.setattr(data, "build_source", lambda config, split: events.append(split) or build_source(config, split))
    for download, expected in ((True, ["waited", "train"]), (False, ["train"])):
        config = tiny()
        config.data.download = download
        open_splits(config, Second(1, 1, 2, 2, torch.device("cpu")))
        assert events[: len(expected)] == expected
        events.clear()
