"""Declarations of settings."""

import pytest

from moa_train.knobs import knobs
from moa_train.schema import EvalConfig, ExportConfig, PredictConfig, RunConfig, image_shape

CONFIGS = (RunConfig(), EvalConfig(), ExportConfig(), PredictConfig())


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_every_knob_is_documented_and_has_a_sensible_default(config):
    for key, item, value in knobs(config):
        text, options = item.metadata["help"], item.metadata["options"]
        assert len(text) > 5, key
        assert "\n" not in text, key
        entries = value if isinstance(value, list) else [value]
        assert options is None or value is None or set(entries) <= set(options), key


def test_image_shape():
    assert image_shape(32) == (32, 32)
    assert image_shape([32, 64]) == image_shape((32, 64)) == (32, 64)
