"""A stream of the past: one file of rows in time order, cut into windows."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airflow_mlops.core.codec import from_dict, unknown_fields
from airflow_mlops.core.windows import Window

if TYPE_CHECKING:
    import polars as pl

#: Name of a row within the stream, under which its prediction and its label meet.
ID_COLUMN = "replay_id"


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamConfig:
    """What a stream is and which model it is for.

    :param name: of the model.
    :param data: Parquet or CSV file, relative to the configuration's folder.
    :param time_column: orders the rows and places them in windows; naive times are UTC.
    :param target: column to predict.
    :param numeric: inputs that are numbers.
    :param categorical: inputs that are one of some values.
    :param metric: name of a metric with a loss per row, such as ``mae`` or ``accuracy``.
    :param window: ``month``, or so many days such as ``28d``, counted from the first row.
    :param reference: number of windows that the first model is trained on.
    :param estimator: import path.
    :param estimator_params: its arguments.
    :param windows: replay at most so many windows; ``None``: all there are.
    """

    name: str
    data: str
    time_column: str
    target: str
    numeric: tuple[str, ...] = ()
    categorical: tuple[str, ...] = ()
    metric: str = "mae"
    window: str = "month"
    reference: int = 3
    estimator: str = "sklearn.ensemble.HistGradientBoostingRegressor"
    estimator_params: dict[str, Any] = field(default_factory=dict)
    windows: int | None = None

    def __post_init__(self) -> None:
        for name in ("reference", "windows"):
            count = getattr(self, name)
            if count is not None and count < 1:
                raise ValueError(f"{name} is {count}: at least one window is needed")
        inputs = [*self.numeric, *self.categorical]
        for name, what in (
            (self.target, "target"),
            (self.time_column, "time_column"),
            (ID_COLUMN, "number of a row"),
        ):
            if name in inputs:
                raise ValueError(
                    f"{name!r} is the {what} and can't be an input: leave it out of numeric and categorical, or rename it"
                )
        again = [name for place, name in enumerate(inputs) if name in inputs[:place]]
        if again:
            raise ValueError(f"{again[0]!r} is named as an input twice")

    @classmethod
    def read(cls, path: Path) -> StreamConfig:
        """Read a TOML file.

        :raises ValueError: naming the file, and the field that is wrong or not known.
        """
        try:
            values = tomllib.loads(path.read_text())
            unknown = unknown_fields(cls, values)
            if unknown:
                raise ValueError(f"unknown: {', '.join(unknown)}; known: {', '.join(cls.__slots__)}")
            config = from_dict(cls, values)
        except (OSError, ValueError) as err:
            raise ValueError(f"{path} describes no stream: {err}") from err
        return config


@dataclass(frozen=True, slots=True)
class Stream:
    """The rows, and the windows they fall into.

    :param config: what it is.
    :param rows: in time order, with :data:`ID_COLUMN`.
    :param windows: those with rows, oldest first.
    """

    config: StreamConfig
    rows: Any
    windows: tuple[Window, ...]

    @classmethod
    def load(cls, config: StreamConfig, folder: Path, *, shuffle: int | None = None) -> Stream:
        """Read the file.

        :param folder: what ``data`` is relative to.
        :param shuffle: seed; deals the rows out to the times at random, so that nothing ever changes. A policy should then
            leave the first model alone.
        :raises ValueError: no such file or column, times that are none, or too few windows.
        """
        import polars as pl

        path = folder / config.data
        if not path.is_file():
            raise ValueError(f"the stream {config.name!r} has its data in {path}, and there is no such file")
        rows = pl.read_csv(path, try_parse_dates=True) if path.suffix == ".csv" else pl.read_parquet(path)
        wanted = [config.time_column, config.target, *config.numeric, *config.categorical]
        missing = [name for name in wanted if name not in rows.columns]
        if missing:
            raise ValueError(f"{path} has no column {', '.join(missing)}; it has {', '.join(rows.columns)}")
        _require_kinds(rows, config, path)
        rows = rows.select([*dict.fromkeys(wanted)]).drop_nulls([config.time_column, config.target])
        rows = rows.with_columns(
            _instants(rows[config.time_column], path).alias(config.time_column),
            pl.col(config.categorical).cast(pl.String),
        ).sort(config.time_column, maintain_order=True)
        if shuffle is not None:
            dealt = rows.drop(config.time_column).sample(fraction=1.0, shuffle=True, seed=shuffle)
            rows = dealt.with_columns(rows[config.time_column])
        rows = rows.with_row_index(ID_COLUMN).with_columns(pl.col(ID_COLUMN).cast(pl.Int64))
        windows = _windows(rows[config.time_column], config.window)
        if len(windows) <= config.reference:
            raise ValueError(
                f"{path} has {len(windows)} windows of {config.window}; the first {config.reference} are the reference, so at "
                "least one more is needed"
            )
        last = None if config.windows is None else config.reference + config.windows
        return cls(config, rows, tuple(windows[:last]))

    @property
    def reference(self) -> Window:
        """What the first model is trained on."""
        return Window(start=self.windows[0].start, end=self.windows[self.config.reference - 1].end)

    @property
    def later(self) -> tuple[Window, ...]:
        """What is lived through."""
        return self.windows[self.config.reference :]

    def inside(self, window: Window) -> pl.DataFrame:
        """Give the rows of a window."""
        import polars as pl

        inside = pl.col(self.config.time_column).is_between(window.start, window.end, closed="left")
        rows: pl.DataFrame = self.rows.filter(inside)
        return rows


def _require_kinds(rows: pl.DataFrame, config: StreamConfig, path: Path) -> None:
    """Refuse inputs that are neither numbers nor categories."""
    import polars as pl

    for name in (*config.numeric, *config.categorical):
        dtype = rows.schema[name]
        if dtype.is_nested() or dtype in (pl.Binary, pl.Object):
            raise ValueError(
                f"the input {name!r} of {path} is of type {dtype}: give one value a row, or leave it out"
            )
        if name in config.numeric and not (dtype.is_numeric() or dtype == pl.Boolean):
            raise ValueError(
                f"the numeric input {name!r} of {path} is of type {dtype}: name it under categorical, or convert it"
            )


def _instants(times: pl.Series, path: Path) -> pl.Series:
    """Give times as instants in UTC; text is read where it is ISO 8601.

    :raises ValueError: they are numbers, of which nobody can tell the unit, or text of another form.
    """
    import polars as pl

    instant = pl.Datetime("us", "UTC")
    if isinstance(times.dtype, pl.Datetime) and times.dtype.time_zone is not None:
        return times.cast(instant)  # the same instant, on another clock
    if times.dtype.is_temporal() and times.dtype not in (pl.Time, pl.Duration):
        return times.cast(pl.Datetime("us")).dt.replace_time_zone("UTC")
    if times.dtype != pl.String:
        raise ValueError(
            f"the time column {times.name!r} of {path} is of type {times.dtype}: nobody can tell what its numbers count. Convert it, such as "
            f'with polars.from_epoch("{times.name}", time_unit="s"), and write the file again'
        )
    try:
        return pl.Series(times.name, [_instant(text) for text in times], dtype=instant)
    except ValueError as err:
        raise ValueError(
            f"the time column {times.name!r} of {path} is text that is no ISO 8601 time: {err}. Write times as 2024-03-01T12:00:00, or as "
            "timestamps in a Parquet file"
        ) from err


def _instant(text: str) -> datetime:
    found = datetime.fromisoformat(text)
    return found.replace(tzinfo=UTC) if found.tzinfo is None else found.astimezone(UTC)


def _windows(times: pl.Series, kind: str) -> list[Window]:
    first, last = times.min(), times.max()
    if not isinstance(first, datetime) or not isinstance(last, datetime):
        raise ValueError("the stream has no rows")
    if kind == "month":
        start, step = first.replace(day=1, hour=0, minute=0, second=0, microsecond=0), None
    elif kind.endswith("d") and kind[:-1].isdigit() and int(kind[:-1]) > 0:
        start, step = first, timedelta(days=int(kind[:-1]))
    else:
        raise ValueError(f"window is {kind!r}; give 'month', or days such as '28d'")
    windows = []
    while start <= last:
        end = start + step if step else (start + timedelta(days=32)).replace(day=1)
        if times.is_between(start, end, closed="left").any():
            windows.append(Window(start=start, end=end))
        start = end
    return windows
