"""Small benchmark jobs, so that tests can run every part."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from moa_train.bench.job import Job


@pytest.fixture(scope="session")
def job(tiny: Callable[..., Any]) -> Callable[..., Job]:
    """A function that returns a job of one short round, with the given settings and changes of the configuration."""

    def make(changes: dict[str, Any] | None = None, **settings: Any) -> Job:
        def compose(overrides: Sequence[str]) -> Any:
            return tiny({**(changes or {}), **dict(text.split("=", 1) for text in overrides)})

        short = {"rounds": 1, "seconds": 0.0, "batches": (4,), "precisions": ("fp32",)}
        return Job(compose(()), (), compose, 10, torch.device("cpu"), **{**short, **settings})

    return make
