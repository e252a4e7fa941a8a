import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moa_train.tracking import provenance


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture(autouse=True)
def _no_other_repository(monkeypatch) -> None:
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def checkout(tmp_path) -> Path:
    folder = tmp_path / "checkout"
    (folder / "src").mkdir(parents=True)
    (folder / "src/code.py").write_text("a = 1\n")
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "first")
    return folder


def test_a_record_is_complete_and_json():
    record = json.loads(json.dumps(provenance.collect()))
    assert record["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert record["versions"]["python"] == sys.version.split()[0]
    assert len(record["code"]["sha256"]) == 64
    assert record["hardware"]["cores"] == os.cpu_count()
    assert record["hardware"]["cpu"]
    assert Path(record["directory"]) == Path.cwd()
    assert shlex.split(record["command"])[0] == sys.orig_argv[0]


def test_commit_diff_and_untracked_files_of_the_checkout(checkout):
    head = git(checkout, "rev-parse", "HEAD")
    assert provenance.git_state(checkout / "src") == {"commit": head, "diff": "", "untracked": []}
    (checkout / "src/code.py").write_text("a = 2\n")
    (checkout / "src/new.py").write_text("")
    state = provenance.git_state(checkout / "src")
    assert state["commit"] == head
    assert "-a = 1\n+a = 2\n" in state["diff"]
    assert state["untracked"] == ["new.py"]


def test_the_checkout_of_another_project_around_an_installed_package_is_ignored(checkout):
    (checkout / ".gitignore").write_text("site-packages\n")
    (checkout / "site-packages/moa_train").mkdir(parents=True)
    (checkout / "site-packages/moa_train/code.py").write_text("")
    nothing = {"commit": None, "diff": None, "untracked": None}
    assert provenance.git_state(checkout / "site-packages/moa_train") == nothing


def test_without_git_or_a_commit_it_does_not_fail(checkout, tmp_path, monkeypatch):
    nothing = {"commit": None, "diff": None, "untracked": None}
    assert provenance.git_state(tmp_path) == nothing
    git(checkout, "checkout", "-q", "--orphan", "empty")
    assert provenance.git_state(checkout / "src")["commit"] is None
    monkeypatch.setenv("PATH", "")
    assert provenance.git_state(checkout / "src") == nothing


def test_every_start_adds_a_record_and_equal_diffs_share_a_file(tmp_path):
    record = {"command": "one", "code": {"sha256": "x", "commit": "c", "diff": "+a\n"}}
    provenance.write(tmp_path, record)
    provenance.write(tmp_path, {**record, "command": "two"})
    path = provenance.write(tmp_path, {"command": "three", "code": {"sha256": "y", "commit": None, "diff": None}})
    records = json.loads(path.read_text())
    assert records == provenance.read(tmp_path)
    assert [entry["command"] for entry in records] == ["one", "two", "three"]
    (diff,) = tmp_path.glob("*.diff")
    assert diff.read_text() == "+a\n"
    assert records[0]["code"] == records[1]["code"] == {"sha256": "x", "commit": "c", "diff_file": diff.name}
    assert "diff_file" not in records[2]["code"]
    assert record["code"]["diff"] == "+a\n"  # the caller's record is unchanged
    assert sorted(path.name for path in tmp_path.iterdir()) == [diff.name, "provenance.json"]


def test_a_damaged_file_is_renamed_not_lost(tmp_path):
    (tmp_path / "provenance.json").write_text('[{"command": "one"')
    assert provenance.read(tmp_path) == []
    provenance.write(tmp_path, {"command": "two", "code": {}})
    assert [entry["command"] for entry in provenance.read(tmp_path)] == ["two"]
    assert (tmp_path / "provenance.json.damaged").read_text() == '[{"command": "one"'


def test_the_command_line_can_be_typed_again(tmp_path):
    script = tmp_path / "a script.py"
    script.write_text("from moa_train.tracking.provenance import command; print(command())")
    words = [sys.executable, str(script), "model=moa_t", "data.root=/my data"]
    plain = {name: value for name, value in os.environ.items() if name != "TORCHELASTIC_RUN_ID"}
    done = subprocess.run(words, env=plain, capture_output=True, text=True, timeout=60, check=True)
    assert shlex.split(done.stdout) == words


@pytest.mark.parametrize(
    ("worker", "typed"),
    [
        (["python", "-u", "-m", "moa_train.cli.train", "a=b c"], ["-m", "moa_train.cli.train", "a=b c"]),
        (["python", "-u", "train.py"], ["train.py"]),
        (["python", "/bin/moa-train", "a=b"], ["--no-python", "python", "/bin/moa-train", "a=b"]),
    ],
)
def test_the_command_includes_torchrun(monkeypatch, worker, typed):
    """Torchrun starts its workers with -u, except with --no-python."""
    monkeypatch.setattr(sys, "orig_argv", worker)
    for name, value in (("TORCHELASTIC_RUN_ID", "x"), ("WORLD_SIZE", "4"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    prefix = ["torchrun", "--nnodes", "2", "--nproc-per-node", "2"]
    assert shlex.split(provenance.command()) == [*prefix, *typed]


def test_the_digest_covers_the_files_of_the_package():
    source = Path(provenance.__file__).parents[1]
    assert provenance.source_digest() == provenance.source_digest(source)


def test_a_changed_byte_or_name_changes_the_digest(tmp_path):
    digests = set()
    for name, content in (("a.py", "x"), ("a.py", "y"), ("b.py", "y"), ("sub/b.py", "y")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
        digests.add(provenance.source_digest(tmp_path))
        (tmp_path / "__pycache__").mkdir(exist_ok=True)
        (tmp_path / "__pycache__/a.pyc").write_text(name + content)
    assert len(digests) == 4
    assert provenance.source_digest(tmp_path) in digests
