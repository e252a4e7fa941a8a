import hashlib
import io
import tarfile
from contextlib import nullcontext
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest

from moa_train.data import cifar
from moa_train.data.dataset import open_split
from moa_train.data.source import Source
from moa_train.runtime.errors import UserError
from moa_train.schema import DataConfig

COUNT = 12
KINDS = {"cifar10": cifar.Cifar10, "cifar100": cifar.Cifar100}


def opened(name: str, root: Path, split: str = "train", download: bool = False) -> Source:
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
    return replace(archive, md5=hashlib.md5(path.read_bytes()).hexdigest())


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
    with pytest.raises(UserError, match=r"has MD5 .*, expected c32a1d4ab5d03f1284b67883e8d87530"):
        opened("cifar10", tmp_path)
    assert not list(tmp_path.glob("pack-*"))


def test_without_a_network_the_error_says_what_to_fetch_and_where_to_put_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere = "https://127.0.0.1:9/cifar-10-binary.tar.gz"  # nothing listens there
    monkeypatch.setattr(cifar.Cifar10, "archive", replace(cifar.Cifar10.archive, url=nowhere))
    with pytest.raises(UserError) as error:
        opened("cifar10", tmp_path / "data", download=True)
    for needed in (nowhere, "c32a1d4ab5d03f1284b67883e8d87530", str(tmp_path / "data" / "cifar-10-binary.tar.gz")):
        assert needed in str(error.value)


def test_nothing_is_fetched_unless_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar, "fetch", lambda *arguments: pytest.fail("fetched"))
    with pytest.raises(UserError, match=r"Add data\.download=true"):
        opened("cifar10", tmp_path)


@pytest.mark.parametrize("whole", [True, False])
def test_only_a_whole_archive_gets_its_name(tmp_path: Path, whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection of the other breaks half-way; what is left of it would be taken for a damaged archive."""
    remote = tmp_path / "remote"
    remote.mkdir()
    archive = write_archive(remote, "cifar10")
    content = (remote / archive.filename).read_bytes()

    class Server(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content if whole else content[: len(content) // 2])

        def log_message(self, *arguments: object) -> None:
            pass

    root = tmp_path / "data"
    with HTTPServer(("127.0.0.1", 0), Server) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/{archive.filename}"
        monkeypatch.setattr(cifar.Cifar10, "archive", replace(archive, url=address))
        with nullcontext() if whole else pytest.raises(UserError, match="could not be downloaded"):
            opened("cifar10", root, download=True)
        server.shutdown()
    archives = [path.name for path in root.iterdir() if "pack" not in path.name]
    assert archives == ([archive.filename] if whole else [])
