"""What is checked before anything expensive: the configuration, and the data against those of a checkpoint."""

from typing import Any

from moa_train.build.model import model_fields
from moa_train.model import check_model
from moa_train.optim import Duration, check_clip
from moa_train.runtime.distributed import Distributed
from moa_train.runtime.errors import UserError
from moa_train.schema import RunConfig


def resolve(config: RunConfig, distributed: Distributed) -> RunConfig:
    """Fill in what depends on the number of ranks, and what a stored run must not ask again."""
    engine = config.engine
    if engine.micro_batch_size is None:
        if engine.batch_size % distributed.world_size:
            raise UserError(
                f"engine.batch_size={engine.batch_size} cannot be shared by {distributed.world_size} ranks. Nearest: "
                f"{round(engine.batch_size / distributed.world_size) * distributed.world_size}."
            )
        engine.micro_batch_size = engine.batch_size // distributed.world_size
    return config


def check_config(config: RunConfig) -> None:
    """Check what can be known before the data is opened, which may take minutes: durations, clipping, the model.

    Raises:
        UserError: naming the key.
    """
    check_clip(config.optim.clip, config.optim.clip_value)
    # Of some data set; errors that depend on its length come when it is known.
    schedule, engine = config.schedule, config.engine
    Duration.parse(schedule.duration, what="schedule.duration", allow_zero=False)
    for what, texts in (
        ("schedule.warmup", [schedule.warmup]),
        ("schedule.milestones", schedule.milestones),
        ("augment.off", [config.augment.off]),
        ("engine.eval_every", [engine.eval_every]),
        ("engine.save_every", [engine.save_every]),
        ("engine.keep_every", [engine.keep_every]),
        ("engine.stop_after", [engine.stop_after]),
    ):
        for text in texts:
            Duration.parse(text or "0", what=what)
    check_model(config.model.name, **model_fields(config.model, config.data, num_classes=2))


def check_batch_size(config: RunConfig, images: int) -> None:
    """Check that an update has no more samples than an epoch.

    `Order` would fill it from the epochs that follow, but whoever wants so few updates does not ask for them that way.

    Raises:
        UserError: with a size that fits.
    """
    batch_size, repeats = config.engine.batch_size, config.augment.repeats
    if batch_size > images * repeats:
        drawn = f", each drawn {repeats} times an epoch" if repeats > 1 else ""
        raise UserError(
            f"engine.batch_size={batch_size}, but there are only {images} training images{drawn}: an update would be "
            f"longer than an epoch. Nearest: engine.batch_size={images * repeats}; with several updates an epoch: "
            f"{2 ** max(0, (images * repeats // 4).bit_length() - 1)}."
        )


def check_same_data(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Check what a checkpoint recorded of its training data against what is there now.

    Raises:
        UserError: other classes, another order of them, or other images.
    """
    old, new = before["classes"], now["classes"]
    if old != new:
        first = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
        raise UserError(
            f"The checkpoint knows {len(old)} classes and the data has {len(new)}; the first difference is class "
            f"{first}: {old[first : first + 1]} -> {new[first : first + 1]}. Use the data set it was trained on."
        )
    if before["fingerprint"] != now["fingerprint"]:
        raise UserError(
            f"The training images are not those of the checkpoint (fingerprint {before['fingerprint']} -> "
            f"{now['fingerprint']}): images were added, removed or relabelled. Start a new run with init=."
        )
