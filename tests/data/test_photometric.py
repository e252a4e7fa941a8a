"""Every operation against Pillow, on real images: equal to the bit."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from moa_train.data import photometric
from moa_train.data.randaugment import PHOTOMETRIC

Peer = Callable[[Image.Image, float], Image.Image]


def to_pillow(image: Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def from_pillow(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def solarize_add(image: Image.Image, amount: float) -> Image.Image:
    return image.point([min(255, value + int(amount)) if value < 128 else value for value in range(256)] * 3)


OPERATIONS: dict[str, tuple[Peer, list[float]]] = {
    "invert": (lambda image, level: ImageOps.invert(image), [0]),
    "posterize": (lambda image, level: ImageOps.posterize(image, int(level)), [1, 2, 3, 4, 8]),
    "solarize": (lambda image, level: ImageOps.solarize(image, int(level)), [0, 1, 26, 128, 255, 256]),
    "solarize_add": (solarize_add, [0, 1, 50, 110, 128]),
    "brightness": (lambda image, level: ImageEnhance.Brightness(image).enhance(level), [0, 0.1, 0.55, 1, 1.3, 1.9]),
    "autocontrast": (lambda image, level: ImageOps.autocontrast(image), [0]),
    "equalize": (lambda image, level: ImageOps.equalize(image), [0]),
    "contrast": (lambda image, level: ImageEnhance.Contrast(image).enhance(level), [0, 0.1, 0.55, 1, 1.3, 1.9]),
    "color": (lambda image, level: ImageEnhance.Color(image).enhance(level), [0, 0.1, 0.55, 1, 1.3, 1.9]),
    "sharpness": (lambda image, level: ImageEnhance.Sharpness(image).enhance(level), [0, 0.1, 0.55, 1, 1.3, 1.9]),
}


def apply(name: str, images: Tensor, levels: list[float]) -> Tensor:
    return getattr(photometric, name)(images, torch.tensor(levels).view(-1, 1, 1, 1))


def by_pillow(name: str, images: Tensor, levels: list[float]) -> Tensor:
    peer = OPERATIONS[name][0]
    pairs = zip(images, levels, strict=True)
    return torch.stack([from_pillow(peer(to_pillow(image), level)) for image, level in pairs])


@pytest.fixture(scope="module")
def images(tiles: Tensor) -> Tensor:
    """Real images, and hard ones: one value, two values, very dark, one channel empty."""
    hard = tiles[:5].clone()
    hard[0] = 77
    hard[1] = torch.where(hard[1] > 100, 200, 3)
    hard[2] = hard[2] // 64
    hard[3, 1] = 0
    hard[4, :, 0, 0] = 255
    return torch.cat((tiles[:24], hard))


def test_there_is_a_peer_for_each_operation() -> None:
    assert list(OPERATIONS) == list(PHOTOMETRIC)


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_are_pillows_to_the_bit(name: str, images: Tensor) -> None:
    before = images.clone()
    for level in OPERATIONS[name][1]:
        levels = [level] * len(images)
        result = apply(name, images, levels)
        assert result.dtype == torch.uint8
        assert torch.equal(result, by_pillow(name, images, levels))
        assert torch.equal(images, before)


def test_photographs_of_ordinary_size(photographs: list[Image.Image]) -> None:
    images = torch.stack([from_pillow(photograph.resize((224, 160))) for photograph in photographs])
    for name, (_, levels) in OPERATIONS.items():
        assert torch.equal(apply(name, images, levels[-1:] * 2), by_pillow(name, images, levels[-1:] * 2)), name


@pytest.mark.parametrize(
    "name", ["posterize", "solarize", "solarize_add", "brightness", "contrast", "color", "sharpness"]
)
def test_each_image_has_its_own_level(name: str, images: Tensor) -> None:
    levels = [OPERATIONS[name][1][place % len(OPERATIONS[name][1])] for place in range(len(images))]
    assert torch.equal(apply(name, images, levels), by_pillow(name, images, levels))


def test_gray_is_pillows(images: Tensor) -> None:
    expected = torch.stack([torch.from_numpy(np.array(to_pillow(image).convert("L"))) for image in images])
    assert torch.equal(photometric.gray(images.float()).squeeze(1), expected.float())


def test_histogram_counts(images: Tensor) -> None:
    counts = photometric.histogram(images.flatten(2).long())
    assert counts.shape == (len(images), 3, 256)
    assert counts[7, 2].tolist() == np.bincount(images[7, 2].flatten(), minlength=256).tolist()


def test_sharpness_leaves_images_without_an_inside_alone() -> None:
    thin = torch.randint(0, 256, (2, 3, 2, 9), dtype=torch.uint8)
    assert torch.equal(photometric.sharpness(thin, torch.full((2, 1, 1, 1), 1.9)), thin)
