from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms import v2

from moa_train.data import augment as augment_module
from moa_train.data.augment import BatchAugment, Normalize, plan_crop
from moa_train.data.batch import images_at_once
from moa_train.data.mix import Mixer
from moa_train.interfaces import Batch
from moa_train.runtime.errors import UserError
from moa_train.schema import AugmentConfig

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FULL = {"randaugment_ops": 2, "erasing": 0.25, "color_jitter": 0.4}


def augment(seed: int = 0, **settings: Any) -> BatchAugment:
    config = AugmentConfig(**settings)
    return BatchAugment(config, crop=config.crop, seed=seed, normalize=Normalize(MEAN, STD))


def batch_of(images: Tensor, rows: Tensor | None = None, epoch: int = 0) -> Batch:
    rows = torch.arange(len(images)) if rows is None else rows
    same = torch.full_like(rows, epoch)
    return Batch(images[rows], rows, index=rows, epoch=same, repeat=torch.zeros_like(rows), step=0)


def plain(**settings: Any) -> BatchAugment:
    return augment(**{"crop": "none", "flip": 0.0, **settings})


def test_normalize_and_back(tiles: Tensor) -> None:
    normalize = Normalize(MEAN, STD)
    expected = (tiles.double() / 255 - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)
    assert normalize(tiles).dtype == torch.float32
    torch.testing.assert_close(normalize(tiles).double(), expected, atol=1e-5, rtol=0)
    assert torch.equal(normalize.undo(normalize(tiles)), tiles)


@pytest.mark.parametrize("crop", ["pad", "resized", "none"])
def test_pixels_do_not_depend_on_the_batch(tiles: Tensor, crop: str) -> None:
    """The same samples in other batches and in another order have exactly the same pixels."""
    transform = augment(crop=crop, **FULL)
    whole = transform(batch_of(tiles))
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    parts = torch.cat([transform(batch_of(tiles, rows)) for rows in order.split(10)])
    assert torch.equal(parts, whole[order])


