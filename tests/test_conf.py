"""Every file in conf/ composes with the schema, is valid, and has the effect that it describes."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from moa_train.cli.compose import typed
from moa_train.knobs import knobs
from moa_train.model.registry import check_model
from moa_train.schema import EvalConfig, ExportConfig, RunConfig, image_shape

CONF = Path(__file__).parents[1] / "conf"
OPTIONS = {
    folder.relative_to(CONF).as_posix(): sorted(path.stem for path in folder.glob("*.yaml"))
    for folder in sorted(CONF.rglob("*"))  # without CONF itself, which has one file per command
    if list(folder.glob("*.yaml"))
}
PAIRS = [(group, option) for group, options in OPTIONS.items() for option in options if group != "model/at"]
MODELS = OPTIONS["model"]

# patch size, width, depths, heads, window, drop path
PUBLISHED = {
    ("moa_t", "imagenet"): (4, 96, [2, 2, 8], [3, 6, 12], 14, 0.2),
    ("moa_s", "imagenet"): (4, 96, [2, 2, 20], [3, 6, 12], 14, 0.3),
    ("moa_b", "imagenet"): (4, 128, [2, 2, 20], [4, 8, 16], 14, 0.4),
    ("moa_t", "cifar100"): (1, 96, [2, 2, 6, 2], [3, 6, 12, 24], 4, 0.1),
    ("moa_b", "cifar100"): (1, 128, [2, 2, 6, 2], [4, 8, 16, 32], 4, 0.1),
}


@pytest.fixture(scope="module")
def composed() -> Iterator[Callable[..., DictConfig]]:
    """A function that takes overrides and returns the configuration that Hydra composes."""
    for command, schema in (("train", RunConfig), ("eval", EvalConfig), ("export", ExportConfig)):
        ConfigStore.instance().store(name=f"{command}_schema", node=schema)
        ConfigStore.instance().store(group="hydra/help", name=f"{command}_help", node={})
    with initialize_config_module("moa_train.conf", version_base="1.3"):
        yield lambda *overrides, command="train": compose(command, list(overrides))


@pytest.fixture(scope="module")
def resolved(composed) -> Callable[..., Any]:
    """A function that takes overrides and returns the validated configuration."""
    return lambda *overrides, command="train": typed(composed(*overrides, command=command))


def written(group: str, option: str) -> dict[str, Any]:
    """Return the settings in a file of conf/ by dotted key."""
    path = CONF / group / f"{option}.yaml"
    text = path.read_text()
    section = "" if "@package _global_" in text else group.split("/")[0] + "."
    return dict(leaves(OmegaConf.to_container(OmegaConf.create(text)), section))


def leaves(values: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        elif key != "defaults":
            yield prefix + key, value


def assert_says(config: Any, values: dict[str, Any]) -> None:
    found = {key: value for key, _, value in knobs(config)}
    assert {key: found[key] for key in values} == values


def needs(data: str) -> list[str]:
    return ["data.root=somewhere"] if data in ("imagenet", "folder") else []


def test_the_groups_are_complete():
    assert set(OPTIONS) == {
        *("geometry", "model/at"),
        *("model", "data", "augment", "optim", "schedule", "engine", "tracking", "runtime", "experiment", "debug"),
    }


@pytest.mark.parametrize("path", sorted(CONF.rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_file_starts_with_a_description(path):
    first = next(line for line in path.read_text().splitlines() if "@package" not in line)
    assert first.startswith("# ")
    assert len(first) > 10


def test_each_command_composes_without_arguments(resolved):
    assert resolved().data.name == "digits"
    assert resolved(command="eval").split == "test"
    assert resolved(command="export").format == "onnx"


@pytest.mark.parametrize(("group", "option"), PAIRS)
def test_every_option_composes_and_takes_effect(resolved, group, option):
    values = written(group, option)
    if group == "model" and option + "_small" in OPTIONS["model/at"]:
        values |= written("model/at", option + "_small")
    assert_says(resolved(f"{group}={option}", *needs("imagenet")), values)


@pytest.mark.parametrize("option", OPTIONS["model/at"])
def test_models_adapt_to_the_image_size_of_the_data(resolved, option):
    model, _, size = option.rpartition("_")
    data = {"small": "cifar100", "large": "imagenet"}[size]
    assert_says(resolved(f"model={model}", f"data={data}", *needs(data)), written("model/at", option))


@pytest.mark.parametrize("data", OPTIONS["data"])
@pytest.mark.parametrize("model", MODELS)
def test_every_model_fits_every_data_set(resolved, model, data):
    config = resolved(f"model={model}", f"data={data}", *needs(data))
    assert (config.data.name, config.model.variant) == (data, "resnet18" if model == "timm" else model)
    check_model(config.model, image_shape(config.data.image_size))


@pytest.mark.parametrize(("model", "data"), PUBLISHED)
def test_models_have_the_published_settings(resolved, model, data):
    found = resolved(f"data={data}", f"model={model}", *needs(data)).model
    geometry = (found.patch_size, found.embed_dim, found.depths, found.heads, found.window, found.drop_path)
    assert geometry == PUBLISHED[model, data]
    assert (found.moa.form, found.moa.enabled, found.moa.overlap, found.moa.reduction) == ("paper", True, 1, 32)


def test_geometry_small_suits_own_small_images(resolved):
    small = ("geometry=small", "augment=cifar", "data.image_size=32")
    config = resolved("data=folder", "model=moa_t", *small, *needs("folder"))
    assert (config.model.patch_size, config.model.window, config.augment.crop) == (1, 4, "pad")


def test_the_command_line_overrides_choices_of_data_and_experiments(resolved):
    typed_ = ("augment=none", "optim=sgd", "schedule=constant", "engine=default", "model=resnet50")
    for chosen in (("data=digits",), ("data=cifar100",), ("experiment=cifar100_cpu", "optim.lr=0.3")):
        config = resolved(*typed_, *chosen)
        assert (config.augment.crop, config.optim.name, config.schedule.name) == ("none", "sgd", "constant")
        assert config.model.name == "resnet"
    assert config.optim.lr == 0.3


@pytest.mark.parametrize("experiment", OPTIONS["experiment"])
def test_overfitting_a_batch_needs_images_that_stay_the_same(resolved, experiment):
    found = resolved(f"experiment={experiment}", "debug=overfit_batch", "data.root=.").augment
    strong = ("mixup", "cutmix", "randaugment_ops", "erasing", "color_jitter", "label_smoothing", "flip")
    assert {name: getattr(found, name) for name in strong} == dict.fromkeys(strong, 0)
    assert (found.crop, found.extra) == ("none", [])


@pytest.mark.parametrize("debug", [None, *OPTIONS["debug"]])
@pytest.mark.parametrize("experiment", OPTIONS["experiment"])
def test_every_experiment_composes_with_every_debug_option(resolved, experiment, debug):
    overrides = [f"experiment={experiment}", *needs("imagenet")]
    if debug is None:
        assert_says(resolved(*overrides), written("experiment", experiment))
    else:
        assert_says(resolved(*overrides, f"debug={debug}"), written("debug", debug))


@pytest.mark.parametrize("option", ["lr=abc", "unheard_of=1", "warmup=5 epochs"])
def test_the_schema_rejects_wrong_types_and_unknown_keys(composed, option):
    with pytest.raises(Exception, match=r"abc|unheard_of|warmup"):
        typed(composed(f"optim.{option}"))
