import pytest
import torch
from torch import nn

from moa_train.engine.ratios import UpdateRatios
from moa_train.interfaces import Classifier
from moa_train.model.registry import create_model
from moa_train.schema import ModelConfig
from moa_train.tracking.jsonl import read_rows


class TwoLayers(Classifier, nn.Sequential):
    """Two linear layers, called 0 and 1."""


def test_norms_of_an_sgd_step():
    model = TwoLayers(nn.Linear(3, 4), nn.Linear(4, 2))
    ratios = UpdateRatios(model, lambda step: step == 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        model(torch.ones(5, 3)).square().sum().backward()
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        ratios.before(step)
        optimizer.step()
        ratios.after()
        if step == 0:
            assert ratios.values == {}
    for layer in ("0", "1"):
        gradients = [parameter.grad.flatten() for name, parameter in model.named_parameters() if name[0] == layer]
        norm = torch.cat(gradients).norm()
        weights = torch.cat([value.flatten() for name, value in before.items() if name[0] == layer]).norm()
        torch.testing.assert_close(ratios.values[f"per_layer/gradient_{layer}"], norm)
        torch.testing.assert_close(ratios.values[f"per_layer/update_{layer}"], 0.1 * norm / weights)


def test_a_run_logs_ratios_pictures_and_nothing_else_changes(train, outcome, tmp_path, straight):
    """Real curves and pictures of a run, whose results are those of the same run without them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    changes = {"tracking.ratios": "true", "tracking.loggers": "[tensorboard]", "tracking.images": "4"}
    assert train(tmp_path / "run", **changes) == 0
    own, other = outcome(tmp_path / "run"), outcome(straight)
    assert own["tensors"] == other["tensors"]
    rows = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if row["kind"] == "train"]
    names = ["patch_embed", "layers.0.blocks.0", "layers.0", "layers.1.blocks.0", "norm", "head"]
    assert len(rows) == 4
    for row in rows:
        assert [name for name in row if "/" in name] == [
            *(f"per_layer/gradient_{name}" for name in names),
            *(f"per_layer/update_{name}" for name in names),
        ]
        squares = sum(row[f"per_layer/gradient_{name}"] ** 2 for name in names)
        assert all(0 < row[f"per_layer/update_{name}"] < 1 for name in names)
        if row["step"] == 3:  # the row's other values are means over three steps
            assert squares**0.5 == pytest.approx(row["grad_norm"], rel=0.5)
    accumulator = EventAccumulator(str(tmp_path / "run" / "tensorboard"), size_guidance={"images": 0})
    accumulator.Reload()
    tags = accumulator.Tags()
    assert sorted(tags["images"]) == ["train/input", "val/confusion", "val/mistakes"]
    assert [event.step for event in accumulator.Images("val/mistakes")] == [4, 8, 12]
    groups = sorted({tag.partition("/")[0] for tag in tags["scalars"]})
    assert groups == ["accuracy", "loss", "optimization", "per_layer", "speed"]


def test_layers_of_timm_are_numbered():
    model = create_model(ModelConfig(name="timm", variant="vit_tiny_patch16_224"), image_size=(32, 32), num_classes=3)
    assert [f"layer{number:02}" for number in (0, 1, 12)] == [
        name for name in UpdateRatios(model, lambda step: True).layers if name in ("layer00", "layer01", "layer12")
    ]
