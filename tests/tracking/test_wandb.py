import json
import os
import re
import signal
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from moa_train.tracking.jsonl import read_rows

needs_wandb = pytest.mark.skipif(find_spec("wandb") is None, reason="needs wandb")

TRAIN = """
import logging, sys, time
from pathlib import Path
from moa_train.tracking.jsonl import JsonLines
from moa_train.tracking.wandb import WandB, WandBArgs
logging.basicConfig(format="%(message)s")
run_dir, first, last, mode = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
args = WandBArgs(project="digits", entity="us", mode=mode, group="seeds", tags=["a", "b"])
config = {"optim": {"lr": 0.1, "name": "muon"}}
loggers = [JsonLines(run_dir / "metrics.jsonl", first), WandB(run_dir, first, config, args)]
for step in range(first, last):
    for logger in loggers:
        logger.log_step(step, {"loss": step / 7, "lr": None})
        if step % 10 == 0:
            logger.log_eval(step, {"top1": float(step), "best": True})
    print(step, flush=True)
    time.sleep(0.002)
for logger in loggers * 2:  # a tracker is closed twice at the end of a training
    logger.close({"top1": 99.0})
"""


def start(run_dir: Path, first: int, last: int, mode: str, **environment: str) -> "subprocess.Popen[str]":
    """Train in a process that does not see the user's own W&B settings."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    return subprocess.Popen(
        [sys.executable, "-c", TRAIN, str(run_dir), str(first), str(last), mode],
        env={**kept, "HOME": str(run_dir), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def inspect(run_dir: Path) -> list[dict[str, Any]]:
    """Read the records of the only offline run with wandb's own reader."""
    (folder,) = (run_dir / "wandb").glob("offline-run-*")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    return [json.loads(line) for line in done.stdout.splitlines()]


def curve(records: list[dict[str, Any]]) -> list[dict[str, float]]:
    rows = [record["history"]["item"] for record in records if record["type"] == "history"]
    return [{key: value for key, value in row.items() if key not in ("_runtime", "_timestamp")} for row in rows]


def expected(last: int) -> list[dict[str, float]]:
    """One row per step; the evaluation belongs to the row of its step."""
    return [
        {"_step": step, "train/loss": step / 7, **({} if step % 10 else {"val/top1": float(step)})}
        for step in range(last)
    ]


@needs_wandb
def test_sigkill_then_resume_offline_is_one_curve(tmp_path: Path) -> None:
    run_dir = tmp_path / "my run"
    run_dir.mkdir()
    killed = start(run_dir, 0, 10**6, "offline")
    assert killed.stdout is not None
    while int(killed.stdout.readline()) < 60 or not list(run_dir.glob("wandb/offline-run-*/*.wandb")):
        pass
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert len(read_rows(run_dir / "metrics.jsonl")) >= 60
    name = (run_dir / "wandb-id").read_text()

    resumed = start(run_dir, 40, 100, "offline")
    output, errors = resumed.communicate(timeout=60)
    assert (resumed.returncode, errors) == (0, "")
    assert [int(line) for line in output.splitlines()] == list(range(40, 100))  # wandb prints nothing
    records = inspect(run_dir)
    assert curve(records) == expected(100)
    (run,) = [record["run"] for record in records if record["type"] == "run"]
    assert run["run_id"] == name == (run_dir / "wandb-id").read_text()
    assert (run["project"], run["entity"], run["run_group"], run["tags"]) == ("digits", "us", "seeds", ["a", "b"])
    assert run["display_name"] == "my run"
    assert run["config"]["update"]["optim"] == {"lr": 0.1, "name": "muon"}
    summary = [record["summary"]["update"] for record in records if record["type"] == "summary"]
    assert {"final/top1": 99} in summary


@needs_wandb
def test_rows_that_may_have_been_uploaded_are_not_uploaded_again_under_the_same_id(tmp_path: Path) -> None:
    ids = []
    for first, last in ((0, 20), (10, 30)):
        process = start(tmp_path, first, last, "offline")
        assert process.communicate(timeout=60)[1] == ""
        ids.append((tmp_path / "wandb-id").read_text())
        (path,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
        assert path.stem == f"run-{ids[-1]}"
        path.with_suffix(".wandb.synced").touch()  # what "wandb sync" does after an upload
    assert ids[0] != ids[1]
    assert curve(inspect(tmp_path)) == expected(30)


@needs_wandb
def test_a_server_that_does_not_answer_is_a_warning_and_the_run_is_logged_offline(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:  # accepts connections and never answers
        environment = {
            "WANDB_BASE_URL": f"http://127.0.0.1:{server.getsockname()[1]}",
            "WANDB_API_KEY": "0" * 40,
            "WANDB_INIT_TIMEOUT": "1",
        }
        process = start(tmp_path, 0, 20, "online", **environment)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 0
    assert re.fullmatch(
        r"Weights & Biases can't be reached: .*\n"
        rf"The run is logged offline instead\. To upload it later: wandb sync {tmp_path}/wandb/offline-run-\*\n",
        errors,
    )
    assert curve(inspect(tmp_path)) == expected(20)
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl") if row["kind"] == "train"] == list(range(20))


@needs_wandb
def test_online_without_an_api_key_is_an_error(tmp_path: Path) -> None:
    process = start(tmp_path, 0, 1, "online")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "UserError: The logger wandb has no API key. Run 'wandb login', set WANDB_API_KEY, or log" in errors


def test_without_wandb_the_error_says_what_to_install(tmp_path: Path) -> None:
    code = f"import sys; sys.modules['wandb'] = None; sys.argv = ['-c', {str(tmp_path)!r}, '0', '1', 'offline']" + TRAIN
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.stderr.splitlines()[-1] == (
        "moa_train.runtime.errors.UserError: The logger wandb requires wandb, which is not installed. Run: pip install "
        "'moa-train[wandb]'"
    )
