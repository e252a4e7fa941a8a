from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage, stats
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms import RandomErasing as Peer

from moa_train.data.box import Box
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


def test_all_images_at_once_as_on_a_gpu_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    images, keys = torch.zeros(200, 3, 20, 30), sample_keys(0, 0, np.arange(200), 0)
    erase, calls = RandomErasing(0.5), []
    expected = erase(images.clone(), keys)

    def note(images: torch.Tensor, rows: np.ndarray, boxes: list[Box], starts: np.ndarray) -> torch.Tensor:
        calls.append((rows, boxes, starts))
        return images

    monkeypatch.setattr(erase, "_erase_at_once", note)
    erase(images.to("meta"), keys)
    assert torch.equal(RandomErasing(0.5)._erase_at_once(images, *calls[0]), expected)
    assert expected.any()


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_the_number_of_operations_does_not_grow_with_the_batch(probability: float) -> None:
    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.calls += 1
            return operation(*args, **(kwargs or {}))

    calls = []
    for count in (2, 200):
        with Count() as counter:
            RandomErasing(probability)(torch.zeros(count, 3, 20, 30, device="meta"), KEYS[:count])
        calls.append(counter.calls)
    assert calls[0] == calls[1] < 50
