import pytest

from moa_train.optim.scaling import explain_rate, scale_rate
from moa_train.runtime.errors import UserError


@pytest.mark.parametrize(
    ("rule", "batch_size", "rate"),
    [
        ("linear", 512, 9e-4),
        ("linear", 128, 2.25e-4),
        ("linear", 1024, 1.8e-3),
        ("sqrt", 128, 4.5e-4),
        ("none", 128, 9e-4),
    ],
)
def test_rules(rule: str, batch_size: int, rate: float) -> None:
    assert scale_rate(9e-4, batch_size, rule=rule) == pytest.approx(rate, rel=1e-12)


def test_explanation_shows_how_the_rate_came_about() -> None:
    assert explain_rate(9e-4, 128) == "0.0009 x 128/512 (linear) = 0.000225"
    assert explain_rate(9e-4, 128, rule="sqrt") == "0.0009 x sqrt(128/512) (sqrt) = 0.00045"
    assert explain_rate(9e-4, 128, rule="none") == "0.0009 (not scaled with the batch of 128)"
    assert explain_rate(0.1, 64, reference=256) == "0.1 x 64/256 (linear) = 0.025"


def test_mistakes() -> None:
    with pytest.raises(UserError, match=r"optim\.lr_scaling=liner is not known. Did you mean 'linear'"):
        scale_rate(9e-4, 128, rule="liner")
    with pytest.raises(UserError, match="at least 1"):
        scale_rate(9e-4, 0)
