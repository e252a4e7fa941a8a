import os

import pytest

from moa_train.runtime.files import file_type, write_all, write_flushed


def test_all_is_written_if_a_call_takes_little(tmp_path, monkeypatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:700]))
    write_flushed(tmp_path / "file", b"abc" * 1000)
    assert (tmp_path / "file").read_bytes() == b"abc" * 1000
    with pytest.raises(OSError, match="No such file"):
        write_flushed(tmp_path / "none" / "file", b"")


def test_a_write_that_accepts_nothing_is_an_error(monkeypatch):
    """With real processes and files: tests/faults/test_failing_calls.py."""
    monkeypatch.setattr(os, "write", lambda descriptor, data: 0)
    with pytest.raises(OSError, match="accepts no data"):
        write_all(1, b"x")


def test_only_what_is_known_to_be_absent_is_absent(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    assert file_type(tmp_path / "none") is None
    assert file_type(tmp_path / "file" / "below") is None
    assert file_type(tmp_path) == 0o040000
    with pytest.raises(OSError, match="symbolic links"):
        file_type(tmp_path / "loop")
