"""The demo's folder: one demo at a time, and nothing in it that is not the demo's."""

from __future__ import annotations

import contextlib
import fcntl
import shutil
from typing import TYPE_CHECKING

from airflow_mlops.demo.errors import DemoError
from airflow_mlops.demo.processes import end_leftovers
from airflow_mlops.exceptions import StorageError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

#: Says that a folder is ours to clear, and is locked by the demo that runs in it.
MARKER = ".airflow-mlops-demo"

#: What runs in it, for the run after a crash.
NOTE = ".processes.json"


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[Path]:
    """Take an empty folder, or one of an earlier demo: end what that left running, then clear it.

    :returns: the folder, absolute.
    :raises DemoError: it holds somebody's files, or another demo runs in it.
    :raises StorageError: it can't be written.
    """
    folder = folder.expanduser().resolve()
    marker = folder / MARKER
    try:
        if folder.is_dir() and any(folder.iterdir()) and not marker.is_file():
            raise DemoError(
                f"{folder} is not empty and no folder of this demo, which would clear it: choose another --workspace"
            )
        folder.mkdir(parents=True, exist_ok=True)
        with marker.open("a+") as lock:
            _lock(lock.fileno(), folder)
            end_leftovers(folder / NOTE)
            _clear(folder)
            yield folder
    except (FileExistsError, NotADirectoryError, PermissionError) as err:
        raise StorageError(
            f"the workspace {folder} can't be written: {err.strerror}; choose another"
        ) from err


def _lock(descriptor: int, folder: Path) -> None:
    """Lock until the process ends, however it ends."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as err:
        raise DemoError(f"another demo runs in {folder}: end it, or choose another --workspace") from err


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name == MARKER:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
