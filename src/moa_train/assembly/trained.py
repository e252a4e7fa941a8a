"""Load trained weights for use: the model, its preprocessing and its classes, as the file's header records them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from moa_train.assembly.checks import check_same_data, training_record
from moa_train.data.dataset import available_splits, create_dataset
from moa_train.data.dataset import open_split as open_source
from moa_train.data.source import Source, align
from moa_train.engine.find_weights import FoundWeights, find_weights
from moa_train.model.load import load_weights
from moa_train.model.registry import create_model
from moa_train.plugins import check_trusted
from moa_train.runtime.errors import UserError
from moa_train.schema import RunConfig, image_shape, own_code
from moa_train.serialization import from_dict


@dataclass(frozen=True)
class Trained:
    """Weights on disk, and what their file's header records.

    Attributes:
        found: where the weights are.
        weights: {name: CPU tensor}.
        metadata: the header.
        config: the configuration of the run that trained them. ``data.eval_crop`` is 1 for models that were trained on
            images in memory, such as CIFAR's or those of a pack, because evaluation does not crop these.
        classes: names of the classes, in the order of the logits.
    """

    found: FoundWeights
    weights: dict[str, Tensor]
    metadata: dict[str, str]
    config: RunConfig
    classes: list[str]

    @classmethod
    def open(cls, path: Path, *, weights: str = "auto", code: str | Sequence[str] = ()) -> "Trained":
        """Read and verify weights; nothing is built yet.

        Args:
            path: run folder, checkpoint folder or .safetensors file.
            weights: ``model``, ``ema``, or ``auto``: EMA weights if there are any.
            code: a user's own modules that the configuration may import.

        Raises:
            UserError: there are no such weights, or they are damaged, or need code that ``code`` does not allow.
        """
        found = find_weights(path, ("ema", "model") if weights == "auto" else (weights,))
        tensors, metadata = found.load()
        config = described(metadata, found.path)
        check_trusted(own_code(config), [code] if isinstance(code, str) else code, str(found.path))
        assumed = config.data.name in ("cifar10", "cifar100", "digits")  # older versions did not record it
        if json.loads(metadata.get("in_memory", json.dumps(assumed))):
            config.data.eval_crop = 1.0
        if "preprocessing" in metadata:  # written by an export: the code of the data set is not needed
            statistics = json.loads(metadata["preprocessing"])
            config.data.mean, config.data.std = statistics["mean"], statistics["std"]
        return cls(found, tensors, metadata, config, json.loads(metadata["classes"]))

    @property
    def folder(self) -> Path:
        """Folder for results: the run folder, or the folder of weights that are not in a run folder."""
        folder = (self.found.path if self.found.checkpoint is None else self.found.checkpoint.path).parent
        return folder.parent if folder.name == "checkpoints" else folder

    def build(self) -> nn.Module:
        """Return the model with these weights, on the CPU, in training mode."""
        size = image_shape(self.config.data.image_size)
        model = create_model(self.config.model, image_size=size, num_classes=len(self.classes))
        load_weights(model, self.weights)
        return model

    def open_split(self, split: str, root: str | None = None, workers: int | None = None) -> Source:
        """Open a split of the data set that the weights were trained on, or of another folder with the same classes.

        Args:
            split: train, val or test.
            root: folder of the data set, if it is not where it was during training. If it has its own validation
                split, none is held out of its training images.
            workers: processes that decode image files (default: as in training).

        Raises:
            UserError: there is no such data, its classes are not those of the model, or ``val`` cannot be held out of
                the training images because these have changed.
        """
        data = replace(self.config.data, download=False)  # never download on behalf of a weights file
        if root:
            data.root = root
            if "val" in available_splits(replace(data, val_fraction=0.0)):  # its own, instead of a held-out part
                data.val_fraction = 0.0
        if workers is not None:
            data.workers = workers
        splits, place = available_splits(data), create_dataset(data).root.absolute()
        if data.root and not place.is_dir():
            raise UserError(f"{place} does not exist. Set root= to the folder of the data set.")
        if split not in splits:
            hint = " For ImageNet, split=test evaluates the folder val/." if data.name == "imagenet" else ""
            where = f" in {place}" if data.root else ""
            raise UserError(f"split={split} does not exist: {data.name} has only {' and '.join(splits)}{where}.{hint}")
        try:
            source = open_source(data, split)
        except UserError as error:  # the message names the key of moa-train
            raise UserError(str(error).replace("data.root", "root")) from error
        if split == "val" and data.val_fraction:
            self._check_held_out(root)
        return self._align(source)

    def _check_held_out(self, root: str | None) -> None:
        """Check that the validation split was held out of the images that the weights were trained on."""
        names = {"classes", "fingerprint", "names", "counts"} & set(self.metadata)
        before: dict[str, Any] = {name: json.loads(self.metadata[name]) for name in names}
        if "fingerprint" not in before and self.found.checkpoint is not None:  # written by an older version
            before = self.found.checkpoint.state
        if "fingerprint" in before:
            remedy = "The split val is held out of these images. Restore them (root=FOLDER) or evaluate another split."
            data = replace(self.config.data, download=False, root=root or self.config.data.root)
            check_same_data(before, training_record(open_source(data, "train")), remedy)

    def _align(self, source: Source) -> Source:
        classes, named = self.classes, self.metadata.get("named") != "false"
        if named and set(source.classes) <= set(classes):
            return align(source, classes)
        # Published weights do not name their classes, so only the number of classes can be compared.
        if named or len(classes) != len(source.classes):
            unknown = [name for name in source.classes if name not in classes]
            raise UserError(
                f"The weights were trained on {len(classes)} classes ({_some(classes)}), but the data has "
                f"{len(source.classes)} ({_some(source.classes)})"
                + (f". The model does not know {_some(unknown)}" if named else "")
                + ". Set root= to the matching data set."
            )
        return source


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def described(metadata: dict[str, str], path: Path) -> RunConfig:
    """Return the configuration stored in the header of a weights file."""
    if not {"config", "classes"} <= set(metadata):
        raise UserError(
            f"{path} has no configuration in its header, so it was not written by moa-train. Convert published MOA "
            "weights with moa-model convert."
        )
    try:
        values, classes = json.loads(metadata["config"]), json.loads(metadata["classes"])
    except ValueError as error:
        raise UserError(f"The header of {path} is damaged ({error}). Use another copy of the file.") from error
    if not isinstance(classes, list):
        raise UserError(f"The header of {path} is damaged: its classes are not a list. Use another copy of the file.")
    config: RunConfig = from_dict(values)
    return config
