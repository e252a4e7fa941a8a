from collections.abc import Iterator

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from torchvision.transforms import v2

from moa_train.data.mix import Mixer
from moa_train.schema import AugmentConfig

CLASSES = 10
LABELS = torch.arange(64) % CLASSES
IMAGES = torch.arange(64.0).view(-1, 1, 1, 1).expand(-1, 3, 16, 24).contiguous()  # the value identifies the image


def mixer(num_classes: int = CLASSES, **settings: float) -> Mixer:
    return Mixer(AugmentConfig(**{"mixup": 0.8, "cutmix": 1.0, "label_smoothing": 0.1, **settings}), num_classes)


def mixed(
    mix: Mixer, images: Tensor, labels: Tensor, key: tuple[int, int, int], strong: bool = True
) -> tuple[Tensor, Tensor]:
    """Mix images and their smoothed labels."""
    return mix(images, mix.smooth(labels), key, strong)


@pytest.fixture(autouse=True)
def no_test_changes_the_images() -> Iterator[None]:
    yield
    assert torch.equal(IMAGES[:, 0, 0, 0], torch.arange(64.0))


def kept(images: Tensor, smoothed: Tensor, targets: Tensor) -> float:
    """Return the weight of an image's own target, estimated by least squares."""
    own, other = smoothed, smoothed.flip(0)
    return float(((targets - other) * (own - other)).sum() / (own - other).square().sum())


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_without_mixing_targets_are_smoothed_one_hots(smoothing: float) -> None:
    images, targets = mixed(mixer(mixup=0, cutmix=0, label_smoothing=smoothing), IMAGES, LABELS, (0, 0, 0))
    assert torch.equal(images, IMAGES)
    expected = torch.nn.functional.one_hot(LABELS, CLASSES) * (1 - smoothing) + smoothing / CLASSES
    torch.testing.assert_close(targets, expected.float())
    assert targets.dtype == torch.float32


def test_smoothed_targets_give_torchs_smoothed_loss() -> None:
    logits = torch.randn(64, CLASSES, generator=torch.Generator().manual_seed(0))
    _, targets = mixed(mixer(mixup=0, cutmix=0, label_smoothing=0.1), IMAGES, LABELS, (0, 0, 0))
    expected = torch.nn.functional.cross_entropy(logits, LABELS, label_smoothing=0.1)
    torch.testing.assert_close(torch.nn.functional.cross_entropy(logits, targets), expected)


@pytest.mark.parametrize("step", range(20))
def test_mixup_blends_images_and_targets_alike(step: int) -> None:
    mix = mixer(cutmix=0)
    images, targets = mixed(mix, IMAGES.clone(), LABELS, (0, step, 0))
    part = kept(images, mix.smooth(LABELS), targets)
    torch.testing.assert_close(images, part * IMAGES + (1 - part) * IMAGES.flip(0), atol=1e-4, rtol=0)
    torch.testing.assert_close(targets.sum(1), torch.ones(64))
    assert 0 <= part <= 1


@pytest.mark.parametrize("step", range(30))
def test_cutmix_weighs_targets_by_the_real_area(step: int) -> None:
    mix = mixer(mixup=0)
    images, targets = mixed(mix, IMAGES.clone(), LABELS, (0, step, 0))
    pasted = images != IMAGES
    assert torch.equal(images[pasted], IMAGES.flip(0)[pasted])
    assert kept(images, mix.smooth(LABELS), targets) == pytest.approx(1 - float(pasted.float().mean()), abs=1e-5)
    rows, columns = pasted[0, 0].any(1), pasted[0, 0].any(0)
    assert pasted[0, 0].sum() == rows.sum() * columns.sum()  # a rectangle


def test_cutmix_boxes_reach_every_pixel_and_cut_at_borders() -> None:
    mix = mixer(mixup=0)
    pair = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 1, 90, 120)
    covered = torch.stack([mixed(mix, pair.clone(), LABELS[:2], (0, step, 0))[0][0, 0] for step in range(1000)])
    assert covered.mean(0).min() > 0.05
    # A side s covers s - s^2 / 4 on average, as borders clip it: E[s^2] - E[s^3] / 2 + E[s^4] / 16 for uniform s^2.
    assert covered.mean() == pytest.approx(1 / 2 - 1 / 5 + 1 / 48, abs=0.03)


