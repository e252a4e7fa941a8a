import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from torchvision.transforms.v2 import functional as peer

from moa_train.data.counter import sample_keys
from moa_train.data.randaugment import OPERATIONS, RandAugment, affine_map, level_of
from moa_train.schema import AugmentConfig

FILL = torch.tensor([124.0, 116.0, 104.0])
KEYS = sample_keys(0, 0, np.arange(40_000), 0)


def randaugment(ops: int, magnitude: float) -> RandAugment:
    return RandAugment(AugmentConfig(randaugment_ops=ops, randaugment_magnitude=magnitude, randaugment_std=0.5), FILL)


def test_operations_are_equally_likely_and_half_are_left_out() -> None:
    chosen, strength, sign = randaugment(2, 9).draw(KEYS)
    assert chosen.shape == strength.shape == sign.shape == (2, 40_000)
    counts = np.bincount(chosen.flatten() + 1)
    assert stats.binomtest(int(counts[0]), 80_000, 0.5).pvalue > 1e-3
    assert stats.chisquare(counts[1:]).pvalue > 1e-3
    assert stats.binomtest(int((sign < 0).sum()), 80_000, 0.5).pvalue > 1e-3
    assert strength.mean() == pytest.approx(0.89958, abs=1e-3)  # a normal of 9 and 0.5, cut at 10
    assert strength.max() == 1


def test_layers_and_sign_and_strength_are_independent() -> None:
    chosen, strength, sign = randaugment(2, 5).draw(KEYS)
    table = np.stack([*chosen, *strength, *sign])
    assert np.abs(np.corrcoef(table) - np.eye(6)).max() < 4.5 / math.sqrt(table.shape[1])


@pytest.mark.parametrize(
    ("operation", "strength", "sign", "level"),
    [
        ("posterize", 0.9, 1, 1),
        ("posterize", 0.0, 1, 4),
        ("posterize", 1.0, 1, 1),
        ("solarize", 0.9, 1, 26),
        ("solarize_add", 0.9, 1, 99),
        ("contrast", 0.9, 1, 1.81),
        ("color", 0.9, -1, 0.19),
        ("brightness", 1.0, -1, 0.1),
        ("rotate", 0.9, -1, -math.radians(27)),
        ("shear_x", 0.9, 1, 0.27),
        ("translate_y", 0.9, -1, -0.405),
    ],
)
def test_severity_increases_with_strength(operation: str, strength: float, sign: int, level: float) -> None:
    assert level_of(operation, np.array([strength]), np.array([sign]))[0] == pytest.approx(level)


TIMM = {
    "posterize": "PosterizeIncreasing", "solarize": "SolarizeIncreasing", "solarize_add": "SolarizeAdd",
    "contrast": "ContrastIncreasing", "brightness": "BrightnessIncreasing", "color": "ColorIncreasing",
    "sharpness": "SharpnessIncreasing", "rotate": "Rotate", "shear_x": "ShearX", "shear_y": "ShearY",
    "translate_x": "TranslateXRel", "translate_y": "TranslateYRel", "autocontrast": "AutoContrast",
    "equalize": "Equalize", "invert": "Invert",
}  # fmt: skip


def test_operations_and_levels_are_those_of_timms_increasing_recipe() -> None:
    peer = pytest.importorskip("timm.data.auto_augment", reason="timm is not installed")
    assert sorted(TIMM.values()) == sorted(peer._RAND_INCREASING_TRANSFORMS)
    assert set(TIMM) == set(OPERATIONS)
    for operation, name in TIMM.items():
        if (levels := peer.LEVEL_TO_ARG[name]) is None:  # takes none
            continue
        for strength in np.linspace(0, 1, 41):
            theirs = {float(levels(10 * strength, {})[0]) for _ in range(20)}  # of either sign
            signs = np.array([1.0, -1.0])
            ours = level_of(operation, np.full(2, strength), signs)
            if operation == "rotate":
                ours = np.degrees(ours)
            if operation == "posterize":
                theirs = {max(1.0, level) for level in theirs}  # 0 bits are black
            assert sorted(set(ours.round(9))) == pytest.approx(sorted({round(level, 9) for level in theirs}))


def test_each_image_gets_its_operations_in_order(tiles: Tensor) -> None:
    """One image at a time, with torchvision's operations, gives the same pixels to one level a layer."""
    augment = randaugment(2, 9)
    keys = sample_keys(1, 0, np.arange(64), 0)
    layers = list(zip(*augment.draw(keys), strict=True))
    result = augment(tiles, keys)
    compared = 0
    for row, image in enumerate(tiles):
        names = [OPERATIONS[layer[0][row]] if layer[0][row] >= 0 else "none" for layer in layers]
        expected = image[None]
        for name, (_, strength, sign) in zip(names, layers, strict=True):
            level = float(level_of(name, strength[row : row + 1], sign[row : row + 1])[0])
            expected = one(name, expected, level)
        if {"contrast", "equalize", "autocontrast", "solarize"} & set(names[1:]) and names[0] != "none":
            continue  # there, a difference of one in the first layer may become a large one
        compared += 1
        assert (result[row].int() - expected[0].int()).abs().max() <= 2, names
    assert compared > 40


def one(name: str, image: Tensor, level: float) -> Tensor:
    match name:
        case "none":
            return image
        case "autocontrast" | "equalize" | "invert":
            return getattr(peer, name)(image)
        case "posterize":
            return peer.posterize(image, int(level))
        case "solarize":
            return peer.solarize(image, level)
        case "solarize_add":
            return torch.where(image < 128, (image.int() + int(level)).clamp(max=255).to(torch.uint8), image)
        case "contrast" | "brightness" | "sharpness":
            return getattr(peer, f"adjust_{name}")(image, level)
        case "color":
            return peer.adjust_saturation(image, level)
    from moa_train.data.affine import warp  # checked against torchvision in test_geometry

    return warp(image, torch.tensor([affine_map(name, level, 32, 32)]), FILL)


def test_images_without_an_operation_are_untouched(tiles: Tensor) -> None:
    augment = randaugment(1, 9)
    keys = sample_keys(1, 0, np.arange(64), 0)
    left_out = torch.from_numpy(augment.draw(keys)[0][0] < 0)
    assert 20 < left_out.sum() < 44
    assert torch.equal(augment(tiles, keys)[left_out], tiles[left_out])


def test_given_images_stay_as_they_are(tiles: Tensor) -> None:
    before = tiles.clone()
    randaugment(2, 9)(tiles, KEYS[:64])
    assert torch.equal(tiles, before)
