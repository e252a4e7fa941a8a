"""Worker processes where Linux's ways do not exist, as on macOS: they are spawned, without prctl and /dev/shm."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

SCRIPT = """
import ctypes, multiprocessing, sys
from pathlib import Path

import torch

def hide_linux():
    sys.platform = "darwin"
    ctypes.CDLL = None
    is_dir = Path.is_dir
    Path.is_dir = lambda path: str(path) != "/dev/shm" and is_dir(path)

hide_linux()  # in the workers too, which import this file
if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    from moa_train.assembly.inputs import build_eval_loader, build_train_loader
    from moa_train.data.dataset import open_split
    from moa_train.runtime.cpu import keep_freed_memory
    from moa_train.runtime.distributed import Distributed
    from moa_train.schema import RunConfig

    assert not keep_freed_memory()
    config, batches = RunConfig(), {}
    config.data.name, config.data.root = "folder", sys.argv[1]
    config.engine.batch_size = config.engine.eval_batch_size = 8
    source = open_split(config.data, "train")
    for workers in (0, 2):
        config.data.workers = workers
        alone = Distributed(torch.device("cpu"))
        stream = build_train_loader(config, source, alone).batches()
        batches[workers] = [next(stream).images for _ in range(3)]
        batches[workers] += [batch.images for batch in build_eval_loader(config, source, alone)]
        stream.close()
    assert len(batches[0]) > 5
    assert all(torch.equal(mine, its) for mine, its in zip(batches[0], batches[2], strict=True))
    print("equal")
"""


def test_spawned_workers_read_the_same_batches(make_classes: Callable[[int], Path], tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), str(make_classes(3))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.stdout == "equal\n", done.stderr[-3000:]
