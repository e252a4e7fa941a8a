"""Models by name and by import path, and errors in a user's own model."""

import sys
import types
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from moa_train.interfaces import Classifier
from moa_train.knobs import knob
from moa_train.model.registry import check_model, create_model
from moa_train.runtime.errors import UserError

GEOMETRY = {"image_size": (8, 8), "num_classes": 2}


@dataclass
class OwnArgs:
    width: int = knob(4, "channels", least=2)


class Own(Classifier):
    def __init__(self, config, *, image_size, num_classes, args: OwnArgs):
        super().__init__()
        self.body = nn.Conv2d(3, args.width, 1)
        self.head = nn.Linear(args.width, num_classes)

    @staticmethod
    def check(config, image_size):
        if image_size != (8, 8):
            raise UserError(f"Own needs images of 8 x 8 pixels, not {image_size}.")


class WrongHead(Own):
    head_name = "classifier"


def not_a_classifier(config, *, image_size, num_classes):
    return nn.Linear(3, num_classes)


@pytest.fixture(autouse=True)
def _my_package(monkeypatch):
    module = types.ModuleType("my_models")
    for part in (Own, WrongHead, not_a_classifier):
        setattr(module, part.__name__, part)
    monkeypatch.setitem(sys.modules, "my_models", module)


def test_own_model_with_settings(model_config):
    model = create_model(model_config(name="my_models:Own", args={"width": 6}), **GEOMETRY)
    assert isinstance(model, Own)
    assert model.head.in_features == 6
    assert create_model(model_config(name="my_models:Own"), **GEOMETRY).head.in_features == 4


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"name": "moe"}, ["moe is not known", "Did you mean 'moa'?", "package.module:name"]),
        ({"name": "my_models:Oun"}, ["my_models has no Oun", "Did you mean 'Own'?"]),
        ({"name": "no_such_models:Own"}, ["no module named no_such_models"]),
        (
            {"name": "my_models:not_a_classifier"},
            ["my_models:not_a_classifier", "a Linear", "must be a Classifier"],
        ),
        ({"name": "my_models:WrongHead"}, ["no module 'classifier'", "Set head_name"]),
        ({"name": "my_models:Own", "args": {"width": 1}}, ["model.args.width=1", ">= 2"]),
        ({"name": "my_models:Own", "args": {"widht": 8}}, ["model.args.widht", "Did you mean 'width'?"]),
        ({"name": "my_models:Own", "args": {"width": "8"}}, ["model.args.width='8'", "an integer"]),
        (
            {"name": "my_models:not_a_classifier", "args": {"width": 8}},
            ["my_models:not_a_classifier has no settings of its own"],
        ),
        ({"image_size": (64, 64), "args": {"width": 8}}, ["model moa has no settings of its own"]),
    ],
)
def test_errors_say_what_to_do(model_config, fields, parts):
    geometry = {key: fields.pop(key, value) for key, value in GEOMETRY.items()}
    with pytest.raises(UserError) as caught:
        create_model(model_config(**fields), **geometry)
    for part in parts:
        assert part in str(caught.value)


def test_the_check_of_a_model_runs_before_it_is_built(model_config):
    config = model_config(name="my_models:Own")
    check_model(config, (8, 8))
    with pytest.raises(UserError, match="8 x 8"):
        check_model(config, (8, 9))
    state = torch.get_rng_state()
    with pytest.raises(UserError, match="8 x 8"):
        create_model(config, image_size=(8, 9), num_classes=2)
    assert torch.equal(state, torch.get_rng_state())
