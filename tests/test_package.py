"""The wheel in a clean environment, started from another folder in all ways that users start it."""

import ast
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
JOB = ("debug=one_step", "data.limit=64", "engine.batch_size=32", "runtime=cpu", "tracking=quiet")
OUTSIDE = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}


def run(*command: str | Path, cwd: Path, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {**OUTSIDE, "OMP_NUM_THREADS": "1", **more}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, so that builds neither write into the checkout nor use stale files in it."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("src", "conf"):
        shutil.copytree(REPOSITORY / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, copy)
    return copy


@pytest.fixture(scope="module")
def wheel(source: Path) -> Path:
    """The wheel, built from the sdist as for a package index."""
    run(sys.executable, "-m", "build", "--no-isolation", cwd=source)
    return next((source / "dist").glob("*.whl"))


@pytest.fixture(scope="module")
def clean(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an environment with the wheel, which borrows its dependencies from the running environment.

    A .pth file adds them to the path. The .pth files of the running environment are not used, so that an editable
    install stays invisible.
    """
    home = tmp_path_factory.mktemp("clean")
    venv.create(home, symlinks=True)
    binaries = home / "bin"
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        binaries / "python",
        "install",
        "--no-deps",
        "--no-index",
        wheel,
        cwd=home,
    )
    packages = next((home / "lib").glob("python*")) / "site-packages"
    borrowed = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    (packages / "borrowed.pth").write_text("\n".join(borrowed) + "\n")
    return binaries


def test_the_wheel_contains_exactly_all_modules_and_options(source, wheel):
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    modules = {path.relative_to(source / "src").as_posix() for path in (source / "src").rglob("*.py")}
    modules |= {path.relative_to(source / "src").as_posix() for path in (source / "src").rglob("*.[cj]s*")}
    options = {f"moa_train/{path.relative_to(source)}" for path in (source / "conf").rglob("*.yaml")}
    assert packed == modules | options | {"moa_train/conf/__init__.py"}, (
        "The list of packages in pyproject.toml may be incomplete."
    )


def test_imported_packages_are_declared_as_dependencies(source):
    imported = set()
    for path in (source / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                imported.add(node.module.split(".")[0])
    names = {"hydra": "hydra-core", "PIL": "pillow", "yaml": "pyyaml", "sklearn": "scikit-learn"}
    own = sys.stdlib_module_names | {"annotationlib", "moa_train"}  # annotationlib: of Python 3.14
    foreign = {names.get(name, name) for name in imported - own}
    extras = PROJECT["optional-dependencies"]
    required, optional = (
        {requirement.split(">")[0] for requirement in group}
        for group in (PROJECT["dependencies"], [entry for name in extras if name != "dev" for entry in extras[name]])
    )
    assert foreign - optional == required


def test_the_clean_environment_imports_the_wheel(clean, tmp_path):
    probe = "import moa_train, moa_train.conf as conf; print(moa_train.__file__); print(conf.__file__)"
    for place in run(clean / "python", "-c", probe, cwd=tmp_path).stdout.split():
        assert Path(place).is_relative_to(clean.parent)


def test_the_version_is_that_of_the_wheel(clean, wheel, tmp_path):
    found = run(clean / "python", "-c", "import moa_train; print(moa_train.__version__)", cwd=tmp_path).stdout.strip()
    assert found == wheel.name.split("-")[1]


@pytest.mark.parametrize("folder", [".venv", "venv", "env"])
def test_environments_in_the_checkout_are_not_linted(source, tmp_path, folder):
    shutil.copy(source / "pyproject.toml", tmp_path)
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "module.py").write_text("import os, sys\n")
    run(sys.executable, "-m", "ruff", "check", ".", cwd=tmp_path)


@pytest.mark.parametrize("command", PROJECT["scripts"])
def test_every_command_is_installed_and_has_help(clean, tmp_path, command):
    shown = run(clean / command, "--help", cwd=tmp_path)
    assert command in shown.stdout
    assert not list(tmp_path.iterdir())


MODULE = ("-m", "moa_train.cli.train")
WAYS: dict[str, Callable[[Path], tuple[str | Path, ...]]] = {
    "console script": lambda clean: (clean / "moa-train",),
    "python -m": lambda clean: (clean / "python", *MODULE),
    "torchrun -m": lambda clean: (clean / "python", "-m", "torch.distributed.run", "--nproc-per-node", "2", *MODULE),
    "this environment": lambda clean: (sys.executable, *MODULE),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_job_runs_from_another_folder(clean, tmp_path, way):
    done = run(*WAYS[way](clean), *JOB, cwd=tmp_path, MASTER_PORT="0")
    (folder,) = (tmp_path / "outputs").iterdir()
    assert json.loads((folder / "result.json").read_text())["test"]["total"] == 359  # a fifth of the digits
    assert f"moa-eval ckpt={folder.relative_to(tmp_path)}" in done.stdout
    assert ("2 rank(s)" if "torchrun" in way else "1 rank(s)") in done.stdout
    assert "Warning" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["outputs"]
