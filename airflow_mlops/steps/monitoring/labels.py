"""Labels: joining what was predicted with what turned out, by prediction id."""

from __future__ import annotations

from bisect import bisect_right
from functools import lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING

from airflow_mlops.exceptions import SchemaMismatchError
from airflow_mlops.integrations import delta
from airflow_mlops.serving.inference_log import read_inference_log
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
from airflow_mlops.steps.common import DatasetRef, pin_dataset

if TYPE_CHECKING:
    from collections.abc import Sequence
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
        A label that is no number (NaN) is none.
    :raises InsufficientDataError: nothing was predicted in the window.
    :raises SchemaMismatchError: predictions of the window have labels that contradict each other, or the label column has the name
        of one of the log.
    """
    import polars as pl

    predictions = newest_answers(read_inference_log(log, model_name, window)).sort(
        "time", maintain_order=True
    )
    features = [name for name in predictions.columns if inputs and name.startswith(FEATURE_PREFIX)]
    predictions = predictions.select("prediction_id", "model_version", "prediction", *features)
    if labels is None:
        _require_own_name(target, predictions)
        return predictions.with_columns(pl.lit(None, dtype=pl.Float64).alias(target))
    return join_labels(predictions, labels=labels, id_column=id_column, target=target)


def windows_of(log: Path, model_name: str, ids: pl.Series, windows: Sequence[Window]) -> set[Window]:
    """Find the windows that hold one of these predictions; each file of the log is read once at most.

    :param ids: prediction ids.
    :param windows: those that are asked about; they may overlap.
    """
    import polars as pl

    files = LogFiles(log)
    ordered = sorted(windows)
    starts = [stamp(window.start) for window in ordered]
    reached = list(accumulate((stamp(window.end) for window in ordered), max))

    def may_be_in(name: str) -> set[Window]:
        """Give the windows of which a file may hold a row; there may be thousands of both."""
        first, last = time_span(name)
        near = ordered[bisect_right(reached, first) : bisect_right(starts, last)]
        return {window for window in near if may_hold(name, window)}

    def find() -> set[Window]:
        found: set[Window] = set()
        for names in files.hours(model_name).values():
            asked = {name: may_be_in(name) - found for name in names}
            matter = files.counting(name for name, there in asked.items() if there)
            open_windows = {window for there in asked.values() for window in there}
            for group in by_schema(files.source(name) for name in matter):
                times = scan(group).filter(pl.col("prediction_id").is_in(ids.implode())).select("time")
                here = times.collect()["time"]
                found |= {
                    window
                    for window in open_windows
                    if here.is_between(window.start, window.end, closed="left").any()
                }
        return found

    return reading_again(find) if ids.len() else set()


def newest_answers(rows: pl.DataFrame) -> pl.DataFrame:
    """Keep the latest answer of each prediction id: a client that retried is logged twice."""
    return rows.sort("received_at").unique("prediction_id", keep="last", maintain_order=True)


def join_labels(
    predictions: pl.DataFrame, *, labels: DatasetRef, id_column: str, target: str
) -> pl.DataFrame:
    """Join predictions with their labels by ``prediction_id``; one without a label keeps a null there.

    :raises SchemaMismatchError: labels contradict each other, or their column has the name of one of the log.
    """
    dataset = pin_dataset(labels)
    return _joined(predictions, uri=dataset.uri, version=dataset.version, id_column=id_column, target=target)


def _joined(
    predictions: pl.DataFrame, *, uri: str, version: int, id_column: str, target: str
) -> pl.DataFrame:
    import polars as pl

    _require_own_name(target, predictions)
    truth = delta.read_table(uri, version=version, columns=[id_column, target])
    asked = predictions.lazy().select(pl.col("prediction_id").alias(id_column))
    labels_here = (
        truth.with_columns(id_texts(truth, id_column)).join(asked, on=id_column, how="semi").collect()
    )
    if labels_here.schema[target].is_float():
        labels_here = labels_here.with_columns(pl.col(target).fill_nan(None))
    known = labels_here.drop_nulls(target).unique()  # a label that was delivered twice is one
    _require_one_each(known, id_column, target, uri)
    return predictions.join(
        known, left_on="prediction_id", right_on=id_column, how="left", maintain_order="left"
    )


def id_texts(table: pl.LazyFrame, column: str) -> pl.Expr:
    """Give a column of ids as the inference log has them: 12, also where the table's column once held a gap and has 12.0."""
    import polars as pl

    ids, held = pl.col(column), table.collect_schema()[column]
    texts = ids.cast(pl.String)
    if held.is_decimal():
        return texts.str.replace(r"(\.\d*?)0+$", "$1").str.strip_chars_end(".")
    if held.is_float():
        whole = (ids == ids.floor()) & (ids.abs() < 2**53)
        return pl.when(whole).then(ids.cast(pl.Int64, strict=False).cast(pl.String)).otherwise(texts)
    return texts


