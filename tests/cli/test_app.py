"""What the commands share: help, the composed configuration and error messages.

One child process tries all command lines, which also shows that none of them imports torch.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moa_train.cli import app
from moa_train.cli.compose import hydra_options
from moa_train.knobs import knobs
from moa_train.runtime.errors import UserError
from moa_train.schema import EvalConfig, RunConfig

CHILD = """
import contextlib, io, json, sys
from moa_train.cli import app, evaluate, sweep, train
from moa_train.schema import EvalConfig, RunConfig

def shown(config):
    paths = []
    if isinstance(config, RunConfig):
        paths = [config.run_dir, config.init, config.data.root, config.sweep.dir, *config.distill.teachers]
    return ascii([path for path in paths if path])

def run(command, arguments):
    sys.argv = [f"moa-{command}", *arguments]
    schema, module = (RunConfig, train) if command == "train" else (EvalConfig, evaluate)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            multirun = sweep.run if command == "train" else None
            task = lambda config, overrides: print("ran", overrides, shown(config))
            app.run(task, schema, command, module.EXAMPLES, multirun)
            code = "returned"
        except SystemExit as leaving:
            code = leaving.code or 0
    return {"code": code, "out": out.getvalue(), "err": err.getvalue(), "torch": "torch" in sys.modules}

