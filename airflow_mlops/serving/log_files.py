"""Files of the inference log, wherever they are: names, places, and which of them count."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections import Counter, defaultdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast
from urllib.parse import unquote, urlsplit

from airflow_mlops.integrations.object_store import ObjectStore
from airflow_mlops.serving.log_settings import LogSettings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    import polars as pl

    from airflow_mlops.core.windows import Window

T = TypeVar("T")
Source = TypeVar("Source", Path, bytes, "Path | bytes")

#: What one flush wrote, and what was made of several of them.
PART, MERGED = "part", "merged"
#: Who wrote a merged file that stands for files of several writers.
EVERYBODY = "all"
#: Keys of a merged file's metadata: the files it stands for, and since when.
REPLACES, MERGED_AT = "airflow_mlops.replaces", "airflow_mlops.merged_at"


class Place(Protocol):
    """A folder of whole files, here or elsewhere."""

    def find(self, prefix: str) -> list[str]:
        """List the files under a prefix; hidden ones are left out."""

    def read(self, name: str) -> bytes:
        """Give a file's content, or raise :class:`FileNotFoundError`."""

    def write(self, name: str, data: bytes) -> None:
        """Write a file that is seen as a whole or not at all."""

    def put(self, name: str, source: Path) -> None:
        """Copy a local file there."""

    def remove(self, name: str) -> None:
        """Delete a file, if it is there."""

    def remove_folder(self, name: str) -> None:
        """Delete a folder with all that is in it."""


