"""The Makefile changes only environments that it created, and does not use the one of another checkout."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

MAKEFILE = Path(__file__).parents[1] / "Makefile"
NEW = "test -z 'yes' ||"  # of the commands that create an environment


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with an environment, without packages."""
    folder = tmp_path / "one checkout"
    folder.mkdir()
    shutil.copy(MAKEFILE, folder)
    (folder / "pyproject.toml").touch()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / ".venv"], check=True)
    return folder


def made(folder: Path, *arguments: str, environ: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = ["make", "-C", folder, f"PYTHON={sys.executable}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environ)


def test_an_environment_that_make_did_not_create_is_left_alone(checkout):
    done = made(checkout, "lint")
    assert done.returncode == 2
    assert "error: make did not create .venv" in done.stderr
    assert (checkout / ".venv" / "bin" / "python").exists()


def planned(folder: Path) -> list[str]:
    done = made(folder, "--dry-run", "lint")
    assert done.returncode == 0, done.stderr
    return [name for name in (NEW, "pip install") if name in done.stdout]


def change_pyproject(folder: Path) -> None:
    """Make pyproject.toml newer than the environment, by more than the resolution of the file system's clock."""
    later = (folder / ".venv" / "ready").stat().st_mtime + 1
    os.utime(folder / "pyproject.toml", (later, later))


def test_a_copied_or_moved_checkout_and_one_without_its_interpreter_get_a_new_environment(checkout):
    (checkout / ".venv" / "ready").write_text(f"{checkout}\n")
    assert planned(checkout) == []
    copy = shutil.copytree(checkout, checkout.parent / "copy", symlinks=True)
    assert planned(copy) == [NEW, "pip install"]
    moved = checkout.rename(checkout.parent / "moved")
    assert planned(moved) == [NEW, "pip install"]
    moved.rename(checkout)
    assert planned(checkout) == []
    change_pyproject(checkout)
    assert planned(checkout) == ["pip install"]
    (checkout / ".venv" / "bin" / "python").unlink()
    assert planned(checkout) == [NEW, "pip install"]


def test_an_environment_of_an_earlier_makefile_is_kept(checkout):
    (checkout / ".venv" / "ready").touch()
    assert planned(checkout) == []
    change_pyproject(checkout)
    assert planned(checkout) == ["pip install"]


def test_a_new_environment_comes_from_the_interpreter_of_the_one_that_is_removed(checkout):
    """An activated environment is the first on PATH, and another python3 on it might be too old."""
    (checkout / ".venv" / "ready").write_text("/elsewhere\n")
    (checkout / ".venv" / "old").touch()
    python = Path(sys._base_executable)  # type: ignore[attr-defined]
    environ = {**os.environ, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": ""}
    done = made(checkout, "lint", "PYTHON=.venv/bin/python", environ=environ)
    assert "error: The setup failed" in done.stderr  # there is nothing to install
    assert not (checkout / ".venv" / "old").exists()
    assert f"home = {python.parent}\n" in (checkout / ".venv" / "pyvenv.cfg").read_text()


def test_an_interrupted_setup_starts_again(checkout):
    (checkout / ".venv" / "ready").write_text("The setup was interrupted.\n")
    assert planned(checkout) == [NEW, "pip install"]
    shutil.rmtree(checkout / ".venv")
    assert planned(checkout) == [NEW, "pip install"]