print(json.dumps([run(*case) for case in json.load(sys.stdin)]))
"""

# Arguments, and fragments of the message: the key, and the nearest valid name or value.
MISTAKES = {
    "data.root=${oc.env:MY_API_TOKEN}": ["${oc.env:MY_API_TOKEN} looks like a secret", "no setting needs a secret"],
    # unknown keys
    "optm.lr=1": ["optm.lr", "optim.lr"],
    "optim.lrr=1e-3": ["optim.lrr", "optim.lr"],
    "lr=1e-3": ["optim.lr"],
    "batch_size=32": ["engine.batch_size"],
    "engine.batchsize=32": ["engine.batch_size"],
    "learning_rate=1": ["learning_rate", "Did you mean optim.lr?"],
    "optim.foo=3": ["optim.foo", "Keys of optim: name, lr"],
    "++optim.foo=3": ["optim.foo", "Keys of optim"],
    "model.moa.ovelap=1": ["model.moa.overlap"],
    "modle=moa_t": ["Did you mean model?"],
    # unknown options of a group
    "model=moa_x": ["moa_x", "moa_t", "swin_t"],
    "data=cifar-100": ["'cifar100'"],
    "optim=adam": ["'adamw'"],
    "schedule=cos": ["'cosine'"],
    "experiment=cifar": ["'cifar10_cpu'"],
    "augment=randaug": ["Options: cifar, digits, imagenet, light, none"],
    "debug=fast": ["Options: one_step"],
    "model=null": ["model=null", "moa_micro"],
    "model={patch_size:2}": ["model=", "Options: moa_b"],
    # values of the wrong type
    "optim.lr=abc": ["optim.lr=abc", "a number"],
    "optim.lr=": ["optim.lr=", "a number"],
    "optim.lr=null": ["optim.lr=null", "a number"],
    "engine.batch_size=1.5": ["engine.batch_size=1.5", "an integer"],
    "model.depths=2": ["model.depths=2", "[x,y,...]", "an integer"],
    "model.depths=[1,a]": ["model.depths", "an integer"],
    "model.moa.enabled=maybe": ["model.moa.enabled=maybe", "true or false"],
    "data.workers=many": ["data.workers=many", "an integer or null"],
    "data.mean={a:1}": ["data.mean", "a list"],
    # syntax
    "optim.lr=[1,2": ["Cannot parse optim.lr=[1,2", "brackets"],
    "run_dir=a=b": ["Cannot parse run_dir=a=b", "quotes"],
    "optim.lr = 3": ["Cannot parse optim.lr = 3", "without spaces"],
    "moa_b": ["Unexpected argument 'moa_b'", "key=value"],
    "+optim.lr=3": ["Write optim.lr=3"],
    "+model=moa_t": ["Write model=moa_t"],
    "~optim.lr": ["settings cannot be removed"],
    "optim.lr=1e-3,1e-4": ["add -m"],
    "run_dir=/tmp/a,b": ["add -m", "\"run_dir='a,b'\""],
    "-m optim.lr=1e-3,abc": ["optim.lr=abc", "a number"],
    "-m model=moa_t,moa_x": ["model=moa_x", "moa_t"],
    "-m optim.lr=1e-3,1e-4 --cfg job": ["-m cannot be combined with --cfg"],
    "-m --cfg=job optim.lr=1e-3,1e-4": ["-m cannot be combined with --cfg"],
    "-m -c job": ["-m cannot be combined with --cfg"],
    "hydra.run.dir=logs/x": ["hydra.run.dir=logs/x has no effect", "run_dir"],
    "-m hydra.sweep.dir=logs/x optim.lr=1e-3,1e-4": ["hydra.sweep.dir=logs/x has no effect", "sweep.dir"],
    # errors from Hydra
    "--cfg jobs": ["--cfg", "'job'"],
    "--cgf job": ["--cgf"],
    "--multi debug=one_step": ["unrecognized arguments: --multi"],
    "hydra.foo=1": ["hydra.foo"],
    "model.moa=3": ["model.moa"],
    # errors of the composed configuration
    "optim.lr=-1": ["optim.lr=-1.0", "> 0"],
    "optim.name=adam": ["optim.name=adam", "'adamw'"],
    "data=imagenet": ["data=imagenet", "data.root=FOLDER"],
    "engine.batch_size=64 engine.micro_batch_size=48": ["engine.batch_size=64", "48 or 96"],
    "--config-dir=false experiment=off": ["'experiment/off'", "off and no as false", "augment.weak_for"],
    "resume=x init=y": ["resume", "init", "one of the two"],
    "data.image_size=32.5": ["data.image_size=32.5 must be a number of pixels"],
    "data.image_size=[32,32.5]": ["data.image_size=[32, 32.5] must be a number of pixels"],
    # variables of the shell that are not set
    "init=": ["init is empty", "a shell variable is not set"],
    "resume=": ["resume is empty"],
    "run_dir=": ["run_dir is empty"],
    "data.root= data=folder": ["data.root is empty"],
    # recipes
    "--config-dir=nowhere experiment=x": ["--config-dir nowhere: there is no such folder"],
    "--config-dir=~/nowhere experiment=x": [f"--config-dir {Path.home()}/nowhere: there is no such folder"],
    "--config-dir=bad experiment=tab": ["not valid YAML", "bad/experiment/tab.yaml", "line 3"],
    "--config-dir=bad experiment=brace": ["not valid YAML", "bad/experiment/brace.yaml", "line 2"],
    "--config-dir=bad experiment=twice": ["not valid YAML", "duplicate key optim", "line 3"],
    "--config-dir=bad experiment=latin": ["bad/experiment/latin.yaml is not encoded in UTF-8"],
    "--config-dir=bad experiment=unknown": ["Unknown key optim.weight_decy", "Did you mean optim.weight_decay?"],
    "--config-dir=bad experiment=local": ["experiment/ must be: # @package _global_"],
    "--config-dir=bad experiment=empty": ["experiment/ must be: # @package _global_"],
    # what other trainers call it
    "optim.nam=sgd data.limt=5 model.window=x": ["optim.name?", "data.limit?", "model.window=x has the wrong type"],
    "optim.lr=-1 engine.micro_batch_size=3 engine.best_by=x": [
        "optim.lr=-1.0 is out of range",
        "engine.micro_batch_size=3",
        "engine.best_by=x must be one of",
    ],
    "epochs=10": ["Unknown key epochs", "schedule.duration='10 epochs'"],
    "engine.max_steps=10": ["schedule.duration='10 steps'"],
}
EVAL_MISTAKES = {
    "cpkt=x": ["ckpt"],
    "ckpt=x split=dev": ["split=dev", "train, val, test"],
    "ckpt=x batch_size=0": ["batch_size=0", ">= 1"],
    "outputs/RUN": ["'outputs/RUN'", "key=value"],
    "ckpt=": ["ckpt is empty"],
}
RIGHT = {
    "help": ["train", ["--help"]],
    "eval help": ["eval", ["--help"]],
    "version": ["train", ["--version"]],
    "job": ["train", ["model=swin_t", "data=cifar100", "optim.lr=3e-4", "--cfg", "job"]],
    "short job": ["train", ["optim.lr=3e-4", "-c", "job"]],
    "sweep": ["eval", ["-m", "ckpt=a,b"]],
    "own": ["train", ["model=swin_t", "--config-dir", "own", "experiment=mine", "--cfg", "job"]],
    "own, not there": ["train", ["--config-dir=own", "experiment=mone"]],
    "completion": ["train", ["-sc", "install=bash"]],
    "quoted": ["train", ["run_dir='a=b, c'", "data.root=/data/x y", "model.moa={overlap:2}", "data.mean=null"]],
    "ä": ["train", ["run_dir=Läufe/é b", "engine.metrics=[top1]", "data.root=~/bilder", "init='ö'"]],
    "homes": ["train", ["sweep.dir=~/sweeps", "distill.teachers=[~/a, b/é]"]],
    "numbers": ["train", ["run_dir=2024_01_15", "init=1e3", "data.root=1.10"]],
    "home": ["train", ["--config-dir", "own", "experiment=home"]],
    "no recipe": ["train", ["experiment=null", "debug=null"]],
    "environment": ["train", ["data.root=/data/${oc.env:HOME}"]],
}


MINE = """# @package _global_
defaults:
  - override /data: cifar100
  - override /optim: sgd
