"""The picture of a drift check: Evidently's page about a sample of both sides, kept as an artifact of a monitoring run."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airflow_mlops.core.data.categories import category_texts
from airflow_mlops.integrations import evidently
from airflow_mlops.steps.common import work_key
from airflow_mlops.steps.monitoring.drift_sides import DriftSides, Reference, sample_rows
from airflow_mlops.steps.monitoring.labels import labelled_predictions

if TYPE_CHECKING:
    import pandas as pd
    import polars as pl

    from airflow_mlops.core.windows import Window
    from airflow_mlops.integrations.mlflow import Registry
    from airflow_mlops.steps.common import DatasetRef

#: Experiment that holds the reports of a model's windows.
MONITORING_EXPERIMENT = "{model_name} monitoring"
REPORT_FILE = "drift_report.html"
#: Rows per side of the report: an explanation needs a picture, not every row.
REPORT_ROWS = 5_000


def write_report(
    registry: Registry,
    sides: DriftSides,
    window: Window,
    against: Reference,
    *,
    spec: dict[str, Any],
    share_threshold: float,
    labels: DatasetRef | None,
    id_column: str | None,
) -> str:
    """Write the page about reference and window, and give its address.

    :param against: what the window was compared with.
    :param spec: what was asked for: equal work takes the place of an attempt that died.
    :param share_threshold: share of drifted columns from which the page says that the dataset drifted.
    :param labels: dataset version or table URI with labels, to show the target beside that of the training rows.
    :param id_column: column of the labels that equals the prediction id.
    """
    manifest = sides.manifest
    shown = [item for item in manifest.signature.inputs if item.name in sides.compared]
    numeric = [item.name for item in shown if item.type == "number"]
    categorical = [item.name for item in shown if item.type == "string"]
    if against.windows:  # of their predictions the target is in no table of ours
        labels = None
    if labels and id_column:
        (numeric if manifest.task == "regression" else categorical).append(manifest.target)
    columns = [*numeric, *categorical]
    reference = sample_rows(against.open_rows(columns), REPORT_ROWS)
    if labels and id_column:
        current = _labelled_sample(sides, window, labels=labels, id_column=id_column)
    else:
        current = sample_rows(sides.open_window(window, columns), REPORT_ROWS)
    experiment_id = registry.experiment_id(MONITORING_EXPERIMENT.format(model_name=sides.model_name))
    key = work_key("drift", spec, manifest.trained_on.dataset_digest)
    what = f"the drift report of {sides.model_name} in {window}"
    registry.take_over_dead_runs(experiment_id, key, what)
    tags = {"airflow_mlops.window": window.key}
    with registry.leased_run(experiment_id, f"window {window}", step_key=key, what=what, tags=tags) as run_id:
        with tempfile.TemporaryDirectory() as temporary:
            evidently.write_drift_report(
                reference=_frame(reference, numeric, categorical),
                current=_frame(current, numeric, categorical),
                numeric=numeric,
                categorical=categorical,
                share_threshold=share_threshold,
                path=Path(temporary) / REPORT_FILE,
            )
            registry.upload(run_id, Path(temporary), "")
        return registry.run_url(experiment_id, run_id, REPORT_FILE)


def _labelled_sample(
    sides: DriftSides, window: Window, *, labels: DatasetRef, id_column: str
) -> pl.DataFrame:
    """Give inputs and target of the predictions whose label has arrived."""
    target = sides.manifest.target
    joined = labelled_predictions(
        sides.log, sides.model_name, window, labels=labels, id_column=id_column, target=target
    ).drop_nulls(target)
    chosen = sample_rows(joined.lazy(), REPORT_ROWS).select("prediction_id", target)
    ids = sides.open_window(window, ["(id)", *sides.inputs])
    rows = ids.join(chosen.lazy(), left_on="(id)", right_on="prediction_id", how="inner").collect()
    return rows.unique("(id)", keep="last", maintain_order=True).drop("(id)")


def _frame(rows: pl.DataFrame, numeric: list[str], categorical: list[str]) -> pd.DataFrame:
    import polars as pl

    numbers = [pl.col(name).cast(pl.Float64) for name in numeric]
    return rows.select(*numbers, *(category_texts(rows[name]) for name in categorical)).to_pandas()
