import errno
import hashlib
import io
import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest

from moa_train.data import cifar
from moa_train.data.dataset import open_split
from moa_train.data.source import Source
from moa_train.runtime.errors import UserError
from moa_train.schema import DataConfig

COUNT = 12
KINDS = {"cifar10": cifar.Cifar10, "cifar100": cifar.Cifar100}


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def opened(name: str, root: Path, split: str = "train", download: bool | None = None) -> Source:
    return open_split(DataConfig(name=name, root=str(root), download=download), split)


def write_archive(root: Path, name: str) -> cifar.Archive:
    """Write an archive in the layout of the official one, with few images; return its description."""
    archive = KINDS[name].archive
    rng = np.random.default_rng(0)
    classes = 10 if name == "cifar10" else 100
    path = root / archive.filename
    with tarfile.open(path, "w:gz") as tar:
        members = {archive.names: "\n".join(f"class{label}" for label in range(classes)).encode() + b"\n\n"}
        for part in (part for parts in archive.splits.values() for part in parts):
            records = rng.integers(0, 256, (COUNT, archive.label_bytes + 3072), dtype=np.uint8)
            records[:, 0] = 77  # the coarse label of CIFAR-100
            records[:, archive.label_bytes - 1] = np.arange(COUNT) % 10
            members[part] = records.tobytes()
        for member, data in members.items():
            info = tarfile.TarInfo(member)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return replace(archive, sha256=hashlib.sha256(path.read_bytes()).hexdigest())


@pytest.mark.parametrize(("name", "parts"), [("cifar10", 5), ("cifar100", 1)])
def test_an_archive_in_the_folder_is_packed(
    tmp_path: Path, name: str, parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = write_archive(tmp_path, name)
    monkeypatch.setattr(KINDS[name], "archive", archive)
    source = opened(name, tmp_path)
    assert len(source) == COUNT * parts
    assert len(opened(name, tmp_path, "test")) == COUNT
    assert source.labels[:12].tolist() == [*range(10), 0, 1]
    assert source.classes[3] == "class3"
    with tarfile.open(tmp_path / archive.filename) as tar:
        file = tar.extractfile(archive.splits["train"][-1])
        assert file is not None
        last = np.frombuffer(file.read()[-3072:], np.uint8).reshape(3, 32, 32)  # red, green, blue planes
    assert np.array_equal(source.gather(np.array([len(source) - 1]))[0].numpy(), last)  # type: ignore[union-attr]


def test_other_files_are_not_opened(tmp_path: Path) -> None:
    write_archive(tmp_path, "cifar10")
    with pytest.raises(UserError, match=r"has SHA-256 .*, expected c4a38c50a1bc5f3a"):
        opened("cifar10", tmp_path)
    assert not list(tmp_path.glob("pack-*"))


def test_without_a_network_the_error_says_what_to_fetch_and_where_to_put_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere = "https://127.0.0.1:9/cifar-10-binary.tar.gz"  # nothing listens there
    monkeypatch.setattr(cifar.Cifar10, "archive", replace(cifar.Cifar10.archive, url=nowhere))
    with pytest.raises(UserError) as error:
        opened("cifar10", tmp_path / "data", download=True)
    for needed in (nowhere, cifar.Cifar10.archive.sha256, str(tmp_path / "data" / "cifar-10-binary.tar.gz")):
        assert needed in str(error.value)


def test_nothing_is_fetched_unless_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar, "download", lambda *arguments: pytest.fail("downloaded"))
    with pytest.raises(UserError, match=r"add data\.download=true"):
        opened("cifar10", tmp_path)  # the folder may be a typing error
    monkeypatch.chdir(tmp_path)
    folder = re.escape(str(tmp_path / "data" / "cifar10"))
    with pytest.raises(UserError, match=rf"^{folder} does not hold .*tar\.gz\. To use your own copy, set data\.root"):
        open_split(DataConfig(name="cifar10", download=False), "train")


