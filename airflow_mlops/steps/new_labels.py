"""New labels: of the windows that wait for the rest of theirs, those that got any. One look at what is new, not one at each window."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from airflow_mlops.core.data.dataset import DatasetVersion
from airflow_mlops.core.windows import Window
from airflow_mlops.integrations import delta
from airflow_mlops.steps.base import Step
from airflow_mlops.steps.common import DatasetRef, pin_dataset
from airflow_mlops.steps.monitoring.labels import id_texts, windows_of

if TYPE_CHECKING:
    import polars as pl

    from airflow_mlops.services import Services


@dataclass(frozen=True, kw_only=True, slots=True)
class LookedAt:
    """A window that was graded.

    :param version: of the table of labels, by which it was graded last.
    :param known_at: when that was; a table may have been made anew since.
    """

    window: Window
    version: int
    known_at: datetime


@dataclass(frozen=True, kw_only=True, slots=True)
class NewLabelsSpec:
    """Which windows are asked about.

    :param model_name: model whose inference log is read.
    :param labels: dataset version or table that holds the labels.
    :param id_column: its column of prediction ids.
    :param target: its column of labels.
    :param windows: those that wait for labels.
    """

    model_name: str
    labels: DatasetRef
    id_column: str
    target: str
    windows: tuple[LookedAt, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class NewLabelsResult:
    """Which of them got labels.

    :param unchanged: those that did not, so that their grade is what it was.
    :param labels: version of the table that was looked at: what came after it has yet to be.
    """

    unchanged: tuple[Window, ...]
    labels: DatasetVersion


def run(spec: NewLabelsSpec, services: Services) -> NewLabelsResult:
    """Find the windows of which no prediction is among the labels that were added, changed or deleted since.

    :raises SchemaMismatchError: the table has no such column.
    """
    labels = pin_dataset(spec.labels)
    log = Path(services.require("serving_dir")) / "inference_log"
    unchanged: list[Window] = []
    for version in sorted({item.version for item in spec.windows}):
        asked = [item.window for item in spec.windows if item.version == version]
        columns = list(dict.fromkeys([spec.id_column, spec.target]))
        known_at = min(item.known_at for item in spec.windows if item.version == version)
        changed = delta.rows_changed(
            labels.uri, columns, before=version, after=labels.version, known_at=known_at
        )
        if changed is not None:
            got = windows_of(log, spec.model_name, _ids(changed, spec.id_column), asked)
            unchanged += [window for window in asked if window not in got]
    return NewLabelsResult(unchanged=tuple(sorted(unchanged)), labels=labels)


def _ids(labels: pl.DataFrame, column: str) -> pl.Series:
    frame = labels.lazy()
    return frame.select(id_texts(frame, column)).collect().to_series().unique().drop_nulls()


STEP = Step(name="new-labels", spec=NewLabelsSpec, result=NewLabelsResult, run=run)
