"""Screen: whether a new partition's labels fit its features as those of trusted partitions do, before anything learns from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from airflow_mlops.core.checks.poisoning import (
    HeldBefore,
    LabelNoise,
    LabelShift,
    PoisoningPolicy,
    Relation,
    SuspiciousSlice,
    Verdict,
)
from airflow_mlops.core.codec import to_dict
from airflow_mlops.core.data.dataset import DatasetVersion, count_rows
from airflow_mlops.core.monitoring.drift_windows import windows_before
from airflow_mlops.core.windows import Window, find_time_zone
from airflow_mlops.exceptions import InsufficientDataError
from airflow_mlops.integrations import delta
from airflow_mlops.steps.base import Step
from airflow_mlops.steps.common import DatasetRef, resolve_dataset
from airflow_mlops.steps.validation.quarantine import SetAside, let_in_again
from airflow_mlops.steps.validation.screen_partitions import Screened, evenly, screen_partitions

if TYPE_CHECKING:
    from collections.abc import Iterator

    import polars as pl

    from airflow_mlops.services import Services

#: Screenings of a table that are read from the ledger: older ones concern no window that is trusted now.
_LOOKED_AT = 1000
_SHOWN_WIDTH = 60


@dataclass(frozen=True, kw_only=True, slots=True)
class ScreenSpec:
    """What to screen.

    :param dataset: dataset version, or table URI for its newest.
    :param window: the new partition; those before it, as long as it is, are the trusted ones.
    :param time_column: places a row in a window.
    :param time_zone: whose months and days the windows are.
    :param target: column of the label; rows without one are left out.
    :param features: columns the label is to be explained by; none: all but target, time and id.
    :param id_column: names the rows in the evidence.
    :param policy: when the partition is held.
    :param quarantine: URI of the table a held partition is moved to, and taken out of where the same rows are let in later;
        ``None`` leaves it.
    :param released_by: who lets the partition in whatever the screen says.
    :param private_columns: columns whose values no evidence shows.
    """

    dataset: DatasetRef
    window: Window
    time_column: str
    target: str
    features: tuple[str, ...] = ()
    id_column: str | None = None
    policy: PoisoningPolicy = field(default_factory=PoisoningPolicy)
    quarantine: str | None = None
    released_by: str | None = None
    private_columns: tuple[str, ...] = ()
    time_zone: str = "UTC"


@dataclass(frozen=True, kw_only=True, slots=True)
class ScreenResult:
    """The verdict, with its evidence.

    :param dataset: what goes on: the version that was screened, or the one without the partition.
    :param verdict: ``enters``, ``held`` or ``undecided``.
    :param row_count: rows of the partition with a label.
    :param trusted_windows: how many partitions it was compared with.
    :param held_windows: earlier ones between these that were held, and so are not trusted.
    :param noise: ``None`` where nothing could be compared.
    :param suspicious_rows: ids (or places in the partition's order of time) of the rows most at odds with their label; only where
        one of the tests says no.
    :param slices: where such rows are.
    :param quarantine: the table the partition was moved to; its digest is that of its list of files.
    """

    dataset: DatasetVersion
    window: Window
    verdict: Verdict
    headline: str
    row_count: int
    trusted_windows: int
    held_windows: int
    noise: LabelNoise | None
    relation: Relation | None
    labels: LabelShift | None
    suspicious_rows: tuple[str, ...] = ()
    slices: tuple[SuspiciousSlice, ...] = ()
    quarantine: DatasetVersion | None = None
    released_by: str | None = None


def run(spec: ScreenSpec, services: Services) -> ScreenResult:
    """Screen the partition, and set it aside where that is asked for.

    :raises InsufficientDataError: it has no row with a label.
    :raises StaleDatasetError: the window was written again after the version that was screened; nothing is set aside.
    :raises CommitConflictError: likewise, where another attempt screens the newest version.
    """
    dataset = resolve_dataset(spec.dataset, time_column=spec.time_column)
    features = _features(spec, dataset)
    new = _labelled(spec, dataset, spec.window, features)
    if new.height == 0:
        raise InsufficientDataError(
            f"{spec.window} of {dataset.uri} has no row with a {spec.target!r}: nothing to screen"
        )
    held = _held_windows(dataset.uri, services)
    partitions: list[pl.DataFrame] = []
    passed: list[Window] = []
    count = spec.policy.trusted_partitions + len(held)
    for window in windows_before(spec.window, count, find_time_zone(spec.time_zone)):
        if len(partitions) == spec.policy.trusted_partitions:
            break
        over = [one for one in held if _overlap(window, one)]
        passed += over
        if not over:
            # Of trusted partitions only so many rows are kept in memory as are compared.
            rows = evenly(_labelled(spec, dataset, window, features), spec.policy.rows_per_partition)
            partitions += [rows] if rows.height else []
    between = list(dict.fromkeys(passed))
    screened = screen_partitions(
        new,
        partitions,
        features=features,
        target=spec.target,
        time_column=spec.time_column,
        policy=spec.policy,
        held=[held[window] for window in between],
        private=spec.private_columns,
    )
    headline = f"{spec.window} of {dataset.uri}: {screened.reason}"
    aside = None
    if spec.quarantine is not None and screened.verdict == "held" and spec.released_by is None:
        aside = _set_aside(spec, spec.quarantine, dataset, screened.reason)
        headline += f"; its rows are in {spec.quarantine}"
    elif spec.quarantine is not None:
        let_in_again(dataset.uri, spec.window, time_column=spec.time_column, table=spec.quarantine)
    return ScreenResult(
        dataset=aside[0] if aside else dataset,
        window=spec.window,
        verdict=screened.verdict,
        headline=headline,
        row_count=new.height,
        trusted_windows=screened.trusted,
        held_windows=len(between),
        noise=screened.noise,
        relation=screened.relation,
        labels=screened.labels,
        suspicious_rows=tuple(_named(spec, new, screened)),
        slices=screened.slices,
        quarantine=aside[1] if aside else None,
        released_by=spec.released_by,
    )


def _features(spec: ScreenSpec, dataset: DatasetVersion) -> list[str]:
    known = list(dataset.columns)
    named = [spec.target, spec.time_column, *([spec.id_column] if spec.id_column else [])]
    delta.require_columns([*named, *spec.features, *spec.private_columns], known, dataset.uri)
    chosen = list(spec.features) or [name for name in known if name not in named]
    used = [name for name in chosen if name in (spec.target, spec.time_column)]
    if used or not chosen:
        raise ValueError(f"features of a screen are columns beside target and time, got {chosen}")
    return chosen


def _labelled(
    spec: ScreenSpec, dataset: DatasetVersion, window: Window, features: Sequence[str]
) -> pl.DataFrame:
    """Read a partition's rows with a label, in the order of time."""
    columns = [*features, spec.target, spec.time_column, *([spec.id_column] if spec.id_column else [])]
    rows = delta.read_table(
        dataset.uri,
        version=dataset.version,
        columns=list(dict.fromkeys(columns)),
        window=window,
        time_column=spec.time_column,
    ).collect()
    known = rows.drop_nulls(spec.target)
    if rows.schema[spec.target].is_float():
        known = known.drop_nans(spec.target)
    return known.sort(spec.time_column, maintain_order=True)


def _held_windows(uri: str, services: Services) -> dict[Window, HeldBefore]:
    """Find the windows of a table that were held and nobody released, by the ledger: they are not trusted."""
    from airflow_mlops.ledger import EntryKind, Ledger

    newest: dict[Window, HeldBefore | None] = {}
    with Ledger.open(services.require("ledger_url")) as ledger:
        for entry in ledger.entries_of_table(uri, kind=EntryKind.SCREENING, limit=_LOOKED_AT):
            told = entry.payload
            stopped = told["verdict"] == "held" and told["released_by"] is None
            if entry.window is not None:
                newest.setdefault(entry.window, _held_for(told) if stopped else None)
    return {window: found for window, found in newest.items() if found is not None}


def _held_for(told: Mapping[str, Any]) -> HeldBefore:
    distance = told["labels"]["distance"] if told.get("labels") else 0.0
    return HeldBefore(told["noise"]["rate"], told["relation"]["gap"], distance)


def _overlap(one: Window, other: Window) -> bool:
    return one.start < other.end and other.start < one.end


def _named(spec: ScreenSpec, new: pl.DataFrame, screened: Screened) -> Iterator[str]:
    shown = spec.id_column if spec.id_column not in spec.private_columns else None
    for position in screened.rows:
        yield str(new[shown][position] if shown else position)[:_SHOWN_WIDTH]


def _set_aside(
    spec: ScreenSpec, quarantine: str, dataset: DatasetVersion, reason: str
) -> tuple[DatasetVersion, DatasetVersion]:
    """Move the whole partition to another table, rows without a label included.

    :returns: the table without it, and the other one.
    """
    import polars as pl

    rows = delta.read_table(
        dataset.uri, version=dataset.version, window=spec.window, time_column=spec.time_column
    )
    aside = SetAside(
        dataset=dataset,
        window=spec.window,
        time_column=spec.time_column,
        table=quarantine,
        reasons=[(reason, pl.lit(value=True))],
        count=count_rows(rows),
        newest=isinstance(spec.dataset, str),
        step="screen",
    )
    held, kept = aside.write(to_dict(spec.policy))
    return kept, held


STEP = Step(name="screen", spec=ScreenSpec, result=ScreenResult, run=run)
