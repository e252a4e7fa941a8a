"""Use torch's optimizers without the import of its compiler, which takes as long as the import of torch itself."""

import inspect
from typing import TypeVar

import torch
from torch.optim import Optimizer

Kind = TypeVar("Kind", bound=type[Optimizer])


def eager(kind: Kind) -> Kind:
    """Remove torch's wrappers for compiled optimizers from the methods of an optimizer class, and return the class.

    The wrappers import torch's compiler at the first call. Our training steps call optimizers from eager code only.
    """
    for name in ("add_param_group", "zero_grad", "state_dict", "load_state_dict"):
        setattr(kind, name, inspect.unwrap(getattr(kind, name)))
    kind.step = torch.no_grad()(inspect.unwrap(kind.step))  # type: ignore[method-assign]
    return kind
