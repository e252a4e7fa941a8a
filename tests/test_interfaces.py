"""The defaults of `Classifier`; what the engine needs of batches and metrics is checked where it is used."""

import pytest
import torch
from torch import Tensor, nn

from moa_train.interfaces import Classifier


class Plain(Classifier):
    """A model that implements only what is necessary."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.words = nn.Embedding(5, 4)
        self.body = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4))
        self.scale = nn.Parameter(torch.ones(4, 4))
        self.header = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.head(self.body(self.stem(images_BCHW).mean((2, 3))))


class Layered(Plain):
    head_name = "body.2"

    def layer_names(self) -> list[str]:
        return ["stem", "body", "body.0"]


def test_defaults():
    model = Plain()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_pretrained()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.no_weight_decay() == {"words.weight"}
    # The prefix of the head ends at a dot: "header" is not "head".
    assert model.hidden_matrices() == {"body.0.weight", "body.2.weight", "scale", "header.weight"}
    assert model.layer_names() == []
    assert model.layer_ids() == {}
    assert model.part_of("body.0.weight") == (-1, "body")
    with pytest.raises(NotImplementedError, match="Plain has no feature maps"):
        model.forward_features(torch.zeros(1, 3, 4, 4))


def test_a_parameter_belongs_to_the_longest_matching_prefix():
    ids = Layered().layer_ids()
    assert ids.keys() == {name for name, _ in Layered().named_parameters()}
    assert ids["stem.weight"] == 0
    assert ids["body.1.weight"] == 1
    assert ids["body.0.bias"] == 2
    assert ids["body.2.weight"] == 3  # the head is last
    assert ids["words.weight"] == ids["scale"] == ids["head.weight"] == 0  # no prefix matches


def test_the_head_is_not_a_hidden_matrix():
    assert Layered().hidden_matrices() == {"body.0.weight", "scale", "header.weight", "head.weight"}
