"""Record the command, code, versions and machine of a run in its folder at each start."""

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from moa_train.runtime.errors import UserError
from moa_train.runtime.files import file_type, write_whole, writing

FILE = "provenance.json"
PACKAGES = ("torch", "torchvision", "numpy", "pillow", "safetensors", "einops", "hydra-core", "omegaconf")
DIFF_LIMIT = 10 * 2**20
_SOURCE = Path(__file__).resolve().parents[1]


def collect() -> dict[str, Any]:
    """Return a JSON-serializable record of this start of the program. It never fails; unknown values are None."""
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": command(),
        "directory": os.getcwd(),  # noqa: PTH109 equivalent to Path.cwd()
        "host": socket.gethostname(),
        "code": {"sha256": source_digest(), **git_state(_SOURCE)},
        "versions": versions(),
        "hardware": _hardware(),
    }


def command() -> str:
    """Return the command line that started this process, including torchrun."""
    words = list(sys.orig_argv)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        world, local = (os.environ.get(name, "1") for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
        nodes = max(1, int(world) // max(1, int(local)))
        script = ["--no-python", *words] if words[1:2] != ["-u"] else words[2:]
        words = ["torchrun", "--nnodes", str(nodes), "--nproc-per-node", local, *script]
    return shlex.join(words)


def source_digest(source: Path = _SOURCE) -> str:
    """Return the SHA-256 of the names and contents of the package's Python files."""
    digest = hashlib.sha256()
    for path in sorted(source.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(source).as_posix()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def versions() -> dict[str, str | None]:
    """Return the versions of Python, moa-train and the packages that results depend on."""
    found: dict[str, str | None] = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for package in ("moa-train", *PACKAGES):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def git_state(source: Path) -> dict[str, Any]:
    """Return the commit, diff and untracked files of the git checkout that tracks ``source``; None if there is none."""
    # A virtual environment may lie inside the checkout of another project, which does not track it.
    if not _git(source, "ls-files", "--", "."):
        return {"commit": None, "diff": None, "untracked": None}
    untracked = _git(source, "ls-files", "--others", "--exclude-standard", "--", ".")
    diff = _git(source, "diff", "HEAD", "--no-ext-diff", "--no-textconv", "--no-color", "--binary")
    return {
        "commit": (_git(source, "rev-parse", "HEAD") or "").strip() or None,
        "diff": diff[:DIFF_LIMIT] if diff is not None else None,
        "untracked": (untracked or "").splitlines()[:100],
    }


def _git(source: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=source,
            capture_output=True,
            timeout=10,
            check=True,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode(errors="replace")


def _hardware() -> dict[str, Any]:
    gpus = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            gpus.append(f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    return {"cpu": _cpu_name(), "cores": os.cpu_count(), "gpus": gpus, "system": platform.platform()}


def _cpu_name() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def write(run_dir: Path, record: Mapping[str, Any]) -> Path:
    """Append ``record`` (the result of `collect`, plus any other keys) to provenance.json and return the file's path.

    The file is replaced atomically. It contains a list with one record per start, oldest first. A diff is written to a
    separate file, ``code-<sha256>.diff``, to which the record refers.
    """
    record = {**record, "code": dict(record["code"])}
    diff = record["code"].pop("diff", None)
    if diff:
        name = _diff_name(diff)
        write_whole(run_dir / name, diff)
        record["code"]["diff_file"] = name
    path = run_dir / FILE
    with writing(path):
        if not (starts := read(run_dir)) and file_type(path) is not None:
            path.replace(path.with_name(f"{FILE}.damaged"))
    write_whole(path, json.dumps([*starts, record], indent=1) + "\n")
    return path


def read(run_dir: Path) -> list[dict[str, Any]]:
    """Return the records of all starts of a run. A missing or damaged file counts as empty.

    Raises:
        UserError: the file cannot be read.
    """
    path = run_dir / FILE
    try:
        records = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return []
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}. Check the storage, then resume the run.") from error
    return records if isinstance(records, list) else []


def brief(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a record that `reproduce` needs, small enough for the header of every weights file."""
    if not record:
        return {}
    diff = record["code"].get("diff")
    code = {
        "sha256": record["code"]["sha256"],
        "commit": record["code"]["commit"],
        "diff_file": diff and _diff_name(diff),
    }
    return {**{key: record[key] for key in ("started", "command", "directory", "versions")}, "code": code}


def reproduce(starts: Sequence[Mapping[str, Any]]) -> str:
    """Return a shell script of the commands that produced a checkpoint, one for each start of its run."""
    lines = []
    for start in starts:
        if "command" not in start:
            continue
        code, versions = start["code"], start["versions"]
        commit = f", commit {code['commit']}" if code["commit"] else ""
        diff = f" with the changes in {code['diff_file']}" if code["diff_file"] else ""
        lines += [
            f"# {start['started']}, from step {start['first_step']} on {start['ranks']} rank(s): moa-train "
            f"{versions['moa-train']}{commit}{diff} (sha256 {code['sha256'][:12]}), torch {versions['torch']}",
            f"cd {shlex.quote(start['directory'])}",
            start["command"],
        ]
    return "\n".join(lines)


def _diff_name(diff: str) -> str:
    return f"code-{hashlib.sha256(diff.encode()).hexdigest()[:12]}.diff"
