"""Check the configuration, and the data against a checkpoint, before anything expensive."""

from functools import partial
from typing import Any

import numpy as np

from moa_train.data.fingerprint import fingerprint
from moa_train.data.order import micro_batches
from moa_train.data.source import Source
from moa_train.knobs import knobs
from moa_train.model.registry import check_model
from moa_train.optim.duration import Duration
from moa_train.runtime.distributed import Distributed
from moa_train.runtime.errors import UserError, check_all
from moa_train.schema import RunConfig, image_shape


def fill_micro_batch_size(config: RunConfig, distributed: Distributed) -> RunConfig:
    """Fill in engine.micro_batch_size, whose default depends on the number of ranks; a resume keeps the value.

    Raises:
        UserError: the batch cannot be divided among the ranks.
    """
    engine = config.engine
    if engine.micro_batch_size is None:
        if engine.batch_size % distributed.world_size:
            raise UserError(
                f"engine.batch_size={engine.batch_size} cannot be divided among {distributed.world_size} ranks. "
                f"Nearest: {max(1, round(engine.batch_size / distributed.world_size)) * distributed.world_size}."
            )
        engine.micro_batch_size = engine.batch_size // distributed.world_size
    micro_batches(engine.batch_size, engine.micro_batch_size, distributed.rank, distributed.world_size)
    return config


def check_config(config: RunConfig) -> None:
    """Check the durations and the model, before the data is opened, which may take minutes.

    Raises:
        UserError: settings are invalid. The message names their keys.
    """
    # Only the syntax can be checked here. Errors that depend on the length of an epoch are raised later.
    durations = [
        partial(Duration.parse, text, what=key, allow_zero=key != "schedule.duration")
        for key, item, value in knobs(config)
        if item.metadata["form"] == "duration" and value is not None
        for text in (value if isinstance(value, list) else [value])
    ]
    check_all([*durations, lambda: check_model(config.model, image_shape(config.data.image_size))])


def check_batch_size(config: RunConfig, images: int) -> None:
    """Check that a batch is not larger than an epoch.

    `Order` could fill it from the following epochs, but such a batch size is more likely a mistake.

    Raises:
        UserError: it is larger. The message suggests a batch size.
    """
    batch_size, repeats = config.engine.batch_size, config.augment.repeats
    if batch_size > images * repeats:
        drawn = f", each drawn {repeats} times per epoch" if repeats > 1 else ""
        raise UserError(
            f"engine.batch_size={batch_size}, but there are only {images} training images{drawn}: a batch would be "
            f"larger than an epoch. The largest size is engine.batch_size={images * repeats}; for several updates per "
            f"epoch, use {2 ** max(0, (images * repeats // 4).bit_length() - 1)}."
        )


def training_record(train: Source) -> dict[str, Any]:
    """Return what checkpoints record about the training images, in JSON types."""
    counts = np.bincount(train.labels, minlength=len(train.classes)).tolist()
    record = {"classes": train.classes, "fingerprint": train.fingerprint, "counts": counts}
    if not train.in_memory and train.files is not None:  # the fingerprint covers the files held out of train as well
        record["names"] = fingerprint("", train.classes, train.labels, b"\0".join(train.files.tolist()))
    return {**record, "in_memory": train.in_memory}


def check_same_data(before: dict[str, Any], now: dict[str, Any], remedy: str = "Start a new run with init=.") -> None:
    """Compare the training images that a checkpoint recorded, as `training_record` does, with those of this run.

    If both have fingerprints of the training files alone, ``names``, these are compared. The predictions of teachers
    are compared, too, if both have some.

    Raises:
        UserError: the classes, their order, the images or the predictions differ.
    """
    old, new = before["classes"], now["classes"]
    if old != new:
        first = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
        raise UserError(
            f"The checkpoint has {len(old)} classes and the data has {len(new)}; the first difference is class "
            f"{first}: {old[first : first + 1]} -> {new[first : first + 1]}. Use the data set it was trained on."
        )
    key = "names" if "names" in before and "names" in now else "fingerprint"
    if before[key] != now[key]:
        counts = zip(new, before.get("counts", now["counts"]), now["counts"], strict=True)
        changes = [f"{name}: {old} -> {new} images" for name, old, new in counts if old != new]
        raise UserError(
            f"The training images are not those of the checkpoint (fingerprint {before[key]} -> "
            f"{now[key]}): images were added, removed, renamed or relabeled"
            + (f" ({'; '.join(changes[:5])}{'; ...' if len(changes) > 5 else ''})" if changes else "")
            + f". {remedy}"
        )
    if before.get("teachers") and now.get("teachers") and before["teachers"] != now["teachers"]:
        raise UserError(
            f"The teachers' predictions are not those of the checkpoint (fingerprint {before['teachers']} -> "
            f"{now['teachers']}): distill.teachers names other runs, or they were evaluated again with other weights. "
            f"{remedy}"
        )
