"""Download a file whose SHA-256 is known. An interrupted download is resumed, by the same process or a later one."""

import fcntl
import hashlib
import http.client
import logging
import os
import re
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import BinaryIO

from moa_train.runtime.errors import UserError
from moa_train.runtime.lock import NO_LOCKS

log = logging.getLogger(__name__)

TIMEOUT = 30.0
"""Seconds to wait for the server."""
ATTEMPTS = 5
CHUNK = 2**18


def download(url: str, path: Path, sha256: str) -> None:
    """Download ``url`` to ``path``, unless another process does so first; only the whole file gets this name.

    Until then, its content is in ``path`` with the suffix ``.part``.

    Raises:
        UserError: the server cannot be reached, or the file has another SHA-256. The message says what to do.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    with part.open("ab+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)  # a second process waits here
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        if path.exists():
            part.unlink(missing_ok=True)
            return
        have = os.fstat(file.fileno()).st_size  # another process may have removed the file's name
        log.info("Downloading %s to %s%s", url, path, f", from byte {have}" * bool(have))
        try:
            _fetch(url, file)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise UserError(
                f"{url} could not be downloaded ({getattr(error, 'reason', None) or error}). Try again: the download "
                f"continues where it stopped. Or use a mirror (data.url=ADDRESS), or download the file on another "
                f"machine (SHA-256 {sha256}) and copy it to {path}."
            ) from error
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != sha256:
            part.unlink()
            raise UserError(
                f"The file at {url} has SHA-256 {digest}, expected {sha256}: it is damaged or another file, and was "
                f"deleted. Try again, use a mirror (data.url=ADDRESS), or copy the right file to {path}."
            )
        part.replace(path)


def _fetch(url: str, file: BinaryIO) -> None:
    """Append what is missing to ``file``. A connection that breaks is opened again, if it transferred anything."""
    for attempt in range(1, ATTEMPTS + 1):
        before = file.seek(0, 2)
        try:
            _append(url, file)
            return
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, urllib.error.HTTPError) or attempt == ATTEMPTS or file.seek(0, 2) == before:
                raise
            log.info("The connection broke (%s). Continuing at byte %d.", error, file.seek(0, 2))


def _append(url: str, file: BinaryIO) -> None:
    from tqdm import tqdm

    have = file.seek(0, 2)
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416 and have:  # everything is there
            return
        raise
    with response:
        if have and _start_of(response) != have:  # the server ignores ranges
            have = file.seek(0)
            file.truncate()
        size = response.headers.get("Content-Length")
        total = have + int(size) if size else None
        with tqdm(
            total=total, initial=have, unit="B", unit_scale=True, file=sys.stderr, disable=None, leave=False
        ) as progress:
            while chunk := response.read(CHUNK):
                file.write(chunk)
                progress.update(len(chunk))
        file.flush()
        if total is not None and file.tell() < total:
            raise http.client.IncompleteRead(b"", total - file.tell())


def _start_of(response: http.client.HTTPResponse) -> int:
    """Return the position of the first byte that the server sends."""
    found = re.match(r"bytes (\d+)-", response.headers.get("Content-Range") or "")
    return int(found[1]) if found else 0
