import numpy as np
import pytest
import torch

from moa_train.data.dataset import open_split
from moa_train.data.digits import Digits
from moa_train.data.loader import EvalLoader
from moa_train.data.statistics import channel_statistics
from moa_train.schema import DataConfig


@pytest.mark.parametrize("batch_size", [1, 100, 5000])
def test_they_are_those_of_all_pixels(batch_size: int) -> None:
    source = open_split(DataConfig(name="digits", image_size=[9, 7]), "test")
    values = source.gather(np.arange(len(source))).double() / 255  # type: ignore[union-attr]
    mean, std = channel_statistics(EvalLoader(source, batch_size=batch_size))
    torch.testing.assert_close(torch.tensor(mean).double(), values.mean((0, 2, 3)), atol=1e-7, rtol=0)
    torch.testing.assert_close(torch.tensor(std).double(), values.std((0, 2, 3), correction=0), atol=1e-7, rtol=0)


def test_those_of_digits_are_right() -> None:
    source = open_split(DataConfig(name="digits", image_size=32), "train")
    mean, std = channel_statistics(EvalLoader(source, batch_size=200))
    assert Digits.mean == pytest.approx(mean, abs=5e-4)
    assert Digits.std == pytest.approx(std, abs=5e-4)
