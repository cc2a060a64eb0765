"""Both sides of a drift check: the reference and the window, as profiles, and as rows where rows are needed."""

from __future__ import annotations

import logging
from datetime import UTC, tzinfo
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from airflow_mlops.core.data.categories import category_texts
from airflow_mlops.core.data.dataset import count_rows
from airflow_mlops.core.monitoring.detectors import ColumnRows
from airflow_mlops.core.monitoring.drift import absent_columns
from airflow_mlops.core.monitoring.drift_windows import last_year, next_year, window_after, windows_before
from airflow_mlops.core.profiles.counting import as_numbers, in_precision, sort_finite
from airflow_mlops.core.profiles.profile import (
    ColumnKinds,
    Profile,
    join_profiles,
    merge_profiles,
    profile_frame,
    profile_scan,
)
from airflow_mlops.core.profiles.profile_format import PREDICTION
from airflow_mlops.exceptions import DatasetNotFoundError, InsufficientDataError
from airflow_mlops.integrations import delta
from airflow_mlops.integrations.domain_classifier import CLASSIFIER_ROWS, DomainVerdict, tell_apart
from airflow_mlops.serving.partition_profiles import logged_as, logged_schemas, profile_window, scan_window
from airflow_mlops.steps.monitoring.labels import as_trained, labelled_predictions

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import polars as pl

    from airflow_mlops.core.model.package import PackageManifest
    from airflow_mlops.core.monitoring.column_drift import ReadRows
    from airflow_mlops.core.monitoring.drift_policy import DriftPolicy
    from airflow_mlops.core.profiles.profile_layout import Layout
    from airflow_mlops.core.windows import Window
    from airflow_mlops.steps.common import DatasetRef

ReferenceKind = Literal["fixed", "trailing", "last_year"]

_LOG = logging.getLogger(__name__)

#: Column of the log per column of the layout; inputs have a prefix of their own there.
_SOURCES = {PREDICTION: "prediction", "(id)": "prediction_id"}


class Reference(NamedTuple):
    """What a window is compared with.

    :param windows: whose predictions it is; none: it is the training rows.
    :param told: the same in words.
    :param open_rows: opens columns of its rows.
    """

    profile: Profile
    windows: tuple[Window, ...]
    told: str
    open_rows: Callable[[Sequence[str]], pl.LazyFrame]


