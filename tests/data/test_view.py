import io
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import Compose, InterpolationMode, Resize

from moa_train.data.box import Box
from moa_train.data.counter import sample_keys
from moa_train.data.image import EncodedImage
from moa_train.data.view import CenterCrop, RandomResizedCrop, resized_crop

NOTHING = np.empty(0)


def jpeg(photograph: Image.Image, size: tuple[int, int] | None = None, quality: int = 90) -> EncodedImage:
    file = io.BytesIO()
    (photograph.resize(size) if size else photograph).save(file, "JPEG", quality=quality)
    return EncodedImage(file.getvalue())


def pillow(image: EncodedImage) -> Image.Image:
    return Image.fromarray(image.decode().permute(1, 2, 0).numpy())


def tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@pytest.mark.parametrize("size", [(640, 427), (427, 640), (500, 333), (300, 300), (224, 1000), (120, 90)])
@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_evaluation_is_pillows_to_two_levels(photographs: list[Image.Image], size: tuple[int, int], mode: str) -> None:
    """The bound that docs/PERFORMANCE.md states: no pixel differs by more than 2 of 255, 1 in 100 by more than 1."""
    peer = Compose([Resize(256, InterpolationMode(mode)), transforms.CenterCrop(224)])
    for photograph in photographs:
        image = jpeg(photograph, size)
        result = CenterCrop((224, 224), 0.875, mode)(image, NOTHING)
        difference = (result.int() - tensor(peer(pillow(image))).int()).abs()
        assert difference.max() <= 2
        assert (difference > 1).float().mean() < 0.01


def test_a_trained_model_is_as_good_on_pillows_pixels() -> None:
    """Logistic regression on JPEG files of the digits, trained on our pixels and judged on both."""
    digits = load_digits()
    peer = Compose([Resize(36, InterpolationMode.BICUBIC), transforms.CenterCrop(32)])
    ours, theirs = [], []
    for scan in digits.images:
        image = jpeg(Image.fromarray((scan * 255 / 16).astype(np.uint8)), (50, 44))
        ours.append(CenterCrop((32, 32), 0.875)(image, NOTHING)[0].flatten().numpy() / 255)
        theirs.append(tensor(peer(pillow(image)))[0].flatten().numpy() / 255)
    assert not np.array_equal(ours, theirs)
    model = LogisticRegression(max_iter=200).fit(ours[:1000], digits.target[:1000])
    mine, its = (model.predict(pixels[1000:]) for pixels in (ours, theirs))
    correct = (mine == digits.target[1000:]).sum()
    assert correct > 700  # of 797
    assert abs(correct - (its == digits.target[1000:]).sum()) <= 1
    assert (mine != its).sum() <= 2


@pytest.mark.parametrize(("shape", "size"), [((96, 160), (640, 427)), ((160, 96), (640, 427)), ((64, 64), (20, 400))])
def test_any_shape_is_covered_and_centered(shape: tuple[int, int], size: tuple[int, int]) -> None:
    x, y = np.meshgrid(np.linspace(0, 255, size[0]), np.linspace(0, 255, size[1]))
    ramps = Image.fromarray(np.stack((x, y, x), -1).round().astype(np.uint8))
    result = CenterCrop(shape, 0.875)(jpeg(ramps, quality=100), NOTHING).double()
    assert result.shape == (3, *shape)
    assert float(result[0].mean()) == pytest.approx(127.5, abs=2)
    assert float(result[1].mean()) == pytest.approx(127.5, abs=2)
    scale = max(shape[0] / 0.875 / size[1], shape[1] / 0.875 / size[0])
    slope = float(result[0].mean(0).diff()[4:-4].mean())
    assert slope == pytest.approx(255 / (size[0] - 1) / scale, rel=0.03)


