"""Every operation against Pillow, on real images: equal to the bit."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from moa_train.data import photometric

Peer = Callable[[Image.Image, float], Image.Image]


def to_pillow(image: Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def from_pillow(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def solarize_add(image: Image.Image, amount: float) -> Image.Image:
    return image.point([min(255, value + int(amount)) if value < 128 else value for value in range(256)] * 3)


HOST_TABLES: dict[str, tuple[Peer, list[float]]] = {
    "invert": (lambda image, level: ImageOps.invert(image), [0]),
    "posterize": (lambda image, level: ImageOps.posterize(image, int(level)), [1, 2, 3, 4, 8]),
    "solarize": (lambda image, level: ImageOps.solarize(image, int(level)), [0, 1, 26, 128, 255, 256]),
    "solarize_add": (solarize_add, [0, 1, 50, 110]),
    "brightness": (lambda image, level: ImageEnhance.Brightness(image).enhance(level), [0, 0.1, 0.55, 1, 1.3, 1.9]),
}
TABLES: dict[str, tuple[Peer, list[float]]] = {
    "contrast": (lambda image, level: ImageEnhance.Contrast(image).enhance(level), [0, 0.1, 0.55, 1, 1.3, 1.9]),
    "autocontrast": (lambda image, level: ImageOps.autocontrast(image), [0]),
    "equalize": (lambda image, level: ImageOps.equalize(image), [0]),
}
IMAGES: dict[str, tuple[Peer, list[float]]] = {
    "colour": (lambda image, level: ImageEnhance.Color(image).enhance(level), [0, 0.1, 0.55, 1, 1.3, 1.9]),
    "sharpness": (lambda image, level: ImageEnhance.Sharpness(image).enhance(level), [0, 0.1, 0.55, 1, 1.3, 1.9]),
}


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


@pytest.mark.parametrize("name", HOST_TABLES)
def test_tables_of_the_level_alone_are_pillows_to_the_bit(name: str, images: Tensor) -> None:
    peer, levels = HOST_TABLES[name]
    tables = torch.from_numpy(np.array(getattr(photometric, name)(np.array(levels)[:, None])))
    assert tables.shape == (len(levels), 256)
    for level, table in zip(levels, tables, strict=True):
        result = photometric.look_up(images, table[None, None])
        assert result.dtype == torch.uint8
        assert torch.equal(result, torch.stack([from_pillow(peer(to_pillow(image), level)) for image in images]))


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_pillows_to_the_bit(name: str, images: Tensor) -> None:
    peer, levels = TABLES[name]
    for level in levels:
        table = getattr(photometric, name)(images, torch.full((len(images), 1, 1), level))
        result = photometric.look_up(images, table)
        assert result.dtype == torch.uint8
        assert torch.equal(result, torch.stack([from_pillow(peer(to_pillow(image), level)) for image in images]))


@pytest.mark.parametrize("name", IMAGES)
def test_images_are_pillows_to_the_bit(name: str, images: Tensor) -> None:
    peer, levels = IMAGES[name]
    for level in levels:
        result = getattr(photometric, name)(images, torch.full((len(images), 1, 1, 1), level))
        assert torch.equal(result, torch.stack([from_pillow(peer(to_pillow(image), level)) for image in images]))


def test_photographs_of_ordinary_size(photographs: list[Image.Image]) -> None:
    images = torch.stack([from_pillow(photograph.resize((224, 160))) for photograph in photographs])
    for name, (peer, levels) in TABLES.items():
        table = getattr(photometric, name)(images, torch.full((2, 1, 1), levels[-1]))
        expected = torch.stack([from_pillow(peer(to_pillow(image), levels[-1])) for image in images])
        assert torch.equal(photometric.look_up(images, table), expected), name


def test_each_image_has_its_own_level(images: Tensor) -> None:
    levels = torch.linspace(0.1, 1.9, len(images))
    result = photometric.look_up(images, photometric.contrast(images, levels.view(-1, 1, 1)))
    peer = TABLES["contrast"][0]
    expected = [from_pillow(peer(to_pillow(i), v)) for i, v in zip(images, levels.tolist(), strict=True)]
    assert torch.equal(result, torch.stack(expected))


def test_grey_is_pillows(images: Tensor) -> None:
    expected = torch.stack([torch.from_numpy(np.array(to_pillow(image).convert("L"))) for image in images])
    assert torch.equal(photometric.grey(images).squeeze(1), expected)


def test_histogram_counts(images: Tensor) -> None:
    counts = photometric.histogram(images)
    assert counts.shape == (len(images), 3, 256)
    assert counts[7, 2].tolist() == np.bincount(images[7, 2].flatten(), minlength=256).tolist()


def test_sharpness_leaves_images_without_an_inside_alone() -> None:
    thin = torch.randint(0, 256, (2, 3, 2, 9), dtype=torch.uint8)
    assert torch.equal(photometric.sharpness(thin, torch.full((2, 1, 1, 1), 1.9)), thin)