class DriftSides:
    """What a window is compared with, and the window.

    :param log: root of the inference log.
    :param model_name: model whose log it is.
    :param manifest: of the champion.
    :param trained: its reference profile.
    :param pairs: numeric inputs to look at together.
    :param columns: inputs to compare; none: all of them.
    :param zone: whose calendar the windows follow.
    :raises ValueError: a pair is not of two different numeric inputs, or is given twice.
    """

    def __init__(
        self,
        *,
        log: Path,
        model_name: str,
        manifest: PackageManifest,
        trained: Profile,
        pairs: Sequence[tuple[str, str]] = (),
        columns: Sequence[str] = (),
        zone: tzinfo = UTC,
    ) -> None:
        self.log = log
        self.zone = zone
        self.model_name = model_name
        self.manifest = manifest
        self.pairs = pairs
        self.compared = list(dict.fromkeys(columns)) or self.inputs
        _require_pairs(pairs, manifest)
        self.trained = join_profiles([trained, self._profile_pairs()]) if pairs else trained
        self._profiles: dict[Window, Profile] = {}
        self._schemas: dict[Window, list[pl.Schema]] = {}

    @property
    def inputs(self) -> list[str]:
        """What the model takes."""
        return list(self.manifest.signature.names)

    @property
    def pair_names(self) -> list[str]:
        """Names of the pairs' profiles."""
        return ["*".join(pair) for pair in self.pairs]

    @cached_property
    def layout(self) -> Layout:
        """Cells of what the log holds."""
        answers = [PREDICTION] if PREDICTION in self.trained.names else []
        return self.trained.layout.select([*self.inputs, *answers, *self.pair_names])

    def profile(self, window: Window) -> Profile:
        """Profile the predictions of a window.

        :raises InsufficientDataError: nothing was predicted in it.
        """
        if window not in self._profiles:
            self._profiles[window] = profile_window(
                self.log, self.model_name, window, self.layout, sources=_SOURCES
            )
        return self._profiles[window]

    def windows_before(self, window: Window, count: int) -> list[Window]:
        """Give the windows before one, newest first."""
        return windows_before(window, count, self.zone)

    def reference(
        self, window: Window, kind: ReferenceKind, count: int, *, minimum_rows: int = 1
    ) -> Reference:
        """Give what to compare a window with.

        Where the log does not go back that far, or holds too little there, it is the training rows; the words say so.
        """
        if kind == "fixed":
            return Reference(self.trained, (), "training rows", self.open_training)
        windows = (
            windows_before(window, count, self.zone) if kind == "trailing" else [last_year(window, self.zone)]
        )
        found = []
        for item in windows:
            try:
                found.append((item, self.profile(item)))
            except InsufficientDataError:
                _LOG.info("no predictions of %s in %s to compare with", self.model_name, item)
        rows = sum(profile.row_count for _, profile in found)
        if rows < minimum_rows:
            told = f"training rows, as there are {rows or 'no'} predictions in {_listed(windows)}"
            return Reference(self.trained, (), told, self.open_training)
        chosen = tuple(item for item, _ in found)
        return Reference(
            merge_profiles(profile for _, profile in found),
            chosen,
            f"predictions in {_listed(chosen)}",
            lambda names: self._open_windows(chosen, names),
        )

    def absent(self, window: Window, reference: Reference, kind: ReferenceKind) -> dict[str, str]:
        """Say of the columns that one side does not have why, and from when on they will be measured."""
        current = self.profile(window)
        names = [*self.compared, *self.pair_names]
        reasons = {}
        for name in absent_columns(reference.profile.select(names), current.select(names)):
            if not current.column(name).row_count:
                reasons[name] = (
                    f"{self._not_logged(name, [window])}; measured from the first window on in which it is logged as the champion takes it"
                )
                continue
            first = next_year(window, self.zone) if kind == "last_year" else window_after(window, self.zone)
            reasons[name] = (
                f"{self._not_logged(name, reference.windows)}; measured from the window {first} on, for which this one is a "
                "reference"
            )
        return reasons

    def not_logged(self, window: Window) -> tuple[str, ...]:
        """Name the inputs that no row of a window's log has, with why."""
        profile = self.profile(window)
        return tuple(
            f"{name}: {self._not_logged(name, [window])}"
            for name in self.inputs
            if not profile.column(name).row_count
        )

    def _not_logged(self, name: str, windows: Sequence[Window]) -> str:
        """Say that the versions that answered did not take an input, or took it as another kind."""
        where = f"in the log of {_listed(windows)}"
        layout = self.trained.layout.by_name[name]
        kinds = {logged_as(self._logged(item), layout, sources=_SOURCES) for item in windows}
        if "other" in kinds:
            theirs, ours = ("text", "a number") if layout.kind in ("number", "pair") else ("a number", "text")
            return f"{theirs} {where}, where the champion takes {ours}"
        if "same" in kinds:
            return f"no answer that callers saw has it {where}"
        return f"not {where}: the versions that answered there did not take it, or it is kept out of the log"

    def _logged(self, window: Window) -> list[pl.Schema]:
        """Give what a window's files have; asked once for all columns, as the files may be far away."""
        if window not in self._schemas:
            self._schemas[window] = logged_schemas(self.log, self.model_name, window)
        return self._schemas[window]

    def reader(self, window: Window, open_reference: Callable[[Sequence[str]], pl.LazyFrame]) -> ReadRows:
        """Give what reads one column's values on both sides."""

        def read(name: str) -> ColumnRows:
            try:
                reference = open_reference([name]).collect()
            except FileNotFoundError as err:  # vacuumed since; its profile is with the model
                raise DatasetNotFoundError(
                    f"the rows of {name!r} that {window} is compared with can't be read any more: {err}"
                ) from err
            current = self.open_window(window, [name]).collect()
            return ColumnRows(self._values(reference[name]), self._values(current[name]))

        return read

    def open_training(self, names: Sequence[str]) -> pl.LazyFrame:
        """Open columns of the rows the champion was trained on."""
        trained = self.manifest.trained_on
        return delta.read_table(
            trained.dataset_uri,
            version=trained.dataset_version,
            columns=names,
            window=trained.window,
            time_column=trained.time_column,
        )

    def open_window(self, window: Window, names: Sequence[str]) -> pl.LazyFrame:
        """Open columns of the predictions of a window."""
        return scan_window(
            self.log, self.model_name, window, names, sources=_SOURCES, layout=self.trained.layout
        )

    def target_profile(self, window: Window, *, labels: DatasetRef, id_column: str) -> Profile:
        """Profile the labels of a window's predictions that have arrived.

        :raises InsufficientDataError: none has.
        """
        target = self.manifest.target
        joined = labelled_predictions(
            self.log, self.model_name, window, labels=labels, id_column=id_column, target=target
        ).drop_nulls([target])
        if joined.height == 0:
            raise InsufficientDataError(f"no label of {self.model_name} in {window} has arrived")
        joined = joined.with_columns(as_trained(joined[target], self.manifest.classes))
        kind = "categorical" if self.manifest.task == "classification" else "numeric"
        return profile_frame(joined, **{kind: [target]}, like=self.trained)  # type: ignore[arg-type]

    def tell_apart(self, window: Window, policy: DriftPolicy) -> DomainVerdict:
        """Train a classifier to tell requests from training rows by the compared inputs."""
        profile = self.profile(window)
        # Rows of a version that did not take an input are told apart by that alone.
        names = [name for name in self.compared if profile.column(name).row_count == profile.row_count]
        if not names:
            raise InsufficientDataError(f"no input is in all rows of the log of {window}")
        sides = (self.open_training(names), self.open_window(window, names))
        reference, current = (self._typed(sample_rows(rows, CLASSIFIER_ROWS)) for rows in sides)
        return tell_apart(reference, current, significance=policy.significance)

    def _profile_pairs(self) -> Profile:
        names = list(dict.fromkeys(name for pair in self.pairs for name in pair))
        return profile_scan(lambda: self.open_training(names), ColumnKinds(pairs=self.pairs))

    def _open_windows(self, windows: Sequence[Window], names: Sequence[str]) -> pl.LazyFrame:
        import polars as pl

        return pl.concat([self.open_window(item, names) for item in windows], how="vertical_relaxed")

    def _typed(self, rows: pl.DataFrame) -> pl.DataFrame:
        """Give the inputs as the model takes them: the log holds text where a table has numbers."""
        import polars as pl

        kinds = {item.name: item.type for item in self.manifest.signature.inputs}
        layouts = self.trained.layout.by_name
        return rows.select(
            pl.Series(column.name, in_precision(column.cast(pl.Float64).to_numpy(), layouts[column.name]))
            if kinds[column.name] == "number"
            else category_texts(column)
            for column in rows
        )

    def _values(self, column: pl.Series) -> Any:
        """Give values as the profiles count them: text by its length."""
        layout = self.trained.layout.by_name[column.name]
        if layout.is_histogram:
            return sort_finite(in_precision(as_numbers(column, layout.kind), layout))[0]
        return np.array(category_texts(column).drop_nulls().to_list(), dtype=str)