def png(pixels: np.ndarray) -> EncodedImage:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return EncodedImage(file.getvalue())


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("shape", [(2, 60), (60, 2), (3, 101), (1, 400), (31, 900)])
def test_long_images_are_cropped_before_they_are_enlarged(shape: tuple[int, int], mode: str) -> None:
    """As of the whole image, enlarged."""
    image = png(np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8))
    result = CenterCrop((96, 96), 0.875, mode)(image, NOTHING).double()
    scale = max(109 / side for side in shape)
    height, width = (int(scale * side + 1e-6) for side in shape)
    whole = pillow(image).resize((width, height), getattr(Image.Resampling, mode.upper()))
    top, left = round((height - 96) / 2), round((width - 96) / 2)
    expected = tensor(whole.crop((left, top, left + 96, top + 96))).double()
    assert (result - expected).abs().mean() < 1
    assert (result - expected).abs().max() < 12


@pytest.mark.parametrize("size", [(8000, 2), (60_000, 1), (1, 60_000), (1_000_000, 1)])
def test_long_images_take_little_memory(size: tuple[int, int], peak: Callable[..., float]) -> None:
    """Whole, the enlarged image would have up to 200 GB."""
    image = png(np.zeros((size[1], size[0], 3), np.uint8))

    def crop() -> None:
        assert CenterCrop((224, 224))(image, NOTHING).shape == (3, 224, 224)
        view = RandomResizedCrop((224, 224), (0.08, 1.0), (3 / 4, 4 / 3))
        for numbers in view.numbers(sample_keys(0, 0, np.arange(5), 0)):
            assert view(image, numbers).shape == (3, 224, 224)

    assert peak(crop) < 60


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    "box", [Box(0, 0, 427, 640), Box(100, 200, 250, 240), Box(30, 50, 60, 80), Box(426, 639, 1, 1)]
)
def test_crops_are_pillows_to_two_levels(photographs: list[Image.Image], box: Box, mode: str) -> None:
    image = jpeg(photographs[1])
    corners = (box.left, box.top, box.left + box.width, box.top + box.height)
    expected = pillow(image).crop(corners).resize((224, 224), getattr(Image.Resampling, mode.upper()))
    difference = (resized_crop(image, box, (224, 224), mode).int() - tensor(expected).int()).abs()
    assert difference.max() <= 2
    assert (difference > 1).float().mean() < 0.01


@pytest.mark.parametrize(
    ("box", "reduced"), [(Box(0, 0, 427, 640), True), (Box(13, 51, 301, 401), True), (Box(200, 300, 95, 99), False)]
)
def test_large_jpegs_are_decoded_smaller(photographs: list[Image.Image], box: Box, reduced: bool) -> None:
    corners = (box.left, box.top, box.left + box.width, box.top + box.height)
    whole = pillow(jpeg(photographs[0])).crop(corners)
    expected = tensor(whole.resize((64, 48), Image.Resampling.BICUBIC)).double()
    other_filter = tensor(whole.resize((64, 48), Image.Resampling.BILINEAR)).double()
    image = jpeg(photographs[0])
    sizes = []
    decode = image.decode

    def watched(reduction: int) -> Tensor:
        sizes.append(reduction)
        return decode(reduction)

    image.decode = watched  # type: ignore[method-assign]
    result = resized_crop(image, box, (48, 64), "bicubic").double()
    assert (sizes[0] > 1) == reduced
    assert (result - expected).abs().mean() < 1.2 * (other_filter - expected).abs().mean()


def test_random_crops_depend_on_the_key_alone(photographs: list[Image.Image]) -> None:
    image, view = jpeg(photographs[0]), RandomResizedCrop((32, 32), (0.08, 1.0), (3 / 4, 4 / 3))
    numbers = view.numbers(sample_keys(0, 0, np.arange(20), 0))
    crops = [view(image, sample) for sample in numbers]
    alone = view(image, view.numbers(sample_keys(0, 0, np.array([7]), 0))[0])
    assert torch.equal(crops[7], alone)
    assert len({crop.numpy().tobytes() for crop in crops}) == 20
