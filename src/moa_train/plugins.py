"""Exchangeable parts by name: built-in parts from a table, a user's own by import path, ``package.module:object``.

Parts are imported only when they are needed, so the tables cost no startup time. A part with its own settings declares
them as a dataclass, which annotates a parameter called ``args``. `Plugins.args` creates this dataclass from the
configuration and checks it.
"""

import importlib
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, is_dataclass
from typing import Any

from moa_train.knobs import fill
from moa_train.runtime.command_line import argument
from moa_train.runtime.errors import UserError, nearest

if sys.version_info >= (3, 14):
    from annotationlib import Format, get_annotations


@dataclass(frozen=True)
class Plugins:
    """The parts of one kind: those in a table from names to import paths, and those given by import path."""

    kind: str
    table: Mapping[str, str]
    configurable: tuple[str, ...] = ()
    """Names in the table whose parts have their own settings. The other parts need not be imported to find out."""

    def check(self, key: str, name: str) -> None:
        """Raise `UserError` unless ``name`` is in the table or has the form of an import path. This imports nothing."""
        if name in self.table:
            return
        module, _, attribute = name.partition(":")
        if not all(part.isidentifier() for part in (*module.split("."), *attribute.split("."))):
            raise UserError(
                f"{key}={name} is not known.{nearest(name, self.table)} Options: {', '.join(self.table) or 'none'}, "
                f"or the import path of your own {self.kind}: package.module:name."
            )

    def load(self, name: str) -> Any:
        """Import and return the part called ``name``.

        Raises:
            UserError: the name is unknown, or its module or attribute does not exist.
        """
        self.check(self.kind, name)
        path = self.table.get(name, name)
        module, _, attribute = path.partition(":")
        try:
            found: Any = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                raise  # the module exists, but one of its own imports doesn't
            raise UserError(
                f"{self.kind} {name}: no module named {error.name} was found in the installed packages, in the folder "
                "given by --config-dir, or in the current folder."
            ) from error
        for part in attribute.split("."):
            if not hasattr(found, part):
                public = [known for known in vars(found) if not known.startswith("_")]
                raise UserError(f"{self.kind} {name}: {module} has no {attribute}.{nearest(part, public)}")
            found = getattr(found, part)
        return found

    def may_have_args(self, name: str) -> bool:
        """Return whether the part called ``name`` may have its own settings."""
        return is_own_code(name) or name in self.configurable

    def args(self, name: str, values: Mapping[str, Any], key: str) -> dict[str, Any]:
        """Return ``{"args": settings}`` for the part called ``name``, or ``{}`` if it has no settings.

        Args:
            name: name of the part.
            values: the settings given by the configuration; the others take their defaults.
            key: key of the settings in the configuration, such as ``model.args``, for error messages.

        Raises:
            UserError: a setting is unknown, has the wrong type or is out of range.
        """
        if not isinstance(values, Mapping):
            raise UserError(f"{key}={values} must be settings of {self.kind} {name}: {key}.KEY=VALUE.")
        kind = args_type(self.load(name)) if self.may_have_args(name) else None
        if kind is None:
            if values:
                raise UserError(f"{key}={dict(values)}: {self.kind} {name} has no settings of its own. Remove {key}.")
            return {}
        return {"args": fill(kind, values, key)}

    def create(self, name: str, values: Mapping[str, Any], key: str, *args: Any, **kwargs: Any) -> Any:
        """Import the part called ``name`` and call it with ``args``, ``kwargs`` and its own settings."""
        return self.load(name)(*args, **kwargs, **self.args(name, values, key))


MODELS = Plugins(
    "model",
    {
        "moa": "moa_train.model.network:MOATransformer",
        "swin": "moa_train.model.baselines:Swin",
        "vit": "moa_train.model.baselines:ViT",
        "resnet": "moa_train.model.baselines:BottleneckResNet",
        "timm": "moa_train.model.timm_door:TimmModel",
    },
    configurable=("timm",),
)
DATASETS = Plugins(
    "data set",
    {
        "digits": "moa_train.data.digits:Digits",
        "cifar10": "moa_train.data.cifar:Cifar10",
        "cifar100": "moa_train.data.cifar:Cifar100",
        "imagenet": "moa_train.data.folder:ImageNet",
        "folder": "moa_train.data.folder:ClassFolders",
    },
)
AUGMENTATIONS = Plugins("augmentation", {})
OPTIMIZERS = Plugins(
    "optimizer",
    {name: f"moa_train.optim.optimizers:{name}" for name in ("adamw", "nadamw", "sgd", "muon")},
)
SCHEDULES = Plugins(
    "schedule",
    {name: f"moa_train.optim.schedule:{name}" for name in ("cosine", "linear", "step", "constant")},
)
LOSSES = Plugins("loss", {"cross_entropy": "moa_train.engine.loss:soft_cross_entropy"})
METRICS = Plugins("metric", {name: f"moa_train.engine.metrics:{name.title()}" for name in ("top1", "top5", "loss")})
LOGGERS = Plugins(
    "logger",
    {
        "tensorboard": "moa_train.tracking.tensorboard:TensorBoard",
        "csv": "moa_train.tracking.csv_file:CsvFile",
        "wandb": "moa_train.tracking.wandb:WandB",
    },
    configurable=("wandb",),
)


def is_own_code(name: str) -> bool:
    """Return whether ``name`` is an import path rather than a name in a table."""
    return ":" in name


def short_name(name: str) -> str:
    """Return the short name of a part for log rows and ``args``: ``rose`` for ``my.metrics:rose``."""
    return name.rpartition(":")[2].rpartition(".")[2]


def args_type(part: Any) -> type | None:
    """Return the dataclass that annotates the parameter ``args`` of a function or class, or None if there is none."""
    function = getattr(part, "__init__") if isinstance(part, type) else part  # noqa: B009 mypy rejects the attribute
    # The other annotations may name types that are imported for type checkers only.
    if sys.version_info >= (3, 14):
        kind = get_annotations(function, format=Format.FORWARDREF).get("args")
        kind = getattr(kind, "__forward_arg__", kind)
    else:
        kind = getattr(function, "__annotations__", {}).get("args")
    if isinstance(kind, str):
        try:
            kind = eval(kind, getattr(function, "__globals__", {}))  # code that is imported already
        except NameError as error:
            raise UserError(
                f"The annotation of args in {part.__module__}:{part.__qualname__} cannot be read ({error}). Define or "
                "import the class of the settings outside of TYPE_CHECKING."
            ) from error
    return kind if isinstance(kind, type) and is_dataclass(kind) else None


def check_trusted(used: Iterable[str], named: Iterable[str], where: str) -> None:
    """Raise `UserError` if a stored configuration uses code that the command line does not name.

    A file must never be able to run code. An import path in a checkpoint is therefore used only if the user allows it
    with ``code=``: the path itself, or its module or package.
    """
    named = list(named)
    refused = [
        name
        for name in dict.fromkeys(used)
        if not any(name == given or name.startswith((f"{given}.", f"{given}:")) for given in named)
    ]
    if refused:
        modules = list(dict.fromkeys(name.partition(":")[0] for name in refused))
        raise UserError(
            f"{where} uses code that is not part of moa-train: {', '.join(refused)}. A file by itself "
            f"cannot make moa-train run code. If you trust this code, allow it by adding {argument('code', modules)}."
        )
