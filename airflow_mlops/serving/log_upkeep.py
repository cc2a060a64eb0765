"""Upkeep of the inference log beside the service: upload, merge the small files of an hour that is over, delete old hours.

``python -m airflow_mlops.serving.log_upkeep FOLDER`` merges and deletes once; the service starts it every ten minutes, as a process of
low priority, so that neither its memory nor its threads are the service's.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from airflow_mlops.exceptions import StorageError
from airflow_mlops.serving.log_files import (
    EVERYBODY,
    MERGED,
    MERGED_AT,
    PART,
    REPLACES,
    LocalFolder,
    Place,
    by_schema,
    file_name,
    is_merged,
    place_of,
    replaced_by,
    time_span,
    written_by,
)
from airflow_mlops.serving.log_settings import LogSettings

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

logger = logging.getLogger(__name__)

MERGE_SECONDS = 600.0
#: An hour is merged this long after its end, when the last flush has written its file.
_SETTLED = timedelta(minutes=2)
#: What was merged is deleted this much later: whoever listed it before may still read it.
GRACE = timedelta(minutes=10)
_LONGEST_PAUSE_SECONDS = 60.0


class Upkeep:
    """What happens to a log's files after the flush, from a thread of its own.

    :param root: the log's folder.
    :param settings: of the log.
    :raises ConnectionConfigError: the URI can't be opened.
    """

    def __init__(self, root: Path, settings: LogSettings) -> None:
        self.root = root
        self.settings = settings
        self._remote = place_of(settings.uri) if settings.uri else None
        self._spool_bytes = 0
        self._failure = ""
        self._merging: subprocess.Popen[bytes] | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="inference-log-upkeep", daemon=True)

    @functools.cached_property
    def writer(self) -> str:
        """Name of this folder, for the files it writes: of several that upload to one URI each merges its own."""
        path = self.root / ".writer"
        self.root.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError), tempfile.NamedTemporaryFile(dir=self.root) as made:
            made.write(uuid.uuid4().hex[:12].encode())
            made.flush()
            os.link(made.name, path)  # whole, and of several workers the first one's
        return path.read_text()

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """Upload what was flushed last, and end; what can't be uploaded now waits for the next start."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join(timeout=10)

    def spooled(self, size: int) -> None:
        """Take note of a file that was written."""
        self._spool_bytes += size

    def require_room(self) -> None:
        """See that another file may wait for its upload.

        :raises StorageError: too much does already.
        """
        most = self.settings.spool_megabytes * 1_000_000
        if self._remote is not None and self._spool_bytes > most:
            raise StorageError(
                f"{self._spool_bytes} bytes in {self.root} wait for their upload, at most {most} may: {self._remote} takes none "
                f"({self._failure or 'it is too slow'}); raise spool_megabytes, or see that it can be written"
            )

    def upload(self) -> None:
        """Move what was flushed to the URI, whole file by whole file.

        A file that is there already, as the process was killed in between, is written once more with the same content.

        :raises OSError: the URI or the disk refuses; what is not uploaded stays.
        """
        if self._remote is None or not self.root.exists():
            return
        local = LocalFolder(self.root)
        with exclusive(self.root) as mine:
            for name in _parquet(local.find("")) if mine else ():
                self._remote.put(name, self.root / name)
                local.remove(name)
        self._spool_bytes = sum(_size(self.root / name) for name in _parquet(local.find("")))

    def _run(self) -> None:
        merged, pause = time.monotonic(), self.settings.flush_seconds
        while not self._stopped.wait(pause):
            pause = self._try_upload(pause)
            if time.monotonic() - merged >= MERGE_SECONDS:
                merged = time.monotonic()
                self._start_merge()
        self._try_upload(pause)

    def _try_upload(self, pause: float) -> float:
        """Upload; gives the seconds to wait: longer each time it fails."""
        try:
            self.upload()
        except Exception as err:  # noqa: BLE001 - whatever it is, the files are still here
            if str(err) != self._failure:
                self._failure = str(err)
                logger.warning("the inference log stays in %s for now: %s", self.root, err)
            return min(2.0 * pause, _LONGEST_PAUSE_SECONDS)
        self._failure = ""
        return self.settings.flush_seconds

    def _start_merge(self) -> None:
        if self._merging is not None and self._merging.poll() is None:
            return
        command = [sys.executable, "-m", "airflow_mlops.serving.log_upkeep", str(self.root)]
        environment = os.environ | {"POLARS_MAX_THREADS": "1"}
        try:
            self._merging = subprocess.Popen(  # noqa: S603 - our own interpreter and module
                command, env=environment, stdin=subprocess.DEVNULL
            )
        except OSError as err:
            logger.warning("the hours of %s are not merged for now: %s", self.root, err)