def test_proportions_follow_the_beta_distribution() -> None:
    mix = mixer(mixup=0.8, cutmix=0, label_smoothing=0)
    parts = np.array([kept(*_mixed(mix, step)) for step in range(1500)])
    assert stats.kstest(parts, stats.beta(0.8, 0.8).cdf).pvalue > 1e-3


@pytest.mark.parametrize("alpha", [0.8, 1.0])
def test_proportions_and_boxes_have_torchvisions_distributions(alpha: float) -> None:
    """Compare the weights of the images' own targets over 600 batches of each implementation."""
    torch.manual_seed(0)
    labels, pair = torch.tensor([0, 1]), torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 1, 24, 36)
    peers = {"mixup": v2.MixUp(alpha=alpha, num_classes=2), "cutmix": v2.CutMix(alpha=alpha, num_classes=2)}
    for name, peer in peers.items():
        mix = mixer(2, label_smoothing=0, **{"mixup": 0.0, "cutmix": 0.0, name: alpha})
        ours = [mixed(mix, pair.clone(), labels, (0, step, 0)) for step in range(600)]
        theirs = [peer(pair.clone(), labels) for _ in range(600)]
        parts = [np.array([float(targets[0, 0]) for _, targets in batches]) for batches in (ours, theirs)]
        assert stats.ks_2samp(*parts).pvalue > 1e-3, name
        for images, targets in ours + theirs:
            assert float(images[0].mean()) == pytest.approx(1 - float(targets[0, 0]), abs=1e-5)


def _mixed(mix: Mixer, step: int) -> tuple[Tensor, Tensor, Tensor]:
    images, targets = mixed(mix, IMAGES[:2, :, :1, :1].clone(), torch.tensor([0, 1]), (0, step, 0))
    return images, mix.smooth(torch.tensor([0, 1])), targets


def test_probabilities_of_mixing_and_switching() -> None:
    mix = mixer(mix_prob=0.6, mix_switch_prob=0.25)
    kinds = {"none": 0, "cutmix": 0, "mixup": 0}
    for step in range(1000):
        images, _ = mixed(mix, IMAGES[:2, :, :8, :8].clone(), LABELS[:2], (0, step, 0))
        own = images[0, 0] == IMAGES[0, 0, :8, :8]
        values = set(images[0, 0].unique().tolist())
        kinds["none" if own.all() else "cutmix" if values <= {0.0, 1.0} else "mixup"] += 1
    assert kinds["mixup"] == pytest.approx(450, abs=60)
    assert kinds["none"] == pytest.approx(400 + 25, abs=60)  # a few boxes of cutmix are empty


def test_keys_decide_and_nothing_else() -> None:
    mix = mixer()
    torch.manual_seed(0)
    first = mixed(mix, IMAGES.clone(), LABELS, (1, 2, 3))
    state = torch.get_rng_state()
    again = mixed(mixer(), IMAGES.clone(), LABELS, (1, 2, 3))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert torch.equal(state, torch.get_rng_state())
    for key in ((0, 2, 3), (1, 0, 3), (1, 2, 0)):
        assert not torch.equal(mixed(mix, IMAGES.clone(), LABELS, key)[1], first[1])


def test_weak_augmentation_only_smooths_labels() -> None:
    mix = mixer()
    images, targets = mixed(mix, IMAGES, LABELS, (1, 2, 3), strong=False)
    assert images is IMAGES
    assert torch.equal(targets, mix.smooth(LABELS))


@pytest.mark.parametrize("count", [1, 2, 7, 64])
@pytest.mark.parametrize("at_once", [1, 3, 100])
def test_any_number_of_images_is_mixed_in_place(count: int, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moa_train.data.mix.images_at_once", lambda images: at_once)
    images = IMAGES[:count].clone()
    result, targets = mixed(mixer(cutmix=0), images, LABELS[:count], (0, 1, 0))
    whole, expected = mixed(mixer(cutmix=0), IMAGES.clone(), LABELS, (0, 1, 0))
    part = kept(whole, mixer().smooth(LABELS), expected)
    assert result is images
    torch.testing.assert_close(images, part * IMAGES[:count] + (1 - part) * IMAGES[:count].flip(0), atol=1e-4, rtol=0)
    torch.testing.assert_close(targets.sum(1), torch.ones(count))
