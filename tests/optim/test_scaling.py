from typing import Any

import pytest

from moa_train.optim.scaling import explain_lr, scale_lr
from moa_train.schema import OptimConfig


@pytest.mark.parametrize(
    ("rule", "batch_size", "lr"),
    [
        ("linear", 512, 9e-4),
        ("linear", 128, 2.25e-4),
        ("linear", 1024, 1.8e-3),
        ("sqrt", 128, 4.5e-4),
        ("none", 128, 9e-4),
    ],
)
def test_rules(rule: str, batch_size: int, lr: float) -> None:
    assert scale_lr(9e-4, batch_size, OptimConfig(lr_scaling=rule)) == pytest.approx(lr, rel=1e-12)


def test_the_explanation_shows_how_the_lr_was_computed() -> None:
    def explained(batch_size: int = 128, **changes: Any) -> str:
        return explain_lr(batch_size, OptimConfig(**{"lr": 9e-4, "lr_batch": 512, **changes}))

    assert explained(lr_scaling="linear") == "0.0009 x 128/512 (linear) = 0.000225"
    assert explained(lr_scaling="sqrt") == "0.0009 x sqrt(128/512) (sqrt) = 0.00045"
    assert explained(lr_scaling="none") == "0.0009 (not scaled to the batch size of 128)"
    assert explained(64, lr=0.1, lr_batch=256, lr_scaling="linear") == "0.1 x 64/256 (linear) = 0.025"
