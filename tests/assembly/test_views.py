"""Averaging over views: every view is what it claims to be, and the probabilities are averaged."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from moa_train.assembly.inputs import build_eval_loader
from moa_train.assembly.views import Averaged, Views, crops
from moa_train.data.array_source import ArraySource
from moa_train.data.file_source import FileSource
from moa_train.data.tree import scan
from moa_train.runtime.distributed import Distributed
from moa_train.runtime.errors import UserError
from moa_train.schema import RunConfig


class Corner(nn.Module):
    """Its logits depend on the first pixel and on the width of the images only."""

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        return torch.stack([images_BCHW[:, 0, 0, 0], images_BCHW[:, 0, 0, 0] * 0 + images_BCHW.shape[3] / 10], 1)


def config(size: int, crop: float = 0.875) -> RunConfig:
    run = RunConfig()
    run.data.image_size, run.data.eval_crop = size, crop
    run.data.mean, run.data.std = [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]
    run.data.workers = 0
    return run


def batches(views: Views) -> list[torch.Tensor]:
    with Distributed.start("cpu", 60) as distributed:
        return [views.transform(batch) for batch in build_eval_loader(views.config, views.source, distributed)]


def test_mirror_images_are_averaged():
    images = torch.rand(5, 3, 4, 6)
    model = Corner()
    expected = (model(images).softmax(1) + model(images.flip(3)).softmax(1)) / 2
    assert torch.allclose(Averaged(model)(images).exp(), expected)
    assert Averaged(model).train().eval().model.training is False


def test_five_crops_and_their_mirror_images_are_averaged():
    images = torch.rand(2, 3, 6, 8)
    model = Corner()
    views = [
        part
        for top, left in ((1, 1), (0, 0), (0, 2), (2, 0), (2, 2))
        for part in (images[:, :, top : top + 4, left : left + 6], images[:, :, top : top + 4, left : left + 6].flip(3))
    ]
    expected = torch.stack([model(view).softmax(1) for view in views]).mean(0)
    assert torch.allclose(Averaged(model, (4, 6))(images).exp(), expected)


def test_images_in_memory_are_shifted_by_a_sixteenth():
    pixels = np.random.default_rng(0).integers(1, 256, (3, 3, 32, 32), dtype=np.uint8)
    views = Views.plan("crops", config(32), ArraySource("x/test", pixels, [0, 1, 0], ["a", "b"], (32, 32)))
    (images,) = batches(views)
    center, first, *_, last = crops(images, (32, 32))
    whole = torch.from_numpy(pixels) / 255
    assert torch.allclose(center, whole)
    assert torch.allclose(first[:, :, 2:, 2:], whole[:, :, :-2, :-2])
    assert torch.allclose(last[:, :, :-2, :-2], whole[:, :, 2:, 2:])
    assert (first[:, :, :2] == 0).all()


def test_the_center_crop_of_files_is_the_usual_one(tmp_path):
    (tmp_path / "a").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (90, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a" / "1.png")
    source = FileSource("x/test", scan(tmp_path), (56, 56))
    (usual,) = batches(Views.plan("none", config(56), source))
    (wide,) = batches(Views.plan("crops", config(56), source))
    assert wide.shape[2:] == (64, 64)
    assert torch.equal(crops(wide, (56, 56))[0], usual)
    with pytest.raises(UserError, match="tta=crops needs a margin"):
        Views.plan("crops", config(56, crop=1.0), source)
