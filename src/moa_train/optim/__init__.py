"""Optimizers, parameter groups, schedules of the rate, clipping and averaged weights."""

from moa_train.optim.clip import check_clip, clip_gradients
from moa_train.optim.duration import Duration
from moa_train.optim.ema import AveragedWeights
from moa_train.optim.groups import parameter_groups
from moa_train.optim.optimizers import Optimizers, create_optimizer
from moa_train.optim.scaling import explain_rate, scale_rate
from moa_train.optim.schedule import Schedule

__all__ = [
    "AveragedWeights",
    "Duration",
    "Optimizers",
    "Schedule",
    "check_clip",
    "clip_gradients",
    "create_optimizer",
    "explain_rate",
    "parameter_groups",
    "scale_rate",
]
