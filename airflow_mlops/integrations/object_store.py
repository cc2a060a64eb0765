"""fsspec: whole files under a URI, in any store it knows."""

from __future__ import annotations

import hashlib
import uuid
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airflow_mlops.exceptions import ConnectionConfigError
from airflow_mlops.integrations.storage import locate

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

#: An object is there as a whole or not at all. Elsewhere a file grows before the eyes of readers, so it is renamed when it is whole.
_OBJECT_STORES = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "memory"})

#: Bytes that are read at a time.
_CHUNK = 4 * 1024**2

#: Number of a file of no bytes: there is nothing in it yet.
EMPTY_FILE = 0


class ObjectStore:
    """Read and write whole files under a URI.

    Credentials are those of the connection, of fsspec's own configuration or of the store's client, never part of the URI.

    :param uri: such as ``s3://bucket/log`` or ``s3://conn_id@bucket/log``.
    :raises ConnectionConfigError: no such protocol, or its package is not installed; names it.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri.rstrip("/")
        self._files, self._root = _file_system(self.uri)
        self._whole = self.uri.partition("://")[0] in _OBJECT_STORES

    def __str__(self) -> str:
        return self.uri

    def find(self, prefix: str) -> list[str]:
        """List the files under a prefix by their names below the URI; hidden ones are left out."""
        with _missing_or_refused(self.uri):
            try:
                paths = self._files.find(f"{self._root}/{prefix}".rstrip("/"))
            except FileNotFoundError:
                return []
        start = self._root.strip("/")
        names = (path.strip("/").removeprefix(start).strip("/") for path in paths)
        return sorted(name for name in names if not name.rpartition("/")[2].startswith("."))

    def read(self, name: str) -> bytes:
        """Give a file's content.

        :raises FileNotFoundError: it is not there.
        """
        with _missing_or_refused(self.uri):
            data: bytes = self._files.cat_file(self._path(name))
            return data

    def write(self, name: str, data: bytes) -> None:
        """Write a file that readers see as a whole or not at all."""
        with self._staged(name) as path:
            self._files.pipe_file(path, data)

    def put(self, name: str, source: Path) -> None:
        """Copy a local file there; readers see it as a whole or not at all."""
        with self._staged(name) as path:
            self._files.put_file(str(source), path)

    def remove(self, name: str) -> None:
        """Delete a file, if it is there."""
        with _missing_or_refused(self.uri):
            try:
                self._files.rm_file(self._path(name))
            except FileNotFoundError:
                return

    def remove_folder(self, name: str) -> None:
        """Delete a folder with all that is in it."""
        with _missing_or_refused(self.uri):
            try:
                self._files.rm(self._path(name), recursive=True)
            except FileNotFoundError:
                return

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    @contextmanager
    def _staged(self, name: str) -> Iterator[str]:
        folder, _, last = self._path(name).rpartition("/")
        with _missing_or_refused(self.uri):
            if self._whole:
                yield f"{folder}/{last}"
                return
            self._files.makedirs(folder, exist_ok=True)
            staged = f"{folder}/.{last}.{uuid.uuid4().hex}.tmp"
            yield staged
            self._files.mv(staged, f"{folder}/{last}")


def file_marks(pattern: str) -> dict[str, int]:
    """Find the files that match a path, glob or URI, each with a number that changes when the file does.

    The number is made of size and time of change, or of what the store calls the content's tag, and is :data:`EMPTY_FILE` where there is
    no byte; the file is not read.
    A file is named without its connection: another one to the same store finds the same files. Hidden files are left out.
    """
    files, root = _file_system(pattern)
    with _missing_or_refused(pattern):
        found = files.glob(root, detail=True)
    hides = not root.rpartition("/")[2].startswith(".")
    return {
        path if files.protocol[0] == "file" else files.unstrip_protocol(path): _mark(facts)
        for path, facts in sorted(found.items())
        if facts.get("type") != "directory" and not (hides and path.rpartition("/")[2].startswith("."))
    }


def read_chunks(file: str, pattern: str) -> Iterator[bytes]:
    """Read a file that :func:`file_marks` found, or a local one, some bytes at a time."""
    if "://" not in file:
        with Path(file).open("rb") as local:
            yield from iter(partial(local.read, _CHUNK), b"")
        return
    files, _ = _file_system(pattern)
    with _missing_or_refused(file), files.open(files._strip_protocol(file), "rb") as remote:
        yield from iter(partial(remote.read, _CHUNK), b"")


def copy_to_disk(file: str, pattern: str, folder: Path) -> Path:
    """Give a local path of a file that :func:`file_marks` found: a copy in the folder, unless it is local already."""
    files, _ = _file_system(pattern)
    if files.protocol[0] == "file":
        return Path(file)
    name = file.rpartition("/")[2]
    copy = folder / f"{hashlib.sha256(file.encode()).hexdigest()[:12]}-{name}"
    with _missing_or_refused(file):
        files.get_file(files._strip_protocol(file), str(copy))
    return copy


def _file_system(uri: str) -> tuple[Any, str]:
    """Open the store of a URI.

    :raises ConnectionConfigError: no such protocol, or its package is not installed; names it.
    """
    import fsspec  # type: ignore[import-untyped]

    place = locate(uri)
    try:
        # Another process writes, too: a listing that was remembered is wrong.
        files, root = fsspec.core.url_to_fs(place.uri, use_listings_cache=False, **place.file_options)
    except (ImportError, ValueError) as err:
        raise ConnectionConfigError(
            f"{uri} can't be opened: {err}. Install the package that fsspec names for it, or correct the URI"
        ) from err
    return files, root


def _mark(facts: Mapping[str, Any]) -> int:
    if facts.get("size") == 0:
        return EMPTY_FILE
    content, times = ("ETag", "etag", "md5Hash"), ("mtime", "LastModified", "updated")
    tagged = any(facts.get(name) for name in content)
    # S3 tells a listing's times in milliseconds and a file's own in seconds; where there is a tag they say nothing new.
    told = [facts.get(name) for name in ("size", *content)] + [
        None if tagged else facts.get(name) for name in times
    ]
    return int(hashlib.sha256(repr(told).encode()).hexdigest()[:15], 16)


@contextmanager
def _missing_or_refused(uri: str) -> Iterator[None]:
    """Turn whatever a store's client raises into an :class:`OSError` that names the URI; a missing file stays one."""
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as err:  # each client has errors of its own: botocore, google, azure, paramiko
        raise OSError(f"{uri} does not answer as it should: {type(err).__name__}: {err!s:.300}") from err
