import numpy as np
import pytest
import torch
from scipy import stats
from torchvision.transforms import RandomResizedCrop

from moa_train.data.box import box_numbers, random_box
from moa_train.data.counter import Purpose, sample_keys

COUNT = 4000


@pytest.mark.parametrize(
    ("size", "scale", "ratio"),
    [
        ((375, 500), (0.08, 1.0), (3 / 4, 4 / 3)),
        ((32, 32), (0.3, 1.0), (3 / 4, 4 / 3)),
        ((40, 400), (0.2, 1.0), (3 / 4, 4 / 3)),  # rarely fits: the fallback
    ],
)
def test_rectangles_have_torchvisions_distribution(
    size: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float]
) -> None:
    numbers = box_numbers(sample_keys(0, 0, np.arange(COUNT), 0), Purpose.CROP)
    ours = np.array([random_box(size, scale, ratio, sample) for sample in numbers])
    torch.manual_seed(0)
    image = torch.empty(3, *size)
    theirs = np.array([RandomResizedCrop.get_params(image, list(scale), list(ratio)) for _ in range(COUNT)])
    for column in range(4):
        assert stats.ks_2samp(ours[:, column], theirs[:, column]).pvalue > 1e-3
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, 2:] >= 1).all()
    assert (ours[:, :2] + ours[:, 2:] <= size).all()


def test_every_corner_can_be_reached() -> None:
    numbers = box_numbers(sample_keys(0, 0, np.arange(COUNT), 0), Purpose.CROP)
    boxes = {random_box((4, 4), (0.25, 0.25), (1.0, 1.0), sample)[:2] for sample in numbers}
    assert boxes == {(top, left) for top in range(3) for left in range(3)}
