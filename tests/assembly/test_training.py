"""The state that a run starts from."""

import json
from pathlib import Path

import pytest
import torch
from moa_train.assembly.model import build_model

from moa_train.assembly.training import load_init
from moa_train.engine.tensorfile import write_tensors
from moa_train.runtime.errors import UserError
from moa_train.schema import to_dict


def test_weights_that_do_not_fit_say_which_settings_their_model_has(tiny, tmp_path: Path):
    theirs = tiny({"model.depths": "[1,2]", "model.moa.overlap": "0", "model.drop_path": "0.3"})
    weights = build_model(theirs.model, theirs.data, 10).state_dict()
    path = tmp_path / "theirs.safetensors"
    write_tensors(path, weights, {"config": json.dumps(to_dict(theirs))})

    ours = tiny()
    model = build_model(ours.model, ours.data, 10)
    with pytest.raises(UserError, match=r"unexpected: layers\.1\.blocks\.1") as caught:
        load_init(model, path, ours)
    assert str(caught.value).endswith("\nTheir own model has model.depths=[1,2] model.moa.overlap=0.")

    # With the settings that it names, they fit.
    asked = tiny({"model.depths": "[1,2]", "model.moa.overlap": "0"})
    model = build_model(asked.model, asked.data, 10)
    load_init(model, path, asked)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
