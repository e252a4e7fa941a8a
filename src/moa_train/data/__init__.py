"""From files to normalised, augmented, mixed batches."""

from moa_train.data.augment import BatchAugment, Normalize
from moa_train.data.batch import Batch
from moa_train.data.datasets import DATASETS, SPLITS, open_source
from moa_train.data.loader import EvalLoader, TrainLoader
from moa_train.data.mix import Mixer
from moa_train.data.order import Order, epochs_at, micro_batches, steps_for_epochs
from moa_train.data.source import Source
from moa_train.data.statistics import STATISTICS, Statistics

__all__ = [
    "DATASETS",
    "SPLITS",
    "STATISTICS",
    "Batch",
    "BatchAugment",
    "EvalLoader",
    "Mixer",
    "Normalize",
    "Order",
    "Source",
    "Statistics",
    "TrainLoader",
    "epochs_at",
    "micro_batches",
    "open_source",
    "steps_for_epochs",
]
