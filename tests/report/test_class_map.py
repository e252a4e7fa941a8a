"""Class maps are exact where the answer is known, and their faithfulness is measured by areas that can be checked."""

import pytest
import torch
from torch import Tensor, nn

from moa_train.model.registry import create_model
from moa_train.report.attention import attention_maps
from moa_train.report.class_map import CELLS, Faithfulness, class_map, faithfulness
from moa_train.schema import MoaConfig, ModelConfig


class OneCell(nn.Module):
    """The logit of class 1 is 20 where a chosen cell of a 32 x 32 image keeps its red value of 1, and -20 otherwise."""

    def __init__(self, row: int, column: int) -> None:
        super().__init__()
        self.rows, self.columns = slice(2 * row, 2 * row + 2), slice(2 * column, 2 * column + 2)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        red_B = images_BCHW[:, 0, self.rows, self.columns].mean((1, 2))
        return torch.stack([torch.zeros_like(red_B), 40 * red_B - 20], dim=1)


def test_the_map_of_a_linear_model_is_weight_times_input():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 5))
    images, classes = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 4, 4])
    expected = (model[1].weight[classes].view(4, 3, 8, 8) * images).sum(1)
    torch.testing.assert_close(class_map(model, images, classes), expected.detach())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("name", ["moa", "swin", "vit"])
def test_the_map_adds_up_to_the_change_of_the_logit(name):
    torch.manual_seed(0)
    sizes = {"vit": ([2], [4])}.get(name, ([2, 1], [1, 2]))
    config = ModelConfig(
        name=name, variant="x", embed_dim=32, depths=sizes[0], heads=sizes[1], window=4, drop_path=0.0, patch_size=4
    )
    model = create_model(config, image_size=(32, 32), num_classes=7).eval()
    for parameter in model.parameters():  # fresh weights are so small that the logits would hardly change
        parameter.data.add_(torch.randn_like(parameter) * 0.03)
    images, classes = torch.randn(2, 3, 32, 32), torch.tensor([3, 5])
    with torch.no_grad():
        change = (model(images) - model(torch.zeros_like(images))).gather(1, classes[:, None])[:, 0]
    total = class_map(model, images, classes, steps=100).sum((1, 2))
    torch.testing.assert_close(total, change, rtol=0.03, atol=0.02)


def test_areas_of_a_model_that_looks_at_one_cell():
    model, images, classes = OneCell(5, 9), torch.zeros(1, 3, 32, 32), torch.tensor([1])
    images[:, 0] = 1
    maps = torch.zeros(1, 32, 32)
    maps[0, 10:12, 18:20] = 1  # the chosen cell first
    found = faithfulness(model, images, classes, maps)
    assert found.deletion.item() == pytest.approx(1 / 32, abs=1e-6)  # the first of 16 cuts removes it
    assert found.insertion.item() == pytest.approx(1 - 1 / 32, abs=1e-6)
    last = faithfulness(model, images, classes, -maps)
    assert last.deletion.item() == pytest.approx(1 - 1 / 32, abs=1e-6)
    assert 0 < found.random_deletion.item() < 1


def test_every_cell_changes_once():
    class Count(nn.Module):
        def forward(self, images_BCHW: Tensor) -> Tensor:
            share_B = images_BCHW[:, 0].mean((1, 2))
            return torch.stack([share_B, 1 - share_B], 1).clamp_min(1e-6).log()

    images = torch.ones(2, 3, 32, 32)
    found = faithfulness(Count(), images, torch.tensor([0, 0]), torch.rand(2, 32, 32))
    for area_B in vars(found).values():  # the probability is the share of the image that is left
        torch.testing.assert_close(area_B, torch.full((2,), 0.5), atol=1e-4, rtol=0)
    assert CELLS**2 == 256


def test_the_summary_names_means_and_differences():
    one = Faithfulness(*(torch.tensor([value]) for value in (0.1, 0.6, 0.3, 0.4)))
    assert str(one) == (
        "deletion area 0.100, random order 0.300 (difference -0.200); "
        "insertion area 0.600, random order 0.400 (difference +0.200); 1 image"
    )
    both = str(Faithfulness.concatenate([one, one]))
    assert "(difference -0.200 +- 0.000)" in both
    assert "2 images" in both


class Corner(nn.Module):
    """A classifier that reads only one position of the first stage, which the MOA block must therefore inform."""

    def __init__(self) -> None:
        super().__init__()
        moa = MoaConfig(overlap=0, reduction=1, drop_path=0.0)
        config = ModelConfig(embed_dim=24, depths=[1, 1], heads=[2, 2], window=2, mlp_ratio=2, drop_path=0.0, moa=moa)
        self.body = create_model(config, image_size=(16, 16), num_classes=2)
        self.head = nn.Linear(24, 3)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.head(self.body.forward_features(images_BCHW)[0][:, :, 0, 0])


def draw(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Images of noise, whose class is that of a patch in one of 4 x 4 cells, or 0 without a patch; and the cells."""
    patterns = torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(5)).sign() * 2
    images = torch.randn(32, 3, 16, 16, generator=generator) * 0.05
    labels, cells = (torch.randint(high, (32,), generator=generator) for high in (3, 16))
    for image, label, cell in zip(images, labels.tolist(), cells.tolist(), strict=True):
        if label:
            top, left = 4 * (cell // 4), 4 * (cell % 4)
            image[:, top : top + 4, left : left + 4] = patterns[label]
    return images, labels, cells


def test_maps_of_a_trained_model_show_where_the_information_is():
    torch.manual_seed(0)
    model, generator = Corner(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, 150, pct_start=0.2)
    for _ in range(150):
        images, labels, _ = draw(generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()
    images, labels, cells = draw(generator)
    with torch.no_grad():
        assert (model(images).argmax(1) == labels).float().mean() > 0.9
    images, labels, cells = (values[labels > 0] for values in (images, labels, cells))
    maps = class_map(model, images, labels)
    evidence = nn.functional.avg_pool2d(maps[:, None], 4)[:, 0].flatten(1)
    assert (evidence.argmax(1) == cells).float().mean() > 0.7  # chance: 1/16
    found = faithfulness(model, images, labels, maps)
    assert found.deletion.mean() < found.random_deletion.mean() - 0.2
    assert found.insertion.mean() > found.random_insertion.mean() + 0.1
    (between,), _ = attention_maps(model.body, images)
    weights = between.weights[:, :, 0].mean(1)  # of the window that is read, over the heads
    windows = cells // 8 * 2 + cells % 4 // 2
    assert (weights.argmax(1) == windows).float().mean() > 0.7  # chance: 1/4
    assert weights.gather(1, windows[:, None]).mean() > 0.4
