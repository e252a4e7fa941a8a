"""Class maps: how much each pixel of an image contributes to the logit of a class, and how faithful such a map is."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PATH_STEPS = 8
"""Points on the path of `class_map`. More points do not change the areas of `faithfulness` (docs/PREDICT.md)."""
CELLS, CUTS = 16, 16
"""`faithfulness` ranks the cells of a grid of 16 x 16, and changes a sixteenth of them at a time."""


def class_map(model: nn.Module, images_BCHW: Tensor, classes_B: Tensor, steps: int = PATH_STEPS) -> Tensor:
    """Return the contribution of every pixel to the logit of a class, by integrated gradients (arXiv 1703.01365).

    The gradient with respect to the pixels is averaged along the straight path from the mean color of the data set to
    the image, and multiplied by the difference between the two. The map therefore needs no choice of a layer, works
    for every model, and its sum approximates the change of the logit between the two ends of the path.

    Args:
        model: in eval mode, from normalized images to logits (B, K).
        images_BCHW: normalized images, on the device of the model.
        classes_B: the class to explain for each image, int64.
        steps: number of points on the path. Each takes a forward and a backward pass.

    Returns:
        float32, (B, H, W). Positive values are evidence for the class, negative values against it.
    """
    total_BCHW = torch.zeros_like(images_BCHW)
    with torch.enable_grad(), _frozen(model):
        for step in range(steps):
            x_BCHW = (images_BCHW * ((step + 0.5) / steps)).detach().requires_grad_()
            logits_B = model(x_BCHW).gather(1, classes_B[:, None])
            total_BCHW += torch.autograd.grad(logits_B.sum(), x_BCHW)[0]
    return (images_BCHW * total_BCHW / steps).sum(1).float()


@dataclass(frozen=True)
class Faithfulness:
    """Areas under deletion and insertion curves, one per image, float32, (B,).

    Deletion replaces the cells of an image by the mean color, most important cell first; insertion does the reverse.
    The curve is the probability of the class over the fraction of changed cells. A faithful map has a small deletion
    area and a large insertion area, compared with those of a random order.
    """

    deletion: Tensor
    insertion: Tensor
    random_deletion: Tensor
    random_insertion: Tensor

    @classmethod
    def concatenate(cls, parts: Sequence["Faithfulness"]) -> "Faithfulness":
        """Join the results of several batches."""
        return cls(*(torch.cat(column) for column in zip(*(vars(part).values() for part in parts), strict=True)))

    def __str__(self) -> str:
        """Describe the means, with the standard error of each difference from the random order."""
        parts = []
        for name, own_B, random_B in (
            ("deletion", self.deletion, self.random_deletion),
            ("insertion", self.insertion, self.random_insertion),
        ):
            difference_B = own_B - random_B
            error = f" +- {difference_B.std() / len(own_B) ** 0.5:.3f}" if len(own_B) > 1 else ""
            parts.append(
                f"{name} area {own_B.mean():.3f}, random order {random_B.mean():.3f} "
                f"(difference {difference_B.mean():+.3f}{error})"
            )
        count = len(self.deletion)
        return f"{'; '.join(parts)}; {count} image{'s' * (count != 1)}"


@torch.inference_mode()
def faithfulness(
    model: nn.Module, images_BCHW: Tensor, classes_B: Tensor, maps_BHW: Tensor, seed: int = 0
) -> Faithfulness:
    """Measure the deletion and insertion curves (arXiv 1806.07421) of class maps, and those of a random order.

    Args:
        model: in eval mode, from normalized images to logits (B, K).
        images_BCHW: normalized images, on the device of the model.
        classes_B: the class that each map explains.
        maps_BHW: the maps.
        seed: of the random order.
    """
    cells_BGG = F.adaptive_avg_pool2d(maps_BHW[:, None], CELLS)[:, 0]
    random_BGG = torch.rand(cells_BGG.shape, generator=torch.Generator().manual_seed(seed)).to(cells_BGG.device)

    def areas(importance_BGG: Tensor) -> tuple[Tensor, Tensor]:
        order_BL = importance_BGG.flatten(1).argsort(1, descending=True)
        rank_B1GG = order_BL.argsort(1).view(-1, 1, CELLS, CELLS).float()
        rank_B1HW = F.interpolate(rank_B1GG, images_BCHW.shape[2:], mode="nearest")
        curves: tuple[list[Tensor], list[Tensor]] = ([], [])
        for cut in range(CUTS + 1):
            changed_B1HW = rank_B1HW < cut * CELLS**2 / CUTS
            for curve, keep_B1HW in zip(curves, (~changed_B1HW, changed_B1HW), strict=True):
                logits_BK = model(images_BCHW * keep_B1HW).float()  # 0 is the mean color
                curve.append(logits_BK.softmax(1).gather(1, classes_B[:, None])[:, 0])
        deletion_B, insertion_B = (torch.trapezoid(torch.stack(curve), dim=0) / CUTS for curve in curves)
        return deletion_B, insertion_B

    return Faithfulness(*(area_B.cpu() for area_B in (*areas(cells_BGG), *areas(random_BGG))))


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Compute no gradients of the parameters in this context."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
