"""Channel means and deviations of the data sets, of pixels in 0..1."""

from typing import NamedTuple


class Statistics(NamedTuple):
    """Per-channel mean and standard deviation."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


IMAGENET = Statistics((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
STATISTICS = {
    "digits": Statistics((0.306,) * 3, (0.333,) * 3),
    "cifar10": Statistics((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": Statistics((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "imagenet": IMAGENET,
    "folder": IMAGENET,
}
