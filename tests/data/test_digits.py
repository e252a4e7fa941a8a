"""Reading scikit-learn's file without importing scikit-learn."""

import subprocess
import sys
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

from moa_train.data import digits


def test_the_file_holds_what_scikit_learn_reads(monkeypatch):
    scans = load_digits()
    direct = digits._read()
    assert np.array_equal(direct[:, :64], scans.data)
    assert np.array_equal(direct[:, 64], scans.target)
    monkeypatch.setattr(Path, "exists", lambda path: False)  # a version that keeps it elsewhere
    assert np.array_equal(digits._read(), direct)


def test_scikit_learn_is_not_imported():
    opened = "open_split(DataConfig(name='digits'), 'train')"
    imports = "import sys; from moa_train.schema import DataConfig; from moa_train.data.dataset import open_split"
    code = f"{imports}; {opened}; print('sklearn' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
