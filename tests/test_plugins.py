"""Parts by name and by import path; tests/own_code tests complete ones."""

import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

import pytest

from moa_train.knobs import fill
from moa_train.plugins import args_type
from moa_train.runtime.errors import UserError

DROP = """
from dataclasses import dataclass
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from torch import Tensor
    from elsewhere import Hidden

@dataclass
class Args:
    rate: float = 0.5

def plain(images: Tensor) -> Tensor: ...
def typed(images: Tensor, args: Args) -> Tensor: ...
def hidden(images: Tensor, args: Hidden) -> Tensor: ...
"""


LAZY = pytest.mark.skipif(sys.version_info < (3, 14), reason="Python 3.14 and newer evaluate annotations lazily")


@pytest.mark.parametrize("first", ["from __future__ import annotations", pytest.param("", marks=LAZY)])
def test_other_annotations_may_be_for_type_checkers_only(monkeypatch: pytest.MonkeyPatch, first: str) -> None:
    module = ModuleType("drops")
    monkeypatch.setitem(sys.modules, "drops", module)
    exec(first + DROP, vars(module))
    assert args_type(module.plain) is None
    assert args_type(module.typed) is module.Args
    with pytest.raises(UserError, match=r"args in drops:hidden cannot be read .*Hidden.*outside of TYPE_CHECKING"):
        args_type(module.hidden)


@dataclass
class Choosing:
    mode: Literal["low", "high"] = "low"


def test_a_setting_of_few_words_takes_only_these() -> None:
    assert fill(Choosing, {"mode": "high"}, "model.args") == Choosing("high")
    with pytest.raises(UserError, match=r"model\.args\.mode='hihg' has the wrong type: it must be one of low, high\."):
        fill(Choosing, {"mode": "hihg"}, "model.args")
