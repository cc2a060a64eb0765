"""Profiles of the inference log: one per partition, kept beside it, so that a window is a merge and no row is read twice."""

from __future__ import annotations

import contextlib
import hashlib
import logging
from typing import TYPE_CHECKING, Literal, NamedTuple

from airflow_mlops.core.data.dataset import count_rows
from airflow_mlops.core.profiles.profile import Profile, merge_profiles, profile_scan_like, widen_profile
from airflow_mlops.core.profiles.profile_format import profile_from_bytes, profile_to_bytes
from airflow_mlops.exceptions import InsufficientDataError
from airflow_mlops.serving.log_files import (
    LogFiles,
    by_schema,
    may_hold,
    reading_again,
    scan,
    stamp,
    time_span,
)
from airflow_mlops.serving.log_rows import FEATURE_PREFIX

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    import polars as pl

    from airflow_mlops.core.profiles.profile_layout import ColumnLayout, Kind, Layout
    from airflow_mlops.core.windows import Window

logger = logging.getLogger(__name__)


class _Partition(NamedTuple):
    """Files of one folder that can hold rows of a window."""

    folder: str
    names: list[str]
    whole: bool


def profile_window(
    root: Path | str, model_name: str, window: Window, layout: Layout, *, sources: Mapping[str, str]
) -> Profile:
    """Profile the predictions whose event time is inside a window.

    A partition that lies in the window as a whole is profiled once: the profile is kept beside it, under the name of its
    cells, and is used as long as the partition has the same files. Of one that the window cuts through the rows are read.

    A row of a version that did not take an input, or took it as another kind, has no value of it and no null either: it
    counts in the profile's rows and not in the column's.

    :param root: the log's folder, or the URI its files are uploaded to.
    :param layout: cells, of the reference.
    :param sources: column of the log per column of the layout; others are inputs.
    :raises InsufficientDataError: nothing was predicted; names model, window and folder.
    """
    files = LogFiles(root)

    def made() -> tuple[Profile, int]:
        partitions, count = _partitions(files, model_name, window)
        profiles = (_partition_profile(files, item, window, layout, sources) for item in partitions)
        return merge_profiles(profiles, layout=layout), count

    profile, count = reading_again(made)
    if profile.row_count == 0:
        raise InsufficientDataError(
            f"nothing was predicted by {model_name} in {window}: {root}/{model_name} holds {count} files, none with a row in "
            "the window; has the service been asked, with these times?"
        )
    return profile


def scan_window(
    root: Path | str,
    model_name: str,
    window: Window,
    names: Sequence[str],
    *,
    sources: Mapping[str, str],
    layout: Layout | None = None,
) -> pl.LazyFrame:
    """Open columns of the predictions whose event time is inside a window; nothing is read yet.

    :param layout: cells of columns; one that is logged as another kind is null there.
    :raises InsufficientDataError: no file can hold any.
    """
    files = LogFiles(root)

    def opened() -> tuple[list[list[Path | bytes]], int]:
        partitions, count = _partitions(files, model_name, window)
        return by_schema(files.source(name) for item in partitions for name in item.names), count

    groups, count = reading_again(opened)
    if not groups:
        raise InsufficientDataError(
            f"nothing was predicted by {model_name} in {window}: none of the {count} files in {root}/{model_name} is of that time"
        )
    return _scan(groups, names, sources, window, _kinds(layout))


def logged_schemas(root: Path | str, model_name: str, window: Window) -> list[pl.Schema]:
    """Give the different columns and types of the files that can hold rows of a window, also of rows answered in the shadow."""
    files = LogFiles(root)

    def found() -> list[pl.Schema]:
        partitions, _ = _partitions(files, model_name, window)
        groups = by_schema(files.source(name) for item in partitions for name in item.names)
        return [scan(group).collect_schema() for group in groups]

    return reading_again(found)


def logged_as(
    schemas: Iterable[pl.Schema], column: ColumnLayout, *, sources: Mapping[str, str]
) -> Literal["same", "other"] | None:
    """Tell whether files have a column, and as the kind it is counted as; ``None``: no file has it.

    :param sources: as :func:`profile_window` takes them.
    """
    names = [sources.get(name, FEATURE_PREFIX + name) for name in _read_for(column)]
    found = [schema for schema in schemas if all(name in schema for name in names)]
    if not found:
        return None
    others = (not _holds(schema, name, column.kind) for schema in found for name in names)
    return "other" if any(others) else "same"


