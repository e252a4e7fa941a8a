import os
import subprocess
import sys

import pytest

from moa_train.runtime.cpu import wait_briefly


def test_variables_of_the_user_take_precedence(monkeypatch):
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    wait_briefly()
    assert os.environ["GOMP_SPINCOUNT"] == "3000"
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    wait_briefly()
    assert os.environ["GOMP_SPINCOUNT"] == "7"
    monkeypatch.delenv("GOMP_SPINCOUNT")
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    wait_briefly()
    assert "GOMP_SPINCOUNT" not in os.environ


def test_the_wait_policy_is_set_before_torch_is_imported():
    """Set the variable first, because OpenMP reads it when torch loads OpenMP."""
    script = (
        "import sys, moa_train.cli.app as app; app.wait_briefly = lambda: print('torch' in sys.modules);"
        "from moa_train.cli.train import main; sys.argv = ['moa-train', '--version']; main()"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert result.stdout.split() == ["False", "moa-train", *result.stdout.split()[2:]], result.stderr


PAGES = """
import resource, sys
from moa_train.runtime.cpu import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
import torch
torch.set_num_threads(1)
for turn in range(5):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step = [torch.ones(size << 18) for size in (30, 20, 25, 200) for _ in range(4)]  # MiB
    del step
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux and glibc")
def test_freed_memory_is_reused():
    """Count the page faults of allocating 1,100 MiB of tensors again after freeing them."""
    faults = {
        name: int(
            subprocess.run(
                [sys.executable, "-c", PAGES, name], capture_output=True, text=True, timeout=120, check=True
            ).stdout
        )
        for name in ("kept", "default")
    }
    assert faults["kept"] < 100
    assert faults["default"] > 1000
