"""Labels: joining what was predicted with what turned out, by prediction id."""

from __future__ import annotations

from typing import TYPE_CHECKING

from airflow_mlops.exceptions import SchemaMismatchError
from airflow_mlops.integrations import delta
from airflow_mlops.serving.inference_log import FEATURE_PREFIX, read_inference_log
from airflow_mlops.steps.common import DatasetRef, resolve_dataset

if TYPE_CHECKING:
    from pathlib import Path

    import polars as pl

    from airflow_mlops.core.windows import Window


def labelled_predictions(
    log: Path,
    model_name: str,
    window: Window,
    *,
    labels: DatasetRef | None,
    id_column: str,
    target: str,
    inputs: bool = False,
) -> pl.DataFrame:
    """Join the predictions of a window with their labels; a prediction without a label keeps a null there.

    :param log: root of the inference log.
    :param labels: dataset version or table URI that holds ``id_column`` and ``target``; ``None``: there are none.
    :param inputs: whether to give the logged inputs, too.
    :returns: ``prediction_id``, ``model_version``, ``prediction``, the inputs and the target column, one row per prediction, in the
        order of their times; a prediction that was logged twice (a client that retried) counts once, with its latest answer.
    :raises InsufficientDataError: nothing was predicted in the window.
    """
    import polars as pl

    predictions = (
        read_inference_log(log, model_name, window)
        .sort("received_at")
        .unique("prediction_id", keep="last", maintain_order=True)
        .sort("time", maintain_order=True)
    )
    features = [name for name in predictions.columns if inputs and name.startswith(FEATURE_PREFIX)]
    predictions = predictions.select("prediction_id", "model_version", "prediction", *features)
    if labels is None:
        return predictions.with_columns(pl.lit(None, dtype=pl.Float64).alias(target))
    dataset = resolve_dataset(labels)
    truth = delta.read_table(dataset.uri, version=dataset.version, columns=[id_column, target])
    known = truth.with_columns(pl.col(id_column).cast(pl.String)).collect()
    if known[id_column].is_duplicated().any():
        raise SchemaMismatchError(
            f"labels in {dataset.uri} repeat values of {id_column!r}: a prediction must have one label"
        )
    return predictions.join(
        known, left_on="prediction_id", right_on=id_column, how="left", maintain_order="left"
    )


def labelled_share(
    log: Path, model_name: str, window: Window, *, labels: DatasetRef, id_column: str, target: str
) -> float:
    """Tell which share of a window's predictions has a label by now, in ``[0, 1]``.

    :raises InsufficientDataError: nothing was predicted in the window.
    """
    joined = labelled_predictions(log, model_name, window, labels=labels, id_column=id_column, target=target)
    return 1.0 - joined[target].null_count() / joined.height
