import numpy as np
import pytest
import torch
from scipy import ndimage, stats
from torchvision.transforms import RandomErasing as Peer

from moa_train.data.counter import sample_keys
from moa_train.data.erasing import AREA, RATIO, RandomErasing

COUNT = 3000
KEYS = sample_keys(0, 0, np.arange(COUNT), 0)


@pytest.fixture(scope="module")
def erased() -> torch.Tensor:
    return RandomErasing(0.25)(torch.full((COUNT, 3, 32, 32), 100.0), KEYS)


def areas(images: torch.Tensor) -> np.ndarray:
    return (images[:, 0] != 100).flatten(1).sum(1).numpy()


def test_as_many_images_are_erased_as_asked_for(erased: torch.Tensor) -> None:
    assert stats.binomtest(int((areas(erased) > 0).sum()), COUNT, 0.25).pvalue > 1e-3


def test_one_rectangle_in_all_channels(erased: torch.Tensor) -> None:
    for image in erased[torch.from_numpy(areas(erased) > 0)][:100]:
        inside = (image != 100).numpy()
        assert (inside == inside[0]).all()
        rows, columns = np.flatnonzero(inside[0].any(1)), np.flatnonzero(inside[0].any(0))
        assert ndimage.label(inside[0])[1] == 1
        assert inside[0].sum() == len(rows) * len(columns)


def test_areas_have_torchvisions_distribution(erased: torch.Tensor) -> None:
    torch.manual_seed(0)
    peer = Peer(p=1, scale=AREA, ratio=RATIO, value="random")
    theirs = areas(torch.stack([peer(torch.full((3, 32, 32), 100.0)) for _ in range(800)]))
    ours = areas(erased)
    assert stats.ks_2samp(ours[ours > 0], theirs).pvalue > 1e-3


def test_noise_is_normal_and_differs_by_pixel_channel_and_image(erased: torch.Tensor) -> None:
    pixels = erased[erased != 100].numpy()
    assert pixels.mean() == pytest.approx(0, abs=0.02)
    assert pixels.std() == pytest.approx(1, abs=0.02)
    assert stats.kstest(np.unique(pixels), "norm").pvalue > 1e-3
    first, second = erased[torch.from_numpy(areas(erased) > 50)][:2]
    assert not set(first[first != 100].tolist()[:20]) & set(second[second != 100].tolist()[:20])


def test_probability_0_and_1() -> None:
    images = torch.full((50, 3, 20, 28), 100.0)
    assert (areas(RandomErasing(0.0)(images.clone(), KEYS[:50])) == 0).all()
    assert (areas(RandomErasing(1.0)(images.clone(), KEYS[:50])) > 0).all()


def test_slices_of_tensors_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU arrays are sliced in place of tensors, elsewhere the tensors themselves."""
    images = torch.zeros(200, 3, 20, 30)
    expected = RandomErasing(0.5)(images.clone(), sample_keys(0, 0, np.arange(200), 0))
    monkeypatch.setattr("moa_train.data.erasing._to_slice", lambda tensor: tensor)
    assert torch.equal(RandomErasing(0.5)(images, sample_keys(0, 0, np.arange(200), 0)), expected)
    assert expected.any()