def _partitions(files: LogFiles, model_name: str, window: Window) -> tuple[list[_Partition], int]:
    """List the partitions that can matter, oldest first, and count all files."""
    partitions, count = [], 0
    for folder, names in files.hours(model_name).items():
        count += len(names)
        matching = files.counting(name for name in names if may_hold(name, window))
        if matching:
            whole = all(_inside(name, window) for name in names)
            partitions.append(_Partition(folder, matching, whole))
    return partitions, count


def _inside(name: str, window: Window) -> bool:
    first, last = time_span(name)
    return stamp(window.start) <= first and last < stamp(window.end)


def _partition_profile(
    files: LogFiles, partition: _Partition, window: Window, layout: Layout, sources: Mapping[str, str]
) -> Profile:
    def read(limit: Window | None) -> Profile:
        groups = by_schema(files.source(name) for name in partition.names)
        return merge_profiles(
            (_group_profile(group, limit, layout, sources) for group in groups), layout=layout
        )

    if not partition.whole:
        return read(window)
    names = [_COUNTING, *(name.rpartition("/")[2] for name in partition.names)]
    key = hashlib.sha256("\n".join(names).encode()).hexdigest()
    # Beside the partition, but not as one of its files; other cells have another profile.
    path = f"{partition.folder}/.profile-{layout.digest[:16]}"
    with contextlib.suppress(OSError):
        kept = profile_from_bytes(files.read(path), layout, key=key)
        if kept is not None:
            return kept
    made = read(None)
    try:
        files.write(path, profile_to_bytes(made, key=key))
    except OSError as err:  # a log that may only be read is profiled every time
        logger.info("the profile %s can't be kept: %s", path, err)
    return made


#: What a kept profile counts: rows of a version that lacks a column are no nulls of it. Others are made again.
_COUNTING = "2"


def _group_profile(
    group: Sequence[Path | bytes], limit: Window | None, layout: Layout, sources: Mapping[str, str]
) -> Profile:
    """Profile files of the same columns: those they have, as what the layout counts them."""
    logged = scan(group).collect_schema()
    here = [
        item.name
        for item in layout.columns
        if all(
            _holds(logged, sources.get(name, FEATURE_PREFIX + name), item.kind) for name in _read_for(item)
        )
    ]
    profile = profile_scan_like(lambda names: _scan([group], names, sources, limit), layout.select(here))
    rows = profile.row_count if here else count_rows(_scan([group], ["time"], {"time": "time"}, limit))
    return widen_profile(profile, layout, row_count=rows)


def _read_for(column: ColumnLayout) -> Sequence[str]:
    return column.parts or (column.name,)


def _kinds(layout: Layout | None) -> dict[str, Kind]:
    return {item.name: item.kind for item in layout.columns} if layout else {}


def _holds(logged: pl.Schema, source: str, kind: Kind | None) -> bool:
    """Tell whether a log has a column, and as that kind: inputs are logged as numbers or as text."""
    import polars as pl

    dtype = logged.get(source)
    if dtype is None or kind is None:
        return dtype is not None
    if kind in ("number", "pair"):
        return dtype.is_numeric() or dtype in (pl.Boolean, pl.Null)
    return not (dtype.is_numeric() and source.startswith(FEATURE_PREFIX))


def _scan(
    groups: Sequence[Sequence[Path | bytes]],
    names: Iterable[str],
    sources: Mapping[str, str],
    window: Window | None,
    kinds: Mapping[str, Kind] | None = None,
) -> pl.LazyFrame:
    """Open columns under their own names; one that a group of files lacks, or has as another kind, is null there."""
    import polars as pl

    frames = []
    wanted = {name: sources.get(name, FEATURE_PREFIX + name) for name in names}
    for group in groups:
        frame = scan(group)
        if window is not None:
            frame = frame.filter(pl.col("time").is_between(window.start, window.end, closed="left"))
        there = frame.collect_schema()
        missing = [
            pl.lit(None).alias(source)
            for name, source in wanted.items()
            if not _holds(there, source, (kinds or {}).get(name))
        ]
        frame = frame.with_columns(missing)
        frames.append(frame.select(pl.col(source).alias(name) for name, source in wanted.items()))
    return frames[0] if len(frames) == 1 else pl.concat(frames, how="vertical_relaxed")