def _require_pairs(pairs: Sequence[tuple[str, str]], manifest: PackageManifest) -> None:
    """Refuse what has no common distribution: no number, nothing that is asked for, one input twice."""
    numbers = [item.name for item in manifest.signature.inputs if item.type == "number"]
    for place, pair in enumerate(pairs):
        strange = next((name for name in pair if name not in numbers), None)
        if strange is not None:
            raise ValueError(
                f"pair {' and '.join(pair)}: {strange!r} is no numeric input; there are {', '.join(numbers) or 'none'}"
            )
        if pair[0] == pair[1] or {*pair} in [{*other} for other in pairs[:place]]:
            raise ValueError(f"pair {' and '.join(pair)}: give two different inputs, and each pair once")
        if "*".join(pair) in manifest.signature.names:
            raise ValueError(
                f"pair {' and '.join(pair)} has the name of an input, {'*'.join(pair)!r}: leave it out"
            )


def _listed(windows: Sequence[Window]) -> str:
    return " and ".join(str(item) for item in windows)


def sample_rows(rows: pl.LazyFrame, count: int) -> pl.DataFrame:
    """Take at most so many rows, evenly over the table: every n-th, so that the same rows come each time."""
    total = count_rows(rows)
    return rows.gather_every(max(1, -(-total // count))).collect()
