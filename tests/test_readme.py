"""The documentation is correct: commands are accepted, links exist, and tables are complete."""

import os
import re
import runpy
import shlex
import sys
import tomllib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
from hydra.core.config_store import ConfigStore
from torch.distributed.run import get_args_parser

from moa_train.cli import bench, model, sweep
from moa_train.cli.compose import compose, typed
from moa_train.cli.overrides import check_overrides
from moa_train.knobs import knobs
from moa_train.runtime.signals import Exit
from moa_train.schema import EvalConfig, ExportConfig, PredictConfig, RunConfig

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
CONF = ROOT / "conf"
DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
SCHEMAS = {"train": RunConfig, "eval": EvalConfig, "export": ExportConfig, "predict": PredictConfig}
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
MODULES = {path.split(":")[0].rpartition(".")[2]: name.removeprefix("moa-") for name, path in SCRIPTS.items()}


def commands(text: str) -> Iterator[str]:
    """Yield the lines of a text that start with a command of this project, without their comments."""
    names = rf"{'|'.join(SCRIPTS)}|torchrun|sbatch|scripts/\S+|make|python -m|python scripts/\S+"
    for line in re.sub(r" *\\\n\s*", " ", text).splitlines():
        if found := re.match(rf"(?:#   |#? {{0,6}})((?:{names})(?: +\S.*)?$)", line):
            command = re.split(r"  +[^- ]|\s#\s", found[1])[0]  # two spaces separate a command from its explanation
            yield " ".join(command.split())