@pytest.mark.parametrize("crop", ["pad", "resized", "none"])
@pytest.mark.parametrize("at_once", [1, 30])
def test_pixels_do_not_depend_on_how_many_are_processed_at_once(
    tiles: Tensor, crop: str, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    transform = augment(crop=crop, **FULL)
    whole = transform(batch_of(tiles))
    monkeypatch.setattr("moa_train.data.augment.images_at_once", lambda images: at_once)
    assert torch.equal(transform(batch_of(tiles)), whole)


def test_large_images_are_augmented_few_at_a_time() -> None:
    assert images_at_once(torch.empty(128, 3, 32, 32)) == 682
    assert images_at_once(torch.empty(128, 3, 224, 224)) == 13
    assert images_at_once(torch.empty(2, 3, 4000, 4000)) == 1
    assert images_at_once(torch.empty(128, 3, 224, 224, device="meta")) == 128  # as on a GPU


@pytest.mark.parametrize("key", ["seed", "epoch", "index", "repeat"])
def test_each_word_of_the_key_matters(tiles: Tensor, key: str) -> None:
    batch = batch_of(tiles[:1].expand(64, -1, -1, -1))
    one = torch.zeros_like(batch.index)
    names = {"index": one, "epoch": one, "repeat": one}
    if key != "seed":
        names[key] = torch.arange(64)
    many = Batch(batch.images, batch.labels, step=0, **names)
    results = [augment(seed=seed, **FULL)(many) for seed in ((0, 1) if key == "seed" else (0,))]
    distinct = {image.numpy().tobytes() for result in results for image in result}
    assert len(distinct) == 2 if key == "seed" else len(distinct) > 55


def test_the_images_of_the_batch_are_not_modified(tiles: Tensor) -> None:
    for crop in ("pad", "resized", "none"):
        batch = batch_of(tiles.clone())
        augment(crop=crop, **FULL)(batch)
        assert torch.equal(batch.images, tiles)


def test_without_augmentation_images_are_only_normalized(tiles: Tensor) -> None:
    assert torch.equal(plain()(batch_of(tiles)), Normalize(MEAN, STD)(tiles))


def test_weak_augmentation_is_crop_and_flip(tiles: Tensor) -> None:
    batch = batch_of(tiles)
    assert torch.equal(augment(**FULL)(batch, strong=False), augment()(batch))
    assert not torch.equal(augment(**FULL)(batch), augment()(batch))


def test_flips_have_the_configured_probability(tiles: Tensor) -> None:
    many = batch_of(tiles[:1].expand(4000, -1, -1, -1))
    flipped = (plain(flip=0.3)(many) == Normalize(MEAN, STD)(tiles[:1].flip(3))).flatten(1).all(1)
    kept = (plain(flip=0.3)(many) == Normalize(MEAN, STD)(tiles[:1])).flatten(1).all(1)
    assert (flipped | kept).all()
    assert stats.binomtest(int(flipped.sum()), 4000, 0.3).pvalue > 1e-3


def test_alternating_flips_show_both_versions_of_every_image(tiles: Tensor) -> None:
    alternating = plain(alternating_flip=True)
    first, second, third = (alternating(batch_of(tiles, epoch=epoch)) for epoch in range(3))
    flipped = (first == Normalize(MEAN, STD)(tiles.flip(3))).flatten(1).all(1)
    assert 16 <= int(flipped.sum()) <= 48  # of 64
    assert torch.equal(second, first.flip(3))
    assert torch.equal(third, first)
    assert not torch.equal(first, plain(seed=1, alternating_flip=True)(batch_of(tiles)))


def test_padded_crops_are_equally_likely() -> None:
    ramp = torch.arange(24 * 24).view(1, 1, 24, 24)  # each value encodes its position
    images = torch.cat((ramp % 256, ramp // 256, torch.ones_like(ramp)), 1).to(torch.uint8)
    many = batch_of(images.expand(8100, -1, -1, -1))
    transform = plain(crop="pad", padding=4)
    result = transform.normalize.undo(transform(many)).int()
    value = result[:, 0, 12, 12] + 256 * result[:, 1, 12, 12]  # the center is never padding
    places = torch.stack((value // 24 - 12, value % 24 - 12), 1)
    assert places.abs().max() == 4
    counts = torch.bincount((places[:, 0] + 4) * 9 + places[:, 1] + 4, minlength=81)
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3


@pytest.mark.parametrize("crop", ["pad", "resized", "none"])
def test_the_filter_of_files_and_of_batches_is_the_one_configured(tiles: Tensor, crop: str) -> None:
    class Files:
        image_size, in_memory = (8, 8), False

    for name in ("bilinear", "bicubic"):
        view, _ = plan_crop(AugmentConfig(crop=crop, interpolation=name), Files())  # type: ignore[arg-type]
        assert view.interpolation == name
    images = [plain(crop=crop, interpolation=name)(batch_of(tiles)) for name in ("bilinear", "bicubic")]
    assert torch.equal(*images) == (crop != "resized")


def test_resized_crops_show_parts_of_the_image() -> None:
    ramp = torch.arange(32.0).mul(8).expand(1, 3, 32, 32).to(torch.uint8)  # the brightness encodes the column
    many = batch_of(ramp.expand(500, -1, -1, -1))
    transform = plain(crop="resized", scale=[0.25, 0.25], ratio=[1.0, 1.0])
    result = transform.normalize.undo(transform(many)).float()[:, 0]
    step = result[:, :, 4:-4].diff(dim=2).mean((1, 2))
    torch.testing.assert_close(step, torch.full_like(step, 4.0), atol=0.1, rtol=0)  # half the side: half the slope
    assert len(result[:, 16, 16].unique()) > 10


def test_jitter_has_the_configured_range() -> None:
    gray = torch.full((2000, 3, 4, 4), 100, dtype=torch.uint8)  # contrast and saturation do not change it
    transform = plain(color_jitter=0.4)
    values = transform.normalize.undo(transform(batch_of(gray)))[:, 0, 0, 0].float() / 100
    assert stats.kstest((values.numpy() - 0.6) / 0.8, "uniform").pvalue > 1e-3


def test_jitter_has_torchvisions_distribution() -> None:
    """Mean luma depends on brightness, its range on brightness and contrast, and color on all three factors."""
    pixels = torch.tensor([[[95, 55], [95, 55]], [[80, 40], [80, 40]], [[70, 30], [70, 30]]], dtype=torch.uint8)
    images = pixels.expand(3000, -1, -1, -1)
    transform = plain(color_jitter=0.4)
    ours = transform.normalize.undo(transform(batch_of(images)))
    torch.manual_seed(0)
    peer = v2.ColorJitter(0.4, 0.4, 0.4)
    theirs = torch.stack([peer(image) for image in images])
    weights = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    measured = []
    for result in (ours.float(), theirs.float()):
        luma = (result * weights).sum(1)
        measured.append(((luma.mean((1, 2))), luma[:, 0, 0] - luma[:, 0, 1], result[:, 0, 0, 0] - result[:, 2, 0, 0]))
    for mine, its in zip(*measured, strict=True):
        noise = np.random.default_rng(0).uniform(-1, 1, (2, 3000))  # spreads the rounded values over their interval
        assert stats.ks_2samp(mine.numpy() + noise[0], its.numpy() + noise[1]).pvalue > 1e-3


def test_global_random_state_is_left_alone(tiles: Tensor) -> None:
    torch.manual_seed(3)
    np.random.seed(3)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index]
    augment(**FULL)(batch_of(tiles))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])  # type: ignore[index]


def test_numbers_never_change() -> None:
    """A resumed run must continue with the same pixels, also after an upgrade."""
    ramp = torch.arange(16 * 3 * 8 * 8).view(16, 3, 8, 8).to(torch.uint8)
    transform = augment(**FULL, padding=1)
    result = transform.normalize.undo(transform(batch_of(ramp), strong=False))
    assert result.long().flatten(1).mul(torch.arange(192)).sum(1).tolist()[:4] == [2030392, 1259888, 1601712, 3514400]


@pytest.fixture
def own(write_module: Callable[[str, str], None], example_of: Callable[[object], str]) -> None:
    """A module with the documented example of an own augmentation, and with others."""
    write_module("own_color", example_of(augment_module) + OTHERS)


OTHERS = """
from moa_train.data.counter import normal

def darken(images, keys):
    return (images * send(uniform(keys, 0), images).view(-1, 1, 1, 1)).to(torch.uint8)

def paint(images, keys):
    return send(uniform(keys[:, None], 0, range(3)) * 255, images).to(torch.uint8)[..., None, None].expand_as(images)

def halve(images, keys):
    return images[..., ::2]

def blur(images, keys):
    return images.float()
"""


@pytest.mark.usefixtures("own")
def test_the_example_of_an_own_augmentation_runs(tiles: Tensor) -> None:
    many = batch_of(tiles[:1].expand(3000, -1, -1, -1))
    transform = plain(extra=["own_color:to_gray"], args={"to_gray": {"probability": 0.3}})
    result = transform(many)
    undone = transform.normalize.undo(result)
    gray = (undone[:, :1] == undone).flatten(1).all(1)
    assert stats.binomtest(int(gray.sum()), 3000, 0.3).pvalue > 1e-3
    assert torch.equal(undone[~gray], tiles[:1].expand(int((~gray).sum()), -1, -1, -1))
    parts = [transform(batch_of(tiles[:1].expand(3000, -1, -1, -1), rows)) for rows in torch.arange(3000).split(700)]
    assert torch.equal(torch.cat(parts), result)
    assert torch.equal(transform(many, strong=False), plain()(many))
    with pytest.raises(UserError, match=r"augment\.args\.to_gray\.probability=2 is out of range"):
        plain(extra=["own_color:to_gray"], args={"to_gray": {"probability": 2}})


@pytest.mark.usefixtures("own")
def test_own_augmentations_have_random_numbers_of_their_own(tiles: Tensor) -> None:
    """The same draws in two augmentations are independent of each other and of the built-in flip."""
    many = batch_of(torch.full((4000, 3, 1, 2), 200, dtype=torch.uint8))
    seen = []
    for name in ("darken", "paint"):
        transform = plain(extra=[f"own_color:{name}"])
        seen.append(transform.normalize.undo(transform(many))[:, :, 0, 0].double().numpy())
    ramp = batch_of(torch.tensor([0, 255], dtype=torch.uint8).expand(4000, 3, 1, 2))
    flipped = plain(flip=0.5)(ramp)[:, 0, 0, 0].numpy() > 0
    table = np.stack([seen[0][:, 0], *seen[1].T, flipped])
    assert np.abs(np.corrcoef(table) - np.eye(5)).max() < 4.5 / np.sqrt(4000)
    assert stats.kstest((seen[0][:, 0] + 0.5) / 200, "uniform").statistic < 0.05


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(("name", "returned"), [("halve", r"\(64, 3, 32, 16\)"), ("blur", "float32")])
def test_own_augmentations_must_return_images_like_those_they_were_given(
    tiles: Tensor, name: str, returned: str
) -> None:
    with pytest.raises(UserError, match=rf"augment\.extra: {name} returned .*{returned}.*must return torch\.uint8"):
        plain(extra=[f"own_color:{name}"])(batch_of(tiles))


class Transfers(TorchDispatchMode):
    """Counts copies to the device ``meta``, those for which the host would wait, and all operations there."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.waits = self.operations = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        names = [argument.name for argument in operation._schema.arguments]
        self.operations += result.is_meta if isinstance(result, Tensor) else True
        if "non_blocking" in names and args[0].device.type == "cpu" and result.is_meta:
            given = dict(zip(names, args, strict=False)) | (kwargs or {})
            self.count += 1
            self.waits += not given.get("non_blocking", False)
        return result


@pytest.mark.parametrize("crop", ["pad", "resized", "none"])
@pytest.mark.parametrize("mix", [{"mixup": 0.8}, {"cutmix": 1.0}])
def test_the_host_never_waits_for_the_device(tiles: Tensor, crop: str, mix: dict[str, float]) -> None:
    """The device ``meta`` has no data: every attempt of the host to read from it is an error."""
    there = batch_of(tiles).to("meta")
    for wait in (lambda x: x.max().item(), torch.nonzero, lambda x: x[x > 3], Tensor.cpu, Tensor.tolist):
        with pytest.raises((RuntimeError, NotImplementedError)):
            wait(there.images)
    with Transfers() as transfers:
        images = augment(crop=crop, **FULL)(there)
        mixer = Mixer(AugmentConfig(**mix), 100)
        images, targets = mixer(images, mixer.smooth(there.labels), (0, 0, 0))
    assert images.is_meta
    assert targets.is_meta
    assert transfers.count > 10
    assert transfers.waits == 0


def test_the_number_of_operations_does_not_grow_with_the_batch() -> None:
    """Both batches have images for each of the operations of RandAugment."""
    counts = []
    for size in (500, 1000):
        batch = batch_of(torch.zeros(size, 3, 32, 32, dtype=torch.uint8)).to("meta")
        with Transfers() as transfers:
            augment(crop="pad", **FULL)(batch)
        counts.append(transfers.operations)
    assert counts[0] == counts[1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("crop", ["pad", "resized", "none"])
def test_a_gpu_gives_the_same_pixels(tiles: Tensor, crop: str, no_waits: Any) -> None:
    batch = batch_of(tiles)
    here, on_device = augment(crop=crop, **FULL)(batch), batch.to("cuda")
    augment(crop=crop, **FULL)(on_device)  # loads kernels
    with no_waits():
        there = augment(crop=crop, **FULL)(on_device)
    assert ((here - there.cpu()).abs() > 2 / 255 / 0.224).float().mean() < 1e-3
