import resource

import pytest

from moa_train.runtime.errors import UserError
from moa_train.runtime.files import write_whole


def test_a_disk_that_fills_up_leaves_what_was_there_before(tmp_path):
    path = tmp_path / "result.json"
    write_whole(path, "before")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))  # Python ignores SIGXFSZ
    try:
        with pytest.raises(UserError, match=r"result\.json cannot be written: File too large"):
            write_whole(path, "after" * 10)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]
