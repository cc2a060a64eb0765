"""Profiles of the inference log: one per partition, kept beside it, so that a window is a merge and no row is read twice."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import uuid
from typing import TYPE_CHECKING, NamedTuple

from airflow_mlops.core.profile import Profile, merge_profiles, profile_scan_like
from airflow_mlops.core.profile_format import profile_from_bytes, profile_to_bytes
from airflow_mlops.exceptions import InsufficientDataError
from airflow_mlops.serving.inference_log import FEATURE_PREFIX, may_hold, stamp, time_span

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    import polars as pl

    from airflow_mlops.core.profile_layout import Layout
    from airflow_mlops.core.windows import Window

logger = logging.getLogger(__name__)


class _Partition(NamedTuple):
    """Files of one folder that can hold rows of a window."""

    folder: Path
    files: list[Path]
    whole: bool


def profile_window(
    root: Path, model_name: str, window: Window, layout: Layout, *, sources: Mapping[str, str]
) -> Profile:
    """Profile the predictions whose event time is inside a window.

    A partition that lies in the window as a whole is profiled once: the profile is kept beside it, under the name of its
    cells, and is used as long as the partition has the same files. Of one that the window cuts through the rows are read.

    :param root: folder of the log.
    :param layout: cells, of the reference.
    :param sources: column of the log per column of the layout; others are inputs.
    :raises InsufficientDataError: nothing was predicted; names model, window and folder.
    """
    partitions, count = _partitions(root / model_name, window)
    profiles = (_partition_profile(item, window, layout, sources) for item in partitions)
    profile = merge_profiles(profiles, layout=layout)
    if profile.row_count == 0:
        raise InsufficientDataError(
            f"nothing was predicted by {model_name} in {window}: {root / model_name} holds {count} files, none with a row in "
            "the window; has the service been asked, with these times?"
        )
    return profile


def scan_window(
    root: Path, model_name: str, window: Window, names: Sequence[str], *, sources: Mapping[str, str]
) -> pl.LazyFrame:
    """Open columns of the predictions whose event time is inside a window; nothing is read yet.

    :raises InsufficientDataError: no file can hold any.
    """
    partitions, count = _partitions(root / model_name, window)
    files = [file for item in partitions for file in item.files]
    if not files:
        raise InsufficientDataError(
            f"nothing was predicted by {model_name} in {window}: none of the {count} files in {root / model_name} is of that time"
        )
    return _scan(_by_schema(files), names, sources, window)


def _partitions(folder: Path, window: Window) -> tuple[list[_Partition], int]:
    """List the partitions that can matter, oldest first, and count all files."""
    partitions, count = [], 0
    for partition in sorted(folder.glob("hour=*")):
        names = sorted(file.name for file in partition.glob("part-*.parquet"))
        count += len(names)
        matching = [name for name in names if may_hold(name, window)]
        if matching:
            whole = len(matching) == len(names) and all(_inside(name, window) for name in names)
            partitions.append(_Partition(partition, [partition / name for name in matching], whole))
    return partitions, count


def _inside(name: str, window: Window) -> bool:
    first, last = time_span(name)
    return stamp(window.start) <= first and last < stamp(window.end)


def _partition_profile(
    partition: _Partition, window: Window, layout: Layout, sources: Mapping[str, str]
) -> Profile:
    def read(limit: Window | None) -> Profile:
        groups = _by_schema(partition.files)
        return profile_scan_like(lambda names: _scan(groups, names, sources, limit), layout)

    if not partition.whole:
        return read(window)
    key = hashlib.sha256("\n".join(file.name for file in partition.files).encode()).hexdigest()
    # Beside the partition, but not as one of its files; other cells have another profile.
    path = partition.folder / f".profile-{layout.digest[:16]}"
    with contextlib.suppress(OSError):
        kept = profile_from_bytes(path.read_bytes(), layout, key=key)
        if kept is not None:
            return kept
    made = read(None)
    _keep(path, profile_to_bytes(made, key=key))
    return made


def _keep(path: Path, data: bytes) -> None:
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError as err:  # a log that may only be read is profiled every time
        logger.info("the profile %s can't be kept: %s", path, err)
        with contextlib.suppress(OSError):
            temporary.unlink()


def _scan(
    groups: Sequence[Sequence[Path]],
    names: Iterable[str],
    sources: Mapping[str, str],
    window: Window | None,
) -> pl.LazyFrame:
    """Open columns under their own names; one that a group of files lacks is null there."""
    import polars as pl

    frames = []
    wanted = {name: sources.get(name, FEATURE_PREFIX + name) for name in names}
    for group in groups:
        frame = pl.scan_parquet(list(group), hive_partitioning=False)
        if window is not None:
            frame = frame.filter(pl.col("time").is_between(window.start, window.end, closed="left"))
        there = frame.collect_schema()
        missing = [pl.lit(None).alias(source) for source in wanted.values() if source not in there]
        frame = frame.with_columns(missing)
        frames.append(frame.select(pl.col(source).alias(name) for name, source in wanted.items()))
    return frames[0] if len(frames) == 1 else pl.concat(frames, how="vertical_relaxed")


def _by_schema(files: Sequence[Path]) -> list[list[Path]]:
    """Group files of the same columns: the versions of a model may take different ones."""
    import polars as pl

    groups: dict[tuple[tuple[str, str], ...], list[Path]] = {}
    for file in files:
        schema = tuple((name, str(dtype)) for name, dtype in pl.read_parquet_schema(file).items())
        groups.setdefault(schema, []).append(file)
    return list(groups.values())
