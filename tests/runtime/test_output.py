"""Output that fails, in real processes: the reader has exited, the stream is closed, or the disk is full."""

import os
import shlex
import signal
import subprocess
import sys
import time

import pytest

PRINTS = """
import sys
from moa_train.runtime.output import protect_output
protect_output()
for number in range(20000):
    print("line", number)
    if number % 1000 == 0:
        sys.stdout.flush()
open(sys.argv[1], "w").write("finished")
"""


@pytest.mark.parametrize(
    "redirection",
    ["| head -n 1", "| true", ">&-", ">&- 2>&-", "<&- >&- 2>&-", "> /dev/full", "2> /dev/full"],
)
def test_a_process_survives_output_that_fails(tmp_path, redirection):
    script = tmp_path / "prints.py"
    script.write_text(PRINTS)
    words = [sys.executable, str(script), f"{tmp_path}/end"]
    command = f"set -o pipefail; {shlex.join(words)} {redirection}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (tmp_path / "end").read_text() == "finished"  # and no output was written to this file
    assert "Error" not in done.stderr
    assert done.returncode == 0


def test_characters_outside_the_encoding_are_escaped(tmp_path):
    script = "from moa_train.runtime.output import protect_output; protect_output(); print('\\udcff \\u00e9')"
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "\\udcff \\xe9\n"


RUN = "data.limit=64 schedule.duration=2steps schedule.warmup=0 tracking=quiet runtime.device=cpu run_dir=run"


def test_a_reader_that_goes_away_ends_neither_training_nor_evaluation(tmp_path):
    python = f"OMP_NUM_THREADS=1 {shlex.quote(sys.executable)} -m moa_train.cli"
    evaluation = f"{python}.evaluate ckpt=run split=val output=val.json device=cpu"
    for command in (f"{python}.train {RUN} | head -n 2", f"{evaluation} | true"):
        done = subprocess.run(
            ["bash", "-c", f"set -o pipefail; {command}"], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "result.json").is_file()
    assert (tmp_path / "val.json").is_file()


def test_a_ctrl_c_that_also_ends_the_reader_saves_and_exits_with_75(tmp_path):
    """As in ``moa-train | tee log``."""
    words = RUN.replace("2steps", "100000steps").split()
    process = subprocess.Popen(
        [sys.executable, "-m", "moa_train.cli.train", *words, "tracking.log_every=1"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    rows = tmp_path / "run" / "metrics.jsonl"
    try:
        while not (rows.exists() and rows.stat().st_size):  # after the first step, so that there is something to save
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        process.stdout.close()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 75, errors
    assert "Error" not in errors
    assert (tmp_path / "run" / "checkpoints" / "last" / "manifest.json").is_file()
