"""What a run reports: console, TensorBoard, metrics.jsonl, meters."""

from moa_train.tracking.console import block, clock_time
from moa_train.tracking.meters import RunningMeans, Speed
from moa_train.tracking.tracker import Tracker, open_tracker
from moa_train.tracking.writers import Metrics, Writer

__all__ = ["Metrics", "RunningMeans", "Speed", "Tracker", "Writer", "block", "clock_time", "open_tracker"]
