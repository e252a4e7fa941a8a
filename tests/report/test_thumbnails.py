"""Thumbnails show the pixels that the model receives."""

import base64
import io

import numpy as np
import torch
from PIL import Image

from moa_train.data.array_source import ArraySource
from moa_train.data.file_source import FileSource
from moa_train.data.tree import scan
from moa_train.report.thumbnails import overlay, thumbnails


def decoded(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text)))


def test_thumbnails_of_arrays_and_of_files(tmp_path):
    ramp = np.linspace(0, 255, 32).astype(np.uint8)
    images = np.broadcast_to(ramp, (3, 3, 32, 32)).copy()
    found = thumbnails(ArraySource("x", images, [0, 0, 0], ["a"], (32, 32)), [2, 0], 1.0, 10**6)
    assert list(found) == [2, 0]
    shown = np.asarray(decoded(found[2]).convert("RGB"), float)
    assert shown.shape == (32, 32, 3)
    assert np.abs(shown - images[0].transpose(1, 2, 0)).max() < 20  # WebP is lossy
    (tmp_path / "a").mkdir()
    Image.new("RGB", (400, 200), (10, 200, 30)).save(tmp_path / "a" / "1.png")
    (text,) = thumbnails(FileSource("y", scan(tmp_path), (224, 224)), [0], 0.875, 10**6).values()
    assert decoded(text).size == (96, 96)
    assert np.abs(np.asarray(decoded(text).convert("RGB"))[40, 40].astype(int) - [10, 200, 30]).max() < 8


def test_the_budget_is_kept():
    images = np.random.default_rng(0).integers(0, 256, (200, 3, 32, 32), dtype=np.uint8)
    source = ArraySource("x", images, np.zeros(200, int), ["a"], (32, 32))
    found = thumbnails(source, range(200), 1.0, 20_000)
    assert 3 < len(found) < 150
    assert sum(map(len, found.values())) <= 20_000
    assert list(found) == list(range(len(found)))


def test_overlays_are_bright_only_where_there_is_evidence():
    weight = torch.zeros(32, 32)
    weight[8:16, 8:16] = 1
    weight[24:, 24:] = -1
    image = torch.full((3, 32, 32), 100, dtype=torch.uint8)
    found = overlay(image, weight)
    assert found[0, 12, 12] > 150
    assert (found[:, 28, 28] == 40).all()