def _require_own_name(target: str, predictions: pl.DataFrame) -> None:
    """Refuse a name the log has for something else: answers would be held against themselves."""
    if target in predictions.columns:
        raise SchemaMismatchError(
            f"the label column {target!r} has the name of a column of the inference log: give the labels another name, such as "
            f"'actual_{target}', and that as the target"
        )


def _require_one_each(known: pl.DataFrame, id_column: str, target: str, uri: str) -> None:
    """Refuse labels of which nobody can tell which one is right."""
    again = known.filter(known[id_column].is_duplicated()).sort(id_column, target)
    if again.height == 0:
        return
    first = again[id_column][0]
    values = " and ".join(str(value) for value in again.filter(again[id_column] == first)[target].to_list())
    raise SchemaMismatchError(
        f"labels in {uri} contradict each other for {again[id_column].n_unique()} predictions, such as {id_column} {first!r} with "
        f"{target} {values}: keep the one that counts, such as the newest"
    )


def as_trained(labels: pl.Series, classes: Sequence[str] | None) -> pl.Series:
    """Give labels of a classifier the type they had at training: a table that once held a missing one has 1.0 for 1.

    :param labels: without missing ones.
    :param classes: what the model answers; ``None`` for numbers.
    :raises SchemaMismatchError: not one of them is a label the model knows, or they are no numbers where it answers numbers.
    """
    import polars as pl

    if labels.len() == 0:
        return labels
    if not classes:
        return _as_numbers(labels)
    known, numbers = set(classes), labels.cast(pl.Int8) if labels.dtype == pl.Boolean else labels
    for kind in (labels.dtype, pl.Int64, pl.Float64, pl.Boolean):
        if kind != labels.dtype and not numbers.dtype.is_numeric():
            continue
        cast = labels.cast(kind, strict=False)
        same = cast.cast(numbers.dtype) if kind == pl.Boolean else cast
        if set(_texts(cast.unique())) & known and (same == numbers).all():
            return cast
    shown = ", ".join(sorted(_texts(labels.unique()))[:5])
    raise SchemaMismatchError(
        f"labels in {labels.name!r} are {shown}, and the model answers {', '.join(classes[:5])}: give the column it was trained on, "
        "with the same values"
    )


def _as_numbers(labels: pl.Series) -> pl.Series:
    """Give labels of a regression as numbers; text may hold them, times are none."""
    import polars as pl

    if labels.dtype.is_decimal():
        return labels.cast(pl.Float64)
    if labels.dtype.is_numeric() or labels.dtype == pl.Boolean:
        return labels
    numbers = labels.cast(pl.Float64, strict=False) if labels.dtype == pl.String else None
    if numbers is None or numbers.null_count():
        strange = labels[0] if numbers is None else labels.filter(numbers.is_null())[0]
        raise SchemaMismatchError(
            f"labels in {labels.name!r} are of type {labels.dtype}, such as {str(strange)[:40]!r}, and the model answers numbers: "
            "give the column it was trained on"
        )
    return numbers


def _texts(labels: pl.Series) -> list[str]:
    return [str(label) for label in labels.to_list() if label is not None]


def labelled_share(
    log: Path,
    model_name: str,
    window: Window,
    *,
    labels: DatasetRef,
    id_column: str,
    target: str,
    model_version: str | None = None,
) -> float:
    """Tell which share of a window's predictions has a label by now, in ``[0, 1]``.

    Asked again before the log or the labels have changed it reads neither.

    :param model_version: whose answers count; those of all versions where it is not known, or gave none in the window.
    :raises InsufficientDataError: nothing was predicted in the window.
    """
    kept = LogFiles(log)
    hours = [[name for name in names if may_hold(name, window)] for names in kept.hours(model_name).values()]
    files = tuple(name for names in hours for name in kept.counting(names))
    dataset = pin_dataset(labels)
    asked = (id_column, target, model_version)
    return _labelled_share(log, model_name, window, files, dataset.uri, dataset.version, *asked)


@lru_cache(maxsize=64)
def _labelled_share(
    log: Path,
    model_name: str,
    window: Window,
    files: tuple[str, ...],  # which tell one state of the log from another
    uri: str,
    version: int,
    id_column: str,
    target: str,
    model_version: str | None,
) -> float:
    columns = ["prediction_id", "model_version", "received_at"]
    rows = newest_answers(read_inference_log(log, model_name, window, columns=columns))
    own = rows.filter(rows["model_version"] == model_version) if model_version is not None else rows
    asked = own if own.height else rows
    joined = _joined(asked, uri=uri, version=version, id_column=id_column, target=target)
    return 1.0 - joined[target].null_count() / joined.height
