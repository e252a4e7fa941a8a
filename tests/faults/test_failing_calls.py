"""Row 21: system calls that fail, on a disk that is full, over quota or broken, or on a server in trouble."""

import errno
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from failing_calls import Server
from launch import TINY, arguments, files, state_hash, train_rows

from moa_train.engine.checkpoint import CheckpointStore

pytestmark = [
    pytest.mark.fault(21),
    pytest.mark.skipif(shutil.which("cc") is None or sys.platform != "linux", reason="requires Linux and a C compiler"),
]

EIO, ENOSPC, EDQUOT, ENOSYS = errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.ENOSYS


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    process = Server(tmp_path_factory.mktemp("shim"))
    yield process
    process.close()


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory, server: Server) -> Path:
    """The folder of a run that has done 4 of its 18 steps, with a checkpoint of the third one as well."""
    run = tmp_path_factory.mktemp("begun") / "run"
    code, said = server.run(arguments(f"{TINY} run_dir={run} engine.stop_after='4 steps'"), run.parent)
    assert code == 0, said
    return run


@pytest.fixture
def run(tmp_path: Path, begun: Path) -> Path:
    """A copy of that run."""
    return Path(shutil.copytree(begun, tmp_path / "run", symlinks=True))


def resume(run: Path) -> list[str]:
    return arguments(f"{TINY} run_dir={run} resume=auto")


@pytest.mark.parametrize("place", ["checkpoints", "step-00000004"])
@pytest.mark.parametrize("call", ["list", "stat"])
def test_a_folder_that_cannot_be_read_is_not_taken_for_absent(server, run, call, place, inject):
    before = list(files(run))
    inject()
    code, said = server.run(resume(run), run.parent, f"{call}:{place}:{EIO}")
    assert code == 2, said
    assert f"{place}: Input/output error. Check the storage" in said
    assert "Traceback" not in said
    assert list(files(run)) == before


@pytest.mark.parametrize(
    ("shim", "text"),
    [
        (f"open:.lock:{ENOSPC}", ".lock, which reserves the run folder: No space left on device"),
        (f"write:.lock:{ENOSPC}", ".lock, which reserves the run folder: No space left on device"),
        (f"truncate:.lock:{EIO}", ".lock, which reserves the run folder: Input/output error"),
        (f"flock:.lock:{EIO}", ".lock, which reserves the run folder: Input/output error"),
        ("write:.lock:zero", ".lock, which reserves the run folder: the file system accepts no data"),
        (f"read:provenance.json:{EIO}", "Cannot read {run}/provenance.json: Input/output error"),
        ("write:metrics.jsonl:zero", "metrics.jsonl cannot be written: the file system accepts no data"),
        (f"close:metrics.jsonl:{EDQUOT}", "metrics.jsonl cannot be written: Disk quota exceeded"),
        ("write:model.safetensors:zero", "Cannot save step 5 in {run}/checkpoints: the file system accepts no data"),
        ("write:state.json:zero", "Cannot save step 5 in {run}/checkpoints: the file system accepts no data"),
        (f"close:step-00000005/manifest.json:{EDQUOT}", "Cannot save step 5 in {run}/checkpoints: Disk quota exceeded"),
    ],
)
def test_a_failing_call_is_named_and_the_run_resumes(server, run, shim, text, inject):
    before = list(files(run / "checkpoints"))
    inject()
    code, said = server.run(resume(run), run.parent, shim)
    assert code == 2, said
    assert text.format(run=run) in said
    assert "Traceback" not in said
    if "metrics" not in shim:
        assert list(files(run / "checkpoints")) == before


OTHERS = [
    *(f"fsync:{name}:{EIO}" for name in ("model.safetensors", "optimizer.safetensors", "manifest.json", "00000005")),
    *(f"rename:{name}:{EIO}" for name in ("00000005", "step-00000009")),
    *(f"mkdir:{name}:{ENOSPC}" for name in ("00000005", "step-00000009")),
    *(f"read:{name}:{EIO}" for name in ("state.json", "optimizer.safetensors", "manifest.json")),
    *(f"unlink:step-00000003/{name}:{EIO}" for name in ("manifest.json", "ema.safetensors")),
    *(f"write:{name}:short" for name in ("model.safetensors", "metrics.jsonl", "manifest.json")),
    *(f"write:{name}:interrupted" for name in ("ema.safetensors", "metrics.jsonl", "state.json")),
    *(f"write:{name}:{ENOSPC}" for name in ("ema.safetensors", "metrics.jsonl", "config.json")),
    f"flock:.lock:{ENOSYS}",
]


def test_failing_calls_one_after_the_other(server, run, whole, draw, inject):
    """Every try ends well or with a sentence, loses no checkpoint, and the run ends with the same bits."""
    newest = 4
    for shim in draw.sample(OTHERS, 5):
        inject()
        code, said = server.run([*resume(run), f"engine.stop_after='{newest + 3} steps'"], run.parent, shim)
        assert code in (0, 2), (shim, said)
        assert "Traceback" not in said, (shim, said)
        found = CheckpointStore(run).newest()
        assert found is not None
        assert found.step >= newest, (shim, said)
        newest = min(found.step, 14)
    code, said = server.run(resume(run), run.parent)
    assert code == 0, said
    assert state_hash(run) == state_hash(whole)
    assert train_rows(run) == train_rows(whole)
