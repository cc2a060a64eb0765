"""Score: a registered version's predictions for a window of a dataset version, as a Delta table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from airflow_mlops.core.dataset import DatasetVersion
from airflow_mlops.core.windows import Window
from airflow_mlops.integrations import delta
from airflow_mlops.integrations.mlflow import Registry
from airflow_mlops.steps.base import Step
from airflow_mlops.steps.common import DatasetRef, model_columns, read_rows, resolve_dataset
from airflow_mlops.steps.packages import load_version

if TYPE_CHECKING:
    from airflow_mlops.services import Services


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreSpec:
    """What to score.

    :param dataset: dataset version, or table URI for its newest.
    :param table: URI of the Delta table of predictions; the window is replaced there.
    :param model_name: registered model.
    :param model_version: version number; ``None`` takes the one ``alias`` points at.
    :param alias: see ``model_version``.
    :param id_column: copied to the predictions, to join them.
    :param time_column: copied too; places a row in the window.
    :param window: rows to score; ``None`` scores all.
    """

    dataset: DatasetRef
    table: str
    model_name: str
    model_version: str | None = None
    alias: str = "champion"
    id_column: str
    time_column: str
    window: Window | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreResult:
    """Where the predictions are."""

    dataset: DatasetVersion
    predictions: DatasetVersion
    model_name: str
    model_version: str
    row_count: int


def run(spec: ScoreSpec, services: Services) -> ScoreResult:
    """Predict and write the window in one commit.

    :raises InsufficientDataError: the window has no rows.
    :raises SchemaMismatchError: an input column is missing.
    """
    import polars as pl

    registry = Registry.connect(services)
    version = (
        registry.version(spec.model_name, spec.model_version)
        if spec.model_version
        else registry.version_by_alias(spec.model_name, spec.alias)
    )
    dataset = resolve_dataset(spec.dataset, time_column=spec.time_column)
    model = load_version(registry, version, services)
    names = model.manifest.signature.names
    columns = [*dict.fromkeys([spec.id_column, spec.time_column, *names])]
    rows = read_rows(dataset, columns=columns, time_column=spec.time_column, window=spec.window)
    predictions = rows.select(
        spec.id_column,
        spec.time_column,
        pl.Series("prediction", model.predict_columns(model_columns(rows, model.manifest.signature))),
        pl.lit(version.model_version).alias("model_version"),
    )
    written = delta.replace_window(spec.table, predictions, time_column=spec.time_column, window=spec.window)
    return ScoreResult(
        dataset=dataset,
        predictions=delta.describe(spec.table, version=written, time_column=spec.time_column),
        model_name=version.model_name,
        model_version=version.model_version,
        row_count=predictions.height,
    )


STEP = Step(name="score", spec=ScoreSpec, result=ScoreResult, run=run)
