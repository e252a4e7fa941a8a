"""Thumbnails show the pixels that the model receives."""

import base64
import io

import numpy as np
import torch
from PIL import Image

from moa_train.data.array_source import ArraySource
from moa_train.data.file_source import FileSource
from moa_train.data.tree import scan
from moa_train.report.thumbnails import Sheets, overlay


def sheet(text: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))), float)


def test_sheets_hold_the_images_row_by_row():
    ramp = np.linspace(0, 255, 32).astype(np.uint8)
    images = np.broadcast_to(ramp, (20, 3, 32, 32)).copy()
    images[17] = 255 - images[17]
    found = Sheets.of(ArraySource("x", images, [0] * 20, ["a"], (32, 32)), [*range(19), 19], 1.0, 10**6)
    assert found.places[17] == (0, 17)
    pixels = sheet(found.files[0])
    assert pixels.shape == (64, 16 * 32, 3)
    for row in range(20):
        top, left = 32 * (row // 16), 32 * (row % 16)
        difference = pixels[top : top + 32, left : left + 32] - images[row].transpose(1, 2, 0)
        assert np.abs(difference).max() < 20  # JPEG is lossy


def test_files_are_shown_as_the_model_sees_them(tmp_path):
    (tmp_path / "a").mkdir()
    pixels = np.zeros((200, 400, 3), np.uint8)
    pixels[:, 200:] = 255  # the crop is central, so the edge is in its middle
    Image.fromarray(pixels).save(tmp_path / "a" / "1.png")
    found = Sheets.of(FileSource("y", scan(tmp_path), (224, 224)), [0], 0.875, 10**6)
    assert found.size == (96, 96)
    shown = sheet(found.files[0])
    assert shown[48, 40].max() < 12
    assert shown[48, 56].min() > 243


def test_the_budget_is_kept():
    images = np.random.default_rng(0).integers(0, 256, (800, 3, 32, 32), dtype=np.uint8)
    source = ArraySource("x", images, np.zeros(800, int), ["a"], (32, 32))
    one = len(Sheets.of(source, range(256), 1.0, 0).files[0])
    found = Sheets.of(source, range(800), 1.0, int(2.5 * one))
    assert len(found.files) == 2
    assert list(found.places) == list(range(512))


def test_overlays_are_bright_only_where_there_is_evidence():
    weight = torch.zeros(32, 32)
    weight[8:16, 8:16] = 1
    weight[24:, 24:] = -1
    image = torch.full((3, 32, 32), 100, dtype=torch.uint8)
    found = overlay(image, weight)
    assert found[0, 12, 12] > 150
    assert (found[:, 28, 28] == 40).all()
