"""The default, options and range of a setting are declared once: in schema.py, or in the tables of plugins.py."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from moa_train.knobs import knobs
from moa_train.schema import EvalConfig, ExportConfig, RunConfig

ROOT = Path(__file__).parents[1]
KNOBS = {key: (item, value) for key, item, value in knobs(RunConfig())}
SOURCES = [
    path for path in sorted((ROOT / "src").rglob("*.py")) if path.name not in ("schema.py", "plugins.py", "knobs.py")
]
GROUPS = ["augment", "data", "engine", "model", "optim", "runtime", "schedule", "tracking"]
OPTIONS = sorted(path for group in GROUPS for path in (ROOT / "conf" / group).glob("*.yaml"))


@pytest.mark.parametrize("path", OPTIONS, ids=lambda path: f"{path.parent.name}={path.stem}")
def test_an_option_holds_only_what_differs_from_the_schema(path: Path) -> None:
    def repeated(values: dict[str, Any], section: str) -> Iterator[str]:
        for key, value in values.items():
            if isinstance(value, dict):
                yield from repeated(value, f"{section}{key}.")
            elif f"{section}{key}" in KNOBS and KNOBS[f"{section}{key}"][1] == value:
                yield f"{section}{key}={value}"

    values: Any = OmegaConf.to_container(OmegaConf.load(path))
    values.pop("defaults", None)
    assert not list(repeated(values, f"{path.parent.name}."))


def option_sets() -> dict[frozenset[str], str]:
    sets = {}
    for key, item, _ in [*knobs(RunConfig()), *knobs(EvalConfig()), *knobs(ExportConfig())]:
        names = item.metadata["options"] or (item.metadata["plugins"].table if item.metadata["plugins"] else ())
        if len(names) > 1:
            sets[frozenset(names)] = key
    return sets


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT / "src" / "moa_train")))
def test_no_module_lists_the_options_of_a_setting_again(path: Path) -> None:
    known = option_sets()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Tuple | ast.List | ast.Set):
            names = frozenset(entry.value for entry in node.elts if isinstance(entry, ast.Constant))
            assert names not in known, f"{path}:{node.lineno} repeats the options of {known[names]}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT / "src" / "moa_train")))
def test_no_constructor_repeats_a_default(path: Path) -> None:
    """A parameter or field with the name and the default of a setting would drift away from it."""
    defaults: dict[str, list[Any]] = {}
    for key, (_, value) in KNOBS.items():
        if value not in (None, False, True, 0, 1, "", "auto", [], {}):  # these mean nothing in particular
            defaults.setdefault(key.rpartition(".")[2], []).append(value)
    for node in ast.walk(ast.parse(path.read_text())):
        for name, default in given_defaults(node):
            try:
                value = ast.literal_eval(default)
            except ValueError:
                continue
            value = list(value) if isinstance(value, tuple) else value
            assert value not in defaults.get(name, []), f"{path}:{default.lineno} repeats the default {name}={value}"


def given_defaults(node: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    """Yield name and default of the parameters of a function, and of an annotated field."""
    if isinstance(node, ast.FunctionDef):
        positional = [*node.args.posonlyargs, *node.args.args]
        yield from (
            (parameter.arg, default)
            for parameter, default in zip(reversed(positional), reversed(node.args.defaults), strict=False)
        )
        for parameter, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True):
            if default is not None:
                yield parameter.arg, default
    elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
        yield node.target.id, node.value


def test_sections_reach_their_constructors_whole() -> None:
    """No ``locals()``, no ``inspect.signature``, and no function that spells a section out in its parameters."""
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and "runtime" not in path.parts:  # there it tells versions of torch apart
                called = ast.unparse(node.func)
                assert called not in ("locals", "inspect.signature", "signature"), f"{path}:{node.lineno}"
            if isinstance(node, ast.FunctionDef):
                count = len(node.args.args) + len(node.args.kwonlyargs)
                assert count <= 13, f"{path}:{node.lineno} {node.name} has {count} parameters"
