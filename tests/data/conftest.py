"""Real images for the tests of the input pipeline: two photographs and handwritten digits, from scikit-learn."""

import ctypes
import inspect
import multiprocessing
import re
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor

torch.set_num_threads(1)

M_MMAP_THRESHOLD, BLOCK = -3, 1 << 20  # malloc.h


@pytest.fixture(scope="session")
def photographs() -> list[Image.Image]:
    """Two photographs, 640 x 427."""
    return [Image.fromarray(pixels) for pixels in load_sample_images().images]


@pytest.fixture(scope="session")
def tiles(photographs: list[Image.Image]) -> Tensor:
    """Real 32 x 32 color images, cut from the photographs and enlarged or reduced: uint8, 64 3 32 32."""
    rng = np.random.default_rng(0)
    cut = []
    for place in range(64):
        side = int(rng.integers(16, 200))
        left, top = int(rng.integers(640 - side)), int(rng.integers(427 - side))
        tile = photographs[place % 2].resize((32, 32), Image.Resampling.BICUBIC, (left, top, left + side, top + side))
        cut.append(torch.from_numpy(np.array(tile)).permute(2, 0, 1))
    return torch.stack(cut)


@pytest.fixture
def make_tree(tmp_path: Path, photographs: list[Image.Image]) -> Callable[..., Path]:
    """Return a function that writes a class-folder tree of different crops of the photographs."""
    rng = np.random.default_rng(1)

    def make(
        splits: tuple[str, ...] = ("train", "test"),
        classes: tuple[str, ...] = ("ant", "bee", "cat"),
        per_class: int = 4,
        size: tuple[int, int] = (60, 50),
        suffix: str = ".jpg",
        name: str = "tree",
    ) -> Path:
        root = tmp_path / name
        for split in splits:
            for label, class_name in enumerate(classes):
                folder = root / split / class_name
                folder.mkdir(parents=True)
                for number in range(per_class):
                    left, top = int(rng.integers(400)), int(rng.integers(200))
                    box = (left, top, left + 200, top + 200)
                    photographs[label % 2].resize(size, box=box).save(folder / f"{number:03}{suffix}")
        return root

    return make


@pytest.fixture
def peak() -> Callable[[Callable[[], object]], float]:
    """Return a function that runs an action in its own process and returns the MiB of memory that the action added.

    This counts address space, which is exact; resident memory also depends on what the kernel swaps out.
    """

    def mebibytes(name: str) -> float:
        status = Path("/proc/self/status").read_text()
        return int(re.search(rf"{name}:\s+(\d+)", status)[1]) / 1024

    def measure(action: Callable[[], object]) -> float:
        receiver, sender = multiprocessing.Pipe(duplex=False)

        def run() -> None:
            # Use up the freed memory that earlier tests left in the heap: later blocks are mapped, and counted.
            libc = ctypes.CDLL(None)
            libc.malloc.restype = libc.sbrk.restype = ctypes.c_size_t
            assert libc.mallopt(M_MMAP_THRESHOLD, BLOCK) == 1
            end = libc.sbrk(0)
            while libc.malloc(BLOCK) < end:
                pass
            before = mebibytes("VmSize")  # also the peak so far, since the process is new
            action()
            sender.send(mebibytes("VmPeak") - before)

        process = multiprocessing.get_context("fork").Process(target=run)
        process.start()
        process.join()
        assert process.exitcode == 0
        return float(receiver.recv())

    return measure


@pytest.fixture
def write_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Return a function that writes a module with this name and source, which can then be imported."""

    def write(name: str, source: str) -> None:
        (tmp_path / f"{name}.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)

    return write


@pytest.fixture
def example_of() -> Callable[[object], str]:
    """Return a function that returns the code of the first example in a docstring."""

    def example(documented: object) -> str:
        found = re.search(r"::\n\n((?:(?:    .*)?\n)+)", inspect.cleandoc(documented.__doc__ or ""))
        assert found
        return textwrap.dedent(found[1])

    return example
