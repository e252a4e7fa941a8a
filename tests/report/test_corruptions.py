"""Corruptions are deterministic for each image, and grow with the severity."""

import numpy as np
import pytest
import torch

from moa_train.report.corruptions import CORRUPTIONS, corrupt


@pytest.fixture(scope="module", params=[32, 96])
def images(request) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(6, 3, 8, 8, generator=generator)
    fine = torch.rand(6, 3, request.param, request.param, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (request.param, request.param), mode="bicubic").clamp(0, 1)
    return (255 * (0.8 * smooth + 0.2 * fine)).to(torch.uint8)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_the_error_grows_with_the_severity(images, name):
    index = np.arange(len(images))
    error = [float((corrupt(images, index, name, s).float() - images.float()).square().mean()) for s in range(1, 6)]
    assert 0 < error[0] < error[2] < error[4]
    if name != "pixelate":  # its small reductions do not divide the image evenly
        assert error == sorted(error)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_the_batch_does_not_matter(images, name):
    index = np.array([5, 3, 9, 1, 4, 7])
    whole = corrupt(images, index, name, 3)
    assert whole.dtype == torch.uint8
    assert whole.shape == images.shape
    alone = [corrupt(images[k : k + 1], index[k : k + 1], name, 3) for k in range(6)]
    assert torch.equal(whole, torch.cat(alone))


def test_images_get_different_noise(images):
    same = images[:1].expand(2, -1, -1, -1)
    first, second = corrupt(same, np.array([0, 1]), "gaussian_noise", 1)
    assert not torch.equal(first, second)


def test_the_noise_has_the_stated_standard_deviation():
    gray = torch.full((4, 3, 32, 32), 128, dtype=torch.uint8)
    noise = corrupt(gray, np.arange(4), "gaussian_noise", 5).float() - 128
    assert noise.std() / 255 == pytest.approx(0.10, rel=0.03)


def test_the_blur_agrees_with_torchvision():
    from torchvision.transforms.functional import gaussian_blur

    image = torch.randint(0, 256, (1, 3, 96, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = gaussian_blur(image.float(), [25, 25], [3.0, 3.0]).round()
    assert (corrupt(image, np.array([0]), "gaussian_blur", 3).float() - expected).abs().max() <= 1
