"""Configurations in files of runs; cli/test_app.py tests references to environment variables."""

import json

import pytest

from moa_train.runtime.errors import UserError
from moa_train.schema import RunConfig
from moa_train.serialization import FromEnvironment, from_dict, to_dict


def test_a_configuration_can_be_stored_as_json():
    config = RunConfig(run_dir="a/ü")
    config.data.mean, config.model.moa.overlap, config.schedule.milestones = [0.1, 0.2, 0.3], 2, ["5%"]
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


def test_a_configuration_of_another_version():
    values = to_dict(RunConfig())
    del values["optim"]["eps"]
    assert from_dict(values) == RunConfig()  # missing keys take their defaults
    values["model"]["moa"]["overlapp"] = 2
    with pytest.raises(UserError, match=r"Unknown configuration key model\.moa\.overlapp.*'overlap'"):
        from_dict(values)


def test_references_to_secrets_are_not_resolved(monkeypatch):
    """A file from elsewhere could otherwise bring a secret into a path, a message or a record."""
    monkeypatch.setenv("MOA_API_TOKEN", "hunter2")
    record = to_dict(RunConfig(run_dir="${oc.env:MOA_API_TOKEN}"))
    record["data"]["args"] = {"folder": "/a/${oc.env:MOA_API_TOKEN}", "names": ["${oc.env:MOA_API_TOKEN,none}"]}
    config = from_dict(record)
    assert (config.run_dir, config.data.args) == (record["run_dir"], record["data"]["args"])


def test_variables_in_own_settings_are_read_again(monkeypatch):
    config = RunConfig()
    config.data.args = {"folder": FromEnvironment("/a/x", "${oc.env:MOA_DATA}/x"), "names": ["b"]}
    record = to_dict(config)
    assert record["data"]["args"] == {"folder": "${oc.env:MOA_DATA}/x", "names": ["b"]}
    monkeypatch.setenv("MOA_DATA", "/b")
    assert from_dict(record).data.args == {"folder": "/b/x", "names": ["b"]}