@contextlib.contextmanager
def exclusive(root: Path) -> Iterator[bool]:
    """Let one process of this machine at a time move files; gives whether it is this one. A killed one holds nothing."""
    root.mkdir(parents=True, exist_ok=True)
    with (root / ".upkeep").open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def keep_up(root: Path, *, now: datetime) -> None:
    """Merge the hours that are over and delete those that are too old; does nothing while another process does.

    :param root: the log's folder.
    """
    settings = LogSettings.load(root)
    with exclusive(root) as mine:
        if not mine:
            return
        for left in root.rglob(".*.tmp"):  # of a process that was killed
            if now.timestamp() - left.stat().st_mtime > 3600.0:
                left.unlink(missing_ok=True)
        waiting = LocalFolder(root).find("") if settings.uri else []
        merge_hours(
            place_of(settings.uri) if settings.uri else LocalFolder(root),
            now=now,
            writer=Upkeep(root, settings).writer,
            # What was uploaded and is still here would come back beside what it was merged into.
            leave=frozenset(_folder(name) for name in waiting),
        )
        _remove_empty(root, now=now)
        if settings.retention_days is not None:
            delete_hours(
                place_of(settings.uri) if settings.uri else LocalFolder(root),
                before=now - timedelta(days=settings.retention_days),
            )


def merge_hours(
    place: Place, *, now: datetime, writer: str | None, leave: frozenset[str] = frozenset()
) -> int:
    """Make one file of many for every hour that is over, such that a reader sees each row once at any time.

    A merged file says which ones it stands for; from the moment it is there, readers leave these out. They are deleted later,
    when nobody reads them any more. Killed in between, the next call goes on.

    :param place: where the files are.
    :param writer: whose files; ``None``: everybody's, which must be asked for in one place at a time only.
    :param leave: folders that are not touched.
    :returns: how many files were made.
    """
    folders: dict[str, list[str]] = {}
    for name in _parquet(place.find("")):
        if writer in {None, written_by(name)} and _folder(name) not in leave:
            folders.setdefault(_folder(name), []).append(name)
    count = 0
    for folder, names in sorted(folders.items()):
        if len(names) > 1 and _hour(folder) + timedelta(hours=1) + _SETTLED <= now:
            count += _merge(place, folder, names, now, writer)
    return count


def _remove_empty(root: Path, *, now: datetime) -> None:
    """Remove the folders of hours that are over and whose files were uploaded: each flush looks into all that are there."""
    for folder in root.glob("*/hour=*"):
        with contextlib.suppress(OSError, ValueError):  # there is a file in it, or it is none of ours
            if _hour(folder.name) + timedelta(hours=1) + _SETTLED <= now:
                folder.rmdir()


def delete_hours(place: Place, *, before: datetime) -> list[str]:
    """Delete the hours that ended before an instant; gives their folders."""
    folders = sorted({_folder(name) for name in _parquet(place.find(""))})
    old = [folder for folder in folders if _hour(folder) + timedelta(hours=1) <= before]
    for folder in old:
        logger.info("%s is older than the log is kept, and deleted", folder)
        place.remove_folder(folder)
    return old


def _merge(place: Place, folder: str, names: Sequence[str], now: datetime, writer: str | None) -> int:
    gone: dict[str, datetime] = {}
    with tempfile.TemporaryDirectory() as scratch:
        fetched = _Fetched(place, Path(scratch))
        for name in filter(is_merged, names):
            replaced, since = replaced_by(fetched[name])
            gone |= {f"{folder}/{item}": since for item in replaced}
        counting = [name for name in names if name not in gone]
        count = 0
        if not all(is_merged(name) for name in counting):
            for group in by_schema(fetched[name] for name in counting):
                if len(group) > 1:
                    _merge_group(place, folder, group, now, writer)
                    count += 1
    # Parts before what they were merged into: as long as one is there, what says that it does not count is there, too.
    for name in sorted(gone, key=is_merged):
        if now - gone[name] >= GRACE:
            place.remove(name)
    return count


def _merge_group(place: Place, folder: str, group: Sequence[Path], now: datetime, writer: str | None) -> None:
    import polars as pl

    names = [path.name for path in group]
    spans = [time_span(name) for name in names]
    metadata = {REPLACES: json.dumps(names), MERGED_AT: now.isoformat()}
    made = file_name(
        MERGED, min(first for first, _ in spans), max(last for _, last in spans), writer or EVERYBODY
    )
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / made
        pl.scan_parquet(list(group), hive_partitioning=False).sink_parquet(path, metadata=metadata)
        place.put(f"{folder}/{made}", path)
    logger.info("%d files of %s are one now", len(names), folder)


class _Fetched:
    """Files of a place as paths; those from elsewhere are copied when they are asked for."""

    def __init__(self, place: Place, scratch: Path) -> None:
        self.place = place
        self.scratch = scratch

    def __getitem__(self, name: str) -> Path:
        if isinstance(self.place, LocalFolder):
            return self.place.path / name
        path = self.scratch / name.rpartition("/")[2]
        if not path.exists():
            path.write_bytes(self.place.read(name))
        return path


def _parquet(names: Iterable[str]) -> list[str]:
    return [
        name
        for name in names
        if name.endswith(".parquet") and name.rpartition("/")[2].startswith((f"{PART}-", f"{MERGED}-"))
    ]


def _folder(name: str) -> str:
    return name.rpartition("/")[0]


def _hour(folder: str) -> datetime:
    return datetime.strptime(folder.rpartition("hour=")[2], "%Y-%m-%dT%H").replace(tzinfo=UTC)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # another worker has uploaded it
        return 0


def main(arguments: Sequence[str] | None = None) -> None:
    """Merge and delete once, out of the service's way."""
    (folder,) = sys.argv[1:] if arguments is None else arguments
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    os.nice(10)
    keep_up(Path(folder), now=datetime.now(UTC))


if __name__ == "__main__":
    main()