schedule: {duration: 7 epochs}
"""


OFF = """# @package _global_
augment: {off: 10%}
"""


BAD = {
    "tab": b"# @package _global_\noptim:\n\tlr: 1\n",
    "brace": b"# @package _global_\noptim: {lr: 1\n",
    "twice": b"# @package _global_\noptim: {lr: 1}\noptim: {eps: 2}\n",
    "latin": b"# @package _global_\n# caf\xe9\noptim: {lr: 1}\n",
    "unknown": b"# @package _global_\noptim: {weight_decy: 1}\n",
    "local": b"optim: {lr: 1}\n",
    "empty": b"",
}


def split(text: str) -> list[str]:
    return [text] if " = " in text else text.split()


@pytest.fixture(scope="module")
def tried(tmp_path_factory) -> dict[str, dict]:
    cases = {text: ["train", split(text)] for text in MISTAKES}
    cases |= {"eval " + text: ["eval", split(text)] for text in EVAL_MISTAKES} | RIGHT
    folder = tmp_path_factory.mktemp("tried")
    (folder / "own" / "experiment").mkdir(parents=True)
    (folder / "own" / "experiment" / "mine.yaml").write_text(MINE)
    (folder / "false" / "experiment").mkdir(parents=True)
    (folder / "false" / "experiment" / "off.yaml").write_text(OFF)
    (folder / "own" / "experiment" / "home.yaml").write_text("# @package _global_\ndata: {root: ~/images}\n")
    (folder / "bad" / "experiment").mkdir(parents=True)
    for name, content in BAD.items():
        (folder / "bad" / "experiment" / f"{name}.yaml").write_bytes(content)
    done = subprocess.run(
        [sys.executable, "-c", CHILD],
        input=json.dumps(list(cases.values())),
        capture_output=True,
        text=True,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(cases, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("text", [*MISTAKES, *("eval " + text for text in EVAL_MISTAKES)])
def test_mistakes_are_explained(tried, text):
    found = tried[text]
    assert found["code"] == 2
    assert "ran [" not in found["out"]
    assert "Traceback" not in found["err"]
    assert "HYDRA_FULL_ERROR" not in found["err"]
    assert 1 <= len(found["err"].splitlines()) <= 10
    for fragment in {**MISTAKES, **{"eval " + key: value for key, value in EVAL_MISTAKES.items()}}[text]:
        assert fragment in found["err"]


def test_no_command_line_imports_torch(tried):
    assert not any(found["torch"] for found in tried.values())


def test_errors_are_passed_to_torchrun(monkeypatch, tmp_path, capsys):
    def mistake() -> int:
        raise UserError("three is too many. Nearest: 2.")

    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    assert app._guarded(mistake) == 2
    assert abs(int(json.loads(file.read_text())["timestamp"]) - time.time()) < 60
    os.utime(file, (1000, 1000))
    assert app._guarded(mistake) == 2
    told = {"message": "error: three is too many. Nearest: 2.", "timestamp": "1000"}
    assert json.loads(file.read_text()) == told
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "nowhere" / "error.json"))
    assert app._guarded(mistake) == 2
    assert capsys.readouterr().err.count("error: three is too many. Nearest: 2.\n") == 3


def test_help_shows_examples_groups_and_every_knob(tried):
    text = tried["help"]["out"]
    assert tried["help"]["code"] == 0
    assert "moa-train model=moa_b data=cifar100" in text
    assert "torchrun --nproc-per-node" in text
    assert "--multirun" in text
    for group, options in (("model", "moa_b, moa_micro, moa_s"), ("data", "cifar10, cifar100"), ("optim", "adamw")):
        assert f"{group}: {options}" in text
    for key, item, _ in knobs(RunConfig()):
        (line,) = (line for line in text.splitlines() if line.strip().startswith(f"{key}="))
        assert item.metadata["help"].split("\n")[0][:30] in line
    assert "  optim.lr=0.0009" in text
    assert "[paper, published]" in text


def test_help_can_be_piped_into_head():
    """This needs its own process, because the signal handler applies to the whole process."""
    command = [sys.executable, "-m", "moa_train.cli.train", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as shown:
        assert shown.stdout is not None
        assert shown.stderr is not None
        shown.stdout.close()
        assert shown.stderr.read() == ""


def test_help_of_moa_eval(tried):
    text = tried["eval help"]["out"]
    assert "moa-eval ckpt=outputs/RUN" in text
    assert "--multirun" not in text
    for key, item, _ in knobs(EvalConfig()):
        assert any(
            line.strip().startswith(f"{key}=") and item.metadata["help"][:20] in line for line in text.splitlines()
        )


def test_cfg_job_shows_the_composed_configuration(tried):
    lines = tried["job"]["out"].splitlines()
    assert tried["job"]["code"] == 0
    for line in ("  lr: 0.0003", "  name: swin", "  variant: swin_t", "  name: cifar100", "  mixup: 0.8"):
        assert line in lines
    assert "ran [" not in tried["job"]["out"]


def test_short_options(tried):
    assert tried["short job"]["code"] == 0, tried["short job"]["err"]
    assert "  lr: 0.0003" in tried["short job"]["out"].splitlines()


def test_information_about_hydra_is_printed_once():
    """This needs its own process, because the handlers of logs apply to the whole process."""
    command = [sys.executable, "-m", "moa_train.cli.train", "--info", "searchpath"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.stdout + done.stderr).count("pkg://moa_train.conf") == 1


def test_own_recipes_can_be_in_any_folder(tried):
    assert tried["own"]["code"] == 0, tried["own"]["err"]
    lines = tried["own"]["out"].splitlines()
    for line in ("  variant: swin_t", "  patch_size: 1", "  name: sgd", "  duration: 7 epochs"):
        assert line in lines
    assert tried["own, not there"]["code"] == 2
    folder = Path(__file__).parents[2] / "conf" / "experiment"
    shipped = {path.stem for path in folder.glob("*.yaml")}
    options = ", ".join(sorted({*shipped, "home", "mine"}))
    assert f"Did you mean 'mine'? Options: {options}" in tried["own, not there"]["err"]


def test_shell_completion(tried):
    assert tried["completion"]["code"] == 0, tried["completion"]["err"]
    assert "complete -o nospace" in tried["completion"]["out"]


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("mod", {"model", "model."}),
        ("model=moa_", {"model=moa_b", "model=moa_micro", "model=moa_s", "model=moa_t"}),
        ("model=moa_t optim.weight", {"optim.weight_decay="}),
    ],
)
def test_the_tab_key_completes_groups_options_and_keys(typed, offered):
    command = [sys.executable, "-m", "moa_train.cli.train", "-sc", "query=bash"]
    environment = os.environ | {"COMP_LINE": f"moa-train {typed}"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert set(done.stdout.split()) == offered


def test_version(tried):
    assert tried["version"]["code"] == 0
    assert re.fullmatch(r"moa-train \d+\.\d+\.\d+\n", tried["version"]["out"])  # of the package: test_package.py


def test_only_trainings_can_be_swept(tried):
    assert tried["sweep"]["code"] == 2
    assert "-m is an option of moa-train" in tried["sweep"]["err"]


def test_all_mistakes_are_listed_at_once(tried):
    assert tried["optim.nam=sgd data.limt=5 model.window=x"]["err"].count("\n") == 3


def test_special_characters_in_values(tried):
    assert tried["quoted"]["code"] == 0, tried["quoted"]["err"]


def test_paths_are_accepted_as_typed(tried):
    assert tried["ä"]["code"] == 0, tried["ä"]["err"]
    assert ascii(["Läufe/é b", "ö", str(Path("~/bilder").expanduser())]) in tried["ä"]["out"]
    assert ascii([str(Path("~/images").expanduser())]) in tried["home"]["out"]  # of a recipe
    sweep, teacher = (str(Path(path).expanduser()) for path in ("~/sweeps", "~/a"))
    assert ascii([sweep, teacher, "b/é"]) in tried["homes"]["out"]


def test_texts_that_look_like_numbers_stay_as_they_were_typed(tried):
    assert ascii(["2024_01_15", "1e3", "1.10"]) in tried["numbers"]["out"], tried["numbers"]["err"]


def test_no_recipe_is_a_choice(tried):
    assert "ran [" in tried["no recipe"]["out"], tried["no recipe"]["err"]


def test_overrides_are_not_resolved(tried):
    """Otherwise, the records of a run would contain the value of the variable."""
    assert "ran ['data.root=/data/${oc.env:HOME}']" in tried["environment"]["out"]


def test_commands_are_installed():
    names = {path.name for path in Path(sys.executable).parent.iterdir()}
    if "moa-train" not in names:
        pytest.skip("moa-train is not installed in this environment")
    assert {"moa-train", "moa-eval", "moa-data"} <= names


def test_ctrl_c_prints_no_traceback(monkeypatch, capsys):
    """Raise a real SIGINT while no training handles it."""
    from moa_train.cli import app, data

    def interrupted(*_):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(data, "run_check", interrupted)
    with pytest.raises(SystemExit) as left:
        data.main(["check", "somewhere"])
    assert left.value.code == app._guarded(interrupted) == 130
    assert not any(capsys.readouterr())


def test_options_of_hydra_that_begin_alike_are_not_confused():
    found = hydra_options(["-cn", "train", "-cp", "folder", "-cd", "own"])
    assert (found.cfg, str(found.config_dir)) == (None, "own")
    assert hydra_options(["-c", "job"]).cfg == hydra_options(["-cjob"]).cfg == "job"
