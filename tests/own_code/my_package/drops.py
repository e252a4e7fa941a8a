"""An augmentation: some images lose their upper half."""

from dataclasses import dataclass

import torch
from torch import Tensor

from moa_train.data.batch import send
from moa_train.data.counter import Hashes, uniform
from moa_train.knobs import knob


@dataclass
class DropArgs:
    probability: float = knob(0.5, "probability that an image loses its upper half", least=0, most=1)


def drop_top(images_BCHW: Tensor, keys: Hashes, args: DropArgs) -> Tensor:
    """Take uint8 images and one random key per image, and return uint8 images of the same shape."""
    chosen = send(uniform(keys) < args.probability, images_BCHW).view(-1, 1, 1, 1)  # the same at any number of ranks
    half = images_BCHW.shape[2] // 2
    top = torch.where(chosen, 0, images_BCHW[:, :, :half])
    return torch.cat([top, images_BCHW[:, :, half:]], dim=2)