class LocalFolder:
    """A folder of this machine, as :class:`Place`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    def find(self, prefix: str) -> list[str]:
        found = []
        for folder, _, names in os.walk(self.path / prefix):
            below = Path(folder).relative_to(self.path).as_posix()
            found += [f"{below}/{name}" for name in names if not name.startswith(".")]
        return sorted(found)

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def write(self, name: str, data: bytes) -> None:
        with self.staged(name) as temporary:
            temporary.write_bytes(data)

    def put(self, name: str, source: Path) -> None:
        with self.staged(name) as temporary:
            shutil.copyfile(source, temporary)

    def remove(self, name: str) -> None:
        (self.path / name).unlink(missing_ok=True)

    def remove_folder(self, name: str) -> None:
        shutil.rmtree(self.path / name, ignore_errors=True)

    def staged(self, name: str) -> _Staged:
        """Give a hidden path that takes its name when all went well."""
        return _Staged(self.path / name)


class _Staged:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")

    def __enter__(self) -> Path:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return self.temporary

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                os.replace(self.temporary, self.path)
        finally:
            self.temporary.unlink(missing_ok=True)


class LogFiles:
    """The files of a log: those of its folder, and with :attr:`LogSettings.uri` those that were uploaded.

    :param root: the log's folder, or a URI of uploaded files.
    """

    def __init__(self, root: Path | str) -> None:
        local = local_path(root)
        self.places: list[Place] = []
        if local is None:
            self.places.append(ObjectStore(str(root)))
        else:
            self.places.append(LocalFolder(local))
            uri = LogSettings.load(local).uri
            if uri is not None:
                self.places.append(place_of(uri))

    def __str__(self) -> str:
        return " and ".join(str(place) for place in self.places)

    def hours(self, model_name: str) -> dict[str, list[str]]:
        """List the files by folder, oldest first; which of them count says :meth:`counting`."""
        found: dict[str, set[str]] = defaultdict(set)
        # What is being uploaded goes from the first place to the second: in this order it is seen at least once.
        for place in self.places:
            for name in place.find(model_name):
                folder, _, last = name.rpartition("/")
                if last.startswith((f"{PART}-", f"{MERGED}-")) and last.endswith(".parquet"):
                    found[folder].add(name)
        return {folder: sorted(names) for folder, names in sorted(found.items())}

    def counting(self, names: Iterable[str]) -> list[str]:
        """Leave out what was merged into another one of these files: a row counts in a merged file, or in what it was made of.

        What a merged file stands for is written in it, and that means to fetch it: only where it may stand for one of the others.

        :param names: of one folder; all of it, or those that may hold rows of a window.
        """
        here = sorted(names)
        of_writer = Counter(written_by(name) for name in here)
        gone = {
            item
            for name in here
            if is_merged(name)
            and len(here) > 1
            and (of_writer[written_by(name)] > 1 or written_by(name) == EVERYBODY)
            for item in replaced_by(self.source(name))[0]
        }
        return [name for name in here if name.rpartition("/")[2] not in gone]

    def source(self, name: str) -> Path | bytes:
        """Give what polars reads a file from.

        :raises FileNotFoundError: it was merged or deleted meanwhile: list again.
        """
        if len(self.places) == 1 and isinstance(self.places[0], LocalFolder):
            return self.places[0].path / name
        return self.read(name)  # its content: it may be uploaded, and gone here, before it is looked at

    def read(self, name: str) -> bytes:
        """Give a file's content.

        :raises FileNotFoundError: it is not there.
        """
        for place in self.places:
            try:
                return place.read(name)
            except FileNotFoundError:
                continue
        raise FileNotFoundError(name)

    def write(self, name: str, data: bytes) -> None:
        """Write a file where the log is kept."""
        self.places[-1].write(name, data)


def local_path(root: Path | str) -> Path | None:
    """Give the local path a root means; ``None``: it is elsewhere."""
    if isinstance(root, Path) or "://" not in root:
        return Path(root)
    parts = urlsplit(root)
    return Path(unquote(parts.path)) if parts.scheme == "file" else None


def place_of(uri: str) -> Place:
    """Open where files are kept.

    :raises ConnectionConfigError: the URI's protocol is unknown or not installed.
    """
    local = local_path(uri)
    return LocalFolder(local) if local is not None else ObjectStore(uri)


def file_name(kind: str, first: Any, last: Any, writer: str) -> str:
    """Name a file by the times of its first and its last row: a reader opens only those that can matter."""
    first, last = (item if isinstance(item, str) else stamp(item) for item in (first, last))
    return f"{kind}-{first}-{last}-{writer}-{uuid.uuid4().hex}.parquet"


def is_merged(name: str) -> bool:
    """Tell whether a file stands for others."""
    return name.rpartition("/")[2].startswith(f"{MERGED}-")


def written_by(name: str) -> str:
    """Give the folder that wrote a file, by its name."""
    return name.rpartition("/")[2].split("-")[3]


def replaced_by(source: Path | bytes) -> tuple[list[str], datetime]:
    """Give the names of the files that a merged file stands for, and since when it does."""
    import polars as pl

    metadata = pl.read_parquet_metadata(source)
    return json.loads(metadata[REPLACES]), datetime.fromisoformat(metadata[MERGED_AT])


def by_schema(sources: Iterable[Source]) -> list[list[Source]]:
    """Group files of the same columns: the versions of a model may take different ones."""
    import polars as pl

    groups: dict[tuple[tuple[str, str], ...], list[Source]] = {}
    for source in sources:
        schema = tuple((name, str(dtype)) for name, dtype in pl.read_parquet_schema(source).items())
        groups.setdefault(schema, []).append(source)
    return list(groups.values())


def scan(sources: Sequence[Path | bytes], *, shadow: bool = False) -> pl.LazyFrame:
    """Open files of the same columns.

    :param shadow: whether to give what was answered in the shadow, too.
    """
    import polars as pl

    frame = pl.scan_parquet(cast("list[Path]", list(sources)), hive_partitioning=False)
    if not shadow and "shadow" in frame.collect_schema():
        frame = frame.filter(~pl.col("shadow"))
    return frame


def may_hold(name: str, window: Window) -> bool:
    """Tell by a file's name whether it can hold a row of the window."""
    first, last = time_span(name)
    return first < stamp(window.end) and last >= stamp(window.start)


def time_span(name: str) -> tuple[str, str]:
    """Give the stamps of the first and the last row in a file, by its name."""
    _, first, last, *_ = name.rpartition("/")[2].split("-")
    return first, last


def stamp(instant: Any) -> str:
    """Write an instant of UTC so that texts are in the order of time."""
    return f"{instant.year:04}{instant:%m%dT%H%M%S.%f}"


def reading_again(read: Callable[[], T]) -> T:
    """Read once more where a file was merged or deleted between the listing and the reading."""
    for _ in range(3):
        try:
            return read()
        except FileNotFoundError:
            continue
    return read()
