import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as peer

from moa_train.data.affine import pad_crop, warp
from moa_train.data.randaugment import affine_map

FILL = torch.tensor([124.0, 116.0, 104.0])


def test_pad_crop_is_padding_then_slicing(tiles: Tensor) -> None:
    images = tiles[:20, :, :30]  # not square
    top, left = torch.randint(0, 9, (2, 20), generator=torch.Generator().manual_seed(0))
    top[0], left[0], top[1], left[1] = 0, 0, 8, 8
    result = pad_crop(images, 4, top, left)
    for image, y, x, got in zip(images, top.tolist(), left.tolist(), result, strict=True):
        padded = np.pad(image.numpy(), ((0, 0), (4, 4), (4, 4)))
        assert np.array_equal(got.numpy(), padded[:, y : y + 30, x : x + 32])


def test_no_padding_is_no_crop(tiles: Tensor) -> None:
    nowhere = torch.zeros(len(tiles), dtype=torch.int64)
    assert torch.equal(pad_crop(tiles, 0, nowhere, nowhere), tiles)


@pytest.mark.parametrize("operation", ["rotate", "shear_x", "shear_y", "translate_x", "translate_y"])
@pytest.mark.parametrize("level", [-0.45, -0.1, 0.0, 0.27])
def test_operations_are_pillows_on_a_canvas_to_one_level(tiles: Tensor, operation: str, level: float) -> None:
    images = tiles[:16, :, 2:]  # 30 x 32
    map_23 = torch.tensor(affine_map(operation, level, 30, 32))
    result = warp(images, map_23.expand(16, 2, 3), FILL)
    expected = torch.stack([on_canvas(image, map_23) for image in images])
    assert (result.int() - expected.int()).abs().max() <= 1
    if level == 0:
        assert torch.equal(result, images)


def on_canvas(image: Tensor, map_23: Tensor, border: int = 30) -> Tensor:
    """Pillow's transform of an image with a wide border of the fill."""
    _, height, width = image.shape
    canvas = Image.new("RGB", (width + 2 * border, height + 2 * border), tuple(FILL.int().tolist()))
    canvas.paste(Image.fromarray(image.permute(1, 2, 0).numpy()), (border, border))
    matrix = map_23[:, :2].double()
    shift = map_23[:, 2].double() + border - matrix @ torch.full((2,), float(border), dtype=torch.float64)
    six = [*matrix[0].tolist(), shift[0].item(), *matrix[1].tolist(), shift[1].item()]
    moved = canvas.transform(canvas.size, Image.Transform.AFFINE, six, Image.Resampling.BILINEAR)
    inner = moved.crop((border, border, border + width, border + height))
    return torch.from_numpy(np.array(inner)).permute(2, 0, 1)


@pytest.mark.parametrize("level", [-0.45, 0.27])
def test_direction_and_center_are_torchvisions(tiles: Tensor, level: float) -> None:
    """Inside of the moved image, where torchvision's treatment of its border does not show."""
    degrees, slope = float(np.degrees(level)), float(np.degrees(np.arctan(level)))
    settings = {"interpolation": InterpolationMode.BILINEAR, "fill": [0.0]}
    peers = {
        "rotate": lambda images: peer.rotate(images, degrees, **settings),
        "shear_x": lambda images: peer.affine(images, 0.0, [0, 0], 1.0, [slope, 0.0], center=[0.0, 0.0], **settings),
        "shear_y": lambda images: peer.affine(images, 0.0, [0, 0], 1.0, [0.0, slope], center=[0.0, 0.0], **settings),
    }
    for operation, expected in peers.items():
        inside = expected(torch.full_like(tiles[:16], 255)) == 255
        result = warp(tiles[:16], torch.tensor(affine_map(operation, level, 32, 32)).expand(16, 2, 3), FILL)
        difference = (result.int() - expected(tiles[:16]).int()).abs()
        assert difference[inside].max() <= 1
        assert inside.float().mean() > 0.6


def test_crops_are_enlarged_without_a_border(tiles: Tensor) -> None:
    maps = torch.tensor([[[0.5, 0.0, 8.0], [0.0, 0.25, 4.0]]])  # 16 x 8 pixels from (8, 4)
    result = warp(tiles[:1], maps)
    box = Image.fromarray(tiles[0].permute(1, 2, 0).numpy()).resize((32, 32), Image.Resampling.BILINEAR, (8, 4, 24, 12))
    expected = torch.from_numpy(np.array(box)).permute(2, 0, 1)
    inner = (slice(None), slice(4, -4), slice(4, -4))  # Pillow's box ends the image, a map does not
    assert (result[0].int() - expected.int())[inner].abs().max() <= 1


def test_bicubic_stays_in_range() -> None:
    checks = (torch.arange(32)[:, None] + torch.arange(32)) // 4 % 2 * 255
    images = checks.to(torch.uint8).expand(1, 3, 32, 32)
    maps = torch.tensor([[[0.3, 0.0, 3.0], [0.0, 0.3, 5.0]]])
    result = warp(images, maps, interpolation="bicubic").int()
    assert {0, 255} <= set(result.unique().tolist())  # overshoot is cut, not wrapped around
    assert (result[0, 0, 1:, 1:] - result[0, 0, :-1, :-1]).abs().max() < 200