class Server(HTTPServer):
    """Serves a file. ``breaks`` are the numbers of bytes after which the first connections break."""

    def __init__(self, content: bytes, breaks: tuple[int, ...] = (), ranges: bool = True) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.breaks, self.ranges = content, list(breaks), ranges
        self.starts: list[int] = []
        Thread(target=self.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/cifar-10-binary.tar.gz"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        wanted = self.headers.get("Range") if self.server.ranges else None
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
        self.server.starts.append(start)
        content = self.server.content
        if start >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(content) - start))
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        end = start + self.server.breaks.pop(0) if self.server.breaks else len(content)
        self.wfile.write(content[start:end])

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Server]]:
    """A function that starts a server with a small archive, which takes the place of the official one."""
    (tmp_path / "remote").mkdir()
    archive, servers = write_archive(tmp_path / "remote", "cifar10"), []

    def start(**settings: Any) -> Server:
        servers.append(Server((tmp_path / "remote" / archive.filename).read_bytes(), **settings))
        monkeypatch.setattr(cifar.Cifar10, "archive", replace(archive, url=servers[-1].address))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def files(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if "pack" not in path.name)


def test_missing_data_is_downloaded_to_the_default_folder(tmp_path, remote, monkeypatch, caplog):
    server = remote()
    monkeypatch.chdir(tmp_path)
    caplog.set_level("INFO")
    assert len(open_split(DataConfig(name="cifar10"), "train")) == 5 * COUNT
    assert files(tmp_path / "data" / "cifar10") == ["cifar-10-binary.tar.gz"]
    assert f"Downloading {server.address} to data/cifar10/cifar-10-binary.tar.gz" in caplog.text
    open_split(DataConfig(name="cifar10"), "test")
    assert server.starts == [0]


def test_a_broken_connection_is_continued(tmp_path, remote):
    server = remote(breaks=(1000, 500))
    assert len(opened("cifar10", tmp_path / "data", download=True)) == 5 * COUNT
    assert server.starts == [0, 1000, 1500]


def test_a_later_command_continues_an_interrupted_download(tmp_path, remote):
    server = remote(breaks=(1000, 0))  # the second connection breaks before the first byte
    with pytest.raises(UserError, match=r"could not be downloaded.*continues where it stopped"):
        opened("cifar10", tmp_path / "data", download=True)
    assert files(tmp_path / "data") == ["cifar-10-binary.tar.gz.part"]  # only a whole archive gets its name
    opened("cifar10", tmp_path / "data", download=True)
    assert server.starts == [0, 1000, 1000]
    assert files(tmp_path / "data") == ["cifar-10-binary.tar.gz"]


def test_a_server_without_ranges_sends_everything_again(tmp_path, remote):
    server = remote(breaks=(1000,), ranges=False)
    assert len(opened("cifar10", tmp_path / "data", download=True)) == 5 * COUNT
    assert server.starts == [0, 0]


def test_a_complete_part_is_only_checked(tmp_path, remote):
    server = remote()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "cifar-10-binary.tar.gz.part").write_bytes(server.content)
    opened("cifar10", tmp_path / "data", download=True)
    assert server.starts == [len(server.content)]


def test_another_file_is_deleted_and_never_opened(tmp_path, remote):
    server = remote()
    server.content = server.content[:-1] + b"x"
    with pytest.raises(UserError, match=r"has SHA-256 \w+, expected \w+: it is damaged"):
        opened("cifar10", tmp_path / "data", download=True)
    assert files(tmp_path / "data") == []


def test_a_mirror_takes_the_place_of_the_publisher(tmp_path, remote):
    mirror, publisher = remote(), remote()
    config = DataConfig(name="cifar10", root=str(tmp_path / "data"), download=True, url=mirror.address)
    open_split(config, "train")
    assert (mirror.starts, publisher.starts) == ([0], [])


def test_an_address_that_the_server_does_not_have_is_an_error(tmp_path, remote):
    server = remote(ranges=False)
    server.content = b""  # answered with status 416
    with pytest.raises(UserError, match=r"could not be downloaded \((Requested )?Range Not Satisfiable\)"):
        opened("cifar10", tmp_path / "data", download=True)


def test_the_folder_of_another_data_set_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KINDS["cifar10"], "archive", write_archive(tmp_path, "cifar10"))
    monkeypatch.setattr(KINDS["cifar10"], "num_classes", 9)
    with pytest.raises(UserError, match=r"holds images of 10 classes, but cifar10 has 9"):
        opened("cifar10", tmp_path)


def test_downloads_work_on_file_systems_without_locks(tmp_path, remote, monkeypatch):
    def flock(*arguments: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    remote()
    monkeypatch.setattr("moa_train.data.download.fcntl.flock", flock)
    assert len(opened("cifar10", tmp_path / "data", download=True)) == 5 * COUNT
