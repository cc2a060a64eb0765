"""Files that are seen whole or not at all, and what to say when the disk refuses."""

from __future__ import annotations

import errno
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from airflow_mlops.exceptions import StorageError

if TYPE_CHECKING:
    from collections.abc import Iterator

#: When a file was written, and which one it is.
FileState = tuple[int, int]

_REMEDIES = {
    errno.ENOSPC: "free space on that disk",
    errno.EDQUOT: "raise the disk quota",
    errno.EACCES: "give this user write permission there",
    errno.EPERM: "give this user write permission there",
    errno.EROFS: "mount that disk writable",
}


@contextmanager
def storage_errors(doing: str) -> Iterator[None]:
    """Turn a full, read-only or forbidden disk into a :class:`StorageError` with the remedy.

    :param doing: what was tried, as in "cannot {doing}".
    """
    try:
        yield
    except StorageError:
        raise
    except OSError as err:
        if err.errno not in _REMEDIES:
            raise
        remedy = _REMEDIES[err.errno]
        raise StorageError(f"cannot {doing}: {err.strerror} ({err.filename}); {remedy}") from err


def file_state(path: Path) -> FileState | None:
    """Give what changes whenever a file is written; ``None`` where there is none."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return None
    return stat.st_mtime_ns, stat.st_ino


def write_whole(path: Path, data: bytes) -> None:
    """Write under a temporary name, flush to disk and rename; a reader sees the old file or the new one.

    :raises StorageError: when the disk is full or not writable; the old file stays.
    """
    with storage_errors(f"write {path}"):
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