def shown() -> Iterator[tuple[str, str]]:
    """Yield ``(place, command line)`` for all commands in documents, configuration files, scripts and --help."""
    for path in DOCUMENTS:
        for block in re.findall(r"^```bash\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL):
            yield from ((path.name, command) for command in commands(block))
    for path in [*CONF.rglob("*.yaml"), *(ROOT / "scripts").glob("*.s*")]:
        yield from ((path.name, command) for command in commands(path.read_text()))
    for name in MODULES:
        examples = import_module(f"moa_train.cli.{name}").EXAMPLES.partition("\n")[2]  # without its title
        yield from ((f"moa_train.cli.{name}", command) for command in commands(examples))


COMMANDS = sorted({command: where for where, command in shown()}.items())


@pytest.fixture(scope="module", autouse=True)
def _conf() -> Iterator[None]:
    sys.path.append(str(ROOT / "tests" / "own_code"))  # the folder with my_package
    for command, schema in SCHEMAS.items():
        ConfigStore.instance().store(name=f"{command}_schema", node=schema)
        ConfigStore.instance().store(group="hydra/help", name=f"{command}_help", node={})
    yield
    sys.path.pop()


def test_the_documents_contain_commands():
    programs = {command.split()[0] for command, _ in COMMANDS}
    assert programs >= {"moa-train", "moa-eval", "moa-data", "moa-bench", "torchrun", "sbatch", "make"}
    assert len(COMMANDS) > 30


@pytest.mark.parametrize("command", [pytest.param(command, id=f"{where}: {command}") for command, where in COMMANDS])
def test_every_command_line_is_accepted(command):
    program, *arguments = shlex.split(re.sub(r'\[key=value ...\]|"\$@"|"\$\{@:2\}"', "", command))
    if program == "torchrun":
        options = get_args_parser().parse_args(arguments)
        assert options.module
        accept(MODULES[options.training_script.removeprefix("moa_train.cli.")], options.training_script_args)
    elif program == "make":
        accept_make(arguments)
    elif program == "python" and arguments[0] == "-m":
        assert arguments[1] == "build"
    elif program == "python":
        accept_script(*arguments)
    elif program == "sbatch":
        script = next(number for number, argument in enumerate(arguments) if argument.endswith(".slurm"))
        assert (ROOT / arguments[script]).is_file()
        accept("train", arguments[script + 1 :])
    elif program.startswith("scripts/"):
        assert os.access(ROOT / program, os.X_OK)
    else:
        accept(program.removeprefix("moa-"), arguments)


def test_brackets_are_quoted_for_zsh():
    """Zsh replaces unquoted brackets by the names of files, and refuses the command if there are none."""
    inline = rf"`((?:{'|'.join(SCRIPTS)}) [^`]*)`"
    lines = [command for command, _ in COMMANDS] + re.findall(inline, "".join(path.read_text() for path in DOCUMENTS))
    unquoted = {line: re.sub(r"'[^']*'|\"[^\"]*\"", "", line) for line in lines}
    assert [line for line, rest in unquoted.items() if re.search(r"\w=\S*[][(){}*?]", rest)] == []


def accept_script(path: str, *arguments: str) -> None:
    """Parse ``arguments`` with the parser of a script, which passes the others on."""
    if path == "scripts/tables.py":
        assert arguments in (("run",), ("write",))  # run: followed by the arguments of reproduce.sh
        return
    others = runpy.run_path(str(ROOT / path))["parser"]().parse_known_args(arguments)[1]
    if path == "scripts/time_stop.py":
        accept("train", others)
    else:
        assert (path, others) == ("scripts/torture.py", [])


def accept_make(arguments: list[str]) -> None:
    targets = set(re.findall(r"^([a-z]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {argument for argument in arguments if "=" not in argument} <= targets
    assert {argument.split("=")[0] for argument in arguments if "=" in argument} <= {"PYTHON", "ARGS"}


def accept(program: str, arguments: list[str]) -> None:
    """Parse ``arguments`` with the program's own code, or compose and validate every job of a multirun."""
    if program == "model":
        command, *arguments = arguments
        model.take_gpus(arguments)
        if command == "summary":
            return accept("train", [*arguments, "data.root=."])  # it reads no image
        assert command == "convert"
    if program == "bench":
        options, overrides = bench.read(arguments)
        known = ["data.root=."] if bench.IMAGELESS.issuperset(options.parts) else []
        return accept("train", [*overrides, *known])
    if program not in SCHEMAS and "--help" in arguments:
        return None
    if program not in SCHEMAS:
        assert import_module(f"moa_train.cli.{program}").parser().parse_args(arguments)
        return None
    if "--config-dir" in arguments:  # a folder of the user, which tests/cli/test_app.py tests
        return None
    check_overrides(arguments, SCHEMAS[program])
    assert set(arguments) - {"--help", "-m", "--cfg", "job"} == {text for text in arguments if "=" in text}
    if sweep.requested(arguments) and not all(text.startswith(("-m", "sweep.")) for text in arguments):
        sweep.check([text for text in arguments if text not in sweep.FLAGS], program)
    else:
        typed(compose(program, [text for text in arguments if "=" in text], [CONF]))
    return None


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_exists(path):
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text())
    missing = [link for link in links if not link.startswith("http") and not (path.parent / link).exists()]
    assert not missing


def test_the_table_of_groups_equals_conf():
    rows = re.findall(r"^\| `(\w+)` \| ((?:`\w+\*?` ?)+)\|", README, re.MULTILINE)
    described = {group: re.findall(r"[\w*]+", options) for group, options in rows}
    folders = [folder for folder in CONF.iterdir() if list(folder.glob("*.yaml"))]
    assert described.keys() == {folder.name for folder in folders}
    for folder in folders:
        matches = [{path.stem for path in folder.glob(f"{option}.yaml")} for option in described[folder.name]]
        assert all(matches)
        assert set().union(*matches) == {path.stem for path in folder.glob("*.yaml")}


def test_the_table_of_commands_is_complete():
    assert re.findall(r"^\| `(moa-\w+)` \|", README, re.MULTILINE) == list(SCRIPTS)


def test_the_table_of_exit_codes_is_complete():
    assert re.findall(r"^\| (\d+) \|", README, re.MULTILINE) == [str(code.value) for code in Exit]


def test_the_table_of_changes_on_a_resume_names_the_settings_that_are_fixed():
    table = (ROOT / "docs" / "RELIABILITY.md").read_text().partition("\n| change | policy |\n")[2]
    refused = ", ".join(re.findall(r"^\| (.+) \| refused \|$", table, re.MULTILINE))
    assert refused.startswith("architecture, data set, `model.args`, ")
    fixed = {key for key, item, _ in knobs(RunConfig()) if item.metadata["fixed"] and not key.startswith("model.")}
    assert set(re.findall(r"`(\S+)`", refused)) == fixed - {"data.name"} | {"model.args"}


def test_the_first_commands_are_those_of_continuous_integration():
    assert "\nmake train " in README
    assert "\nmake test " in README
    assert (ROOT / ".ci" / "run").read_text().rstrip().endswith("exec make test")
