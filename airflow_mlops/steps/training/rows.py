"""The rows of a training: which ones, which are held out, and how much each counts."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Literal, NamedTuple, cast

import numpy as np

from airflow_mlops.core.model.simple_guess import best_constant
from airflow_mlops.core.windows import Window
from airflow_mlops.exceptions import InsufficientDataError, SchemaMismatchError
from airflow_mlops.steps.common import read_rows, with_float_target

if TYPE_CHECKING:
    from collections.abc import Sequence

    import polars as pl
    from numpy.typing import NDArray

    from airflow_mlops.core.comparison.metric import Metric
    from airflow_mlops.core.data.dataset import DatasetVersion
    from airflow_mlops.core.model.columns import ColumnRoles
    from airflow_mlops.services import Services

#: ``window``: exactly the given one; ``all``: everything before its end; ``trailing``: so many days before its end;
#: ``since_change``: since the world last changed, or all.
RowRule = Literal["window", "all", "trailing", "since_change"]


#: Metrics of labels by which the most frequent label for every row is as good as any.
_OF_MOST = frozenset({"accuracy", "balanced_accuracy"})


class Split(NamedTuple):
    """Rows to learn from and newer ones to judge on, both in time order."""

    training: pl.DataFrame
    holdout: pl.DataFrame
    training_window: Window
    holdout_window: Window

    @property
    def whole(self) -> Split:
        """The same with nothing held out: what was is learned from as well."""
        import polars as pl

        window = Window(start=self.training_window.start, end=self.holdout_window.end)
        return self._replace(training=pl.concat([self.training, self.holdout]), training_window=window)


def require_instants(dataset: DatasetVersion, time_column: str) -> None:
    """See that the time column holds instants: windows, folds and ages are made of them.

    :raises SchemaMismatchError: it holds dates, numbers, text, or times without a time zone.
    """
    held = dataset.columns.get(time_column)
    if held is not None and (not held.startswith("Datetime") or "time_zone=None" in held):
        raise SchemaMismatchError(
            f"time column {time_column!r} of {dataset.uri} holds {held}, and has to hold instants in UTC: name it as time_column "
            "when the table is ingested, which makes them of dates, texts and naive times"
        )


def choose_window(
    rule: RowRule,
    window: Window | None,
    *,
    dataset: DatasetVersion,
    trailing_days: float | None,
    model_name: str,
    services: Services,
) -> Window | None:
    """Turn the rule into a window; ``None`` is the whole table.

    :raises InsufficientDataError: ``all``, and the table begins after the window's end.
    :raises ValueError: ``trailing`` without days, or a rule that needs a window end and has none.
    """
    if rule == "window" or (rule == "all" and window is None):
        return window
    if window is None:
        raise ValueError(f"rows={rule!r} needs the end of a window to count back from")
    change = _last_change(model_name, services) if rule == "since_change" else None
    if change is not None and change < window.end:
        return replace(window, start=change)
    if rule in {"all", "since_change"}:
        if dataset.time_min is None or dataset.time_min >= window.end:
            raise InsufficientDataError(f"{dataset.uri} has no row before {window.end}: nothing to train on")
        return replace(window, start=dataset.time_min)
    if trailing_days is None or trailing_days <= 0:
        raise ValueError(f"rows='trailing' needs trailing_days above zero, got {trailing_days}")
    return replace(window, start=window.end - timedelta(days=trailing_days))


def split_rows(
    dataset: DatasetVersion,
    columns: ColumnRoles,
    window: Window | None,
    holdout_share: float,
    holdout_start: datetime | None = None,
) -> Split:
    """Hold out the newest rows: a random split would let the model see the future.

    :param holdout_start: rows from here on are held out, instead of a share.
    :raises InsufficientDataError: no row with a target, or too few instants to split.
    :raises SchemaMismatchError: a target is infinite.
    :raises ValueError: a share outside ``(0, 0.5]``.
    """
    import polars as pl

    if not 0.0 < holdout_share <= 0.5:
        raise ValueError(f"holdout_share is {holdout_share}; it must be in (0, 0.5]")
    rows = read_rows(dataset, columns=list(columns.all), time_column=columns.time, window=window)
    rows = rows.drop_nulls([columns.target, columns.time]).sort(columns.time, maintain_order=True)
    rows = with_float_target(rows, columns.target)
    if rows.schema[columns.target].is_float():
        rows = rows.drop_nans(columns.target)
        infinite = rows[columns.target].is_infinite().sum()
        if infinite:
            raise SchemaMismatchError(
                f"{columns.target!r} is infinite in {infinite} of {rows.height} rows of {dataset.uri}: correct or drop them when "
                "the data is ingested"
            )
    if rows.height == 0:
        raise InsufficientDataError(
            f"no row of {dataset.uri}{f' in {window}' if window else ''} has a {columns.target}: nothing to train on"
        )
    times = rows[columns.time]
    boundary = holdout_start or cast("datetime", times[int(rows.height * (1.0 - holdout_share))])
    training = rows.filter(pl.col(columns.time) < boundary)
    holdout = rows.filter(pl.col(columns.time) >= boundary)
    if training.height == 0 or holdout.height == 0:
        raise InsufficientDataError(
            f"{rows.height} rows of {dataset.uri} can't be split by {columns.time!r} at {boundary}: "
            f"{training.height} to train on, {holdout.height} held out; give another "
            f"{'holdout_start' if holdout_start else 'holdout_share'}, or more rows"
        )
    start = window.start if window else cast("datetime", times.min())
    end = window.end if window else cast("datetime", times.max()) + timedelta(microseconds=1)
    return Split(
        training=training,
        holdout=holdout,
        training_window=Window(start=start, end=boundary),
        holdout_window=Window(start=boundary, end=end),
    )


def row_weights(
    rows: pl.DataFrame, columns: ColumnRoles, half_life_days: float | None
) -> NDArray[np.float64] | None:
    """Weigh rows: the weight column times ``0.5 ** (age / half_life)``, age counted back from the newest row.

    Age only shifts weight between rows: their mean stays that of the weight column, or one. A penalty on the
    parameters would otherwise count for more the older the rows are.

    Source: Klinkenberg, "Learning drifting concepts: example selection vs. example weighting", Intelligent Data
    Analysis 8, 2004.

    :param rows: exactly the rows of one fit, such as those of one fold.
    :param half_life_days: ``None``: age does not count.
    :returns: shape ``(rows,)``; ``None`` when all rows count the same.
    :raises ValueError: a half-life that is not positive, or weights that are missing or negative.
    """
    if half_life_days is not None and half_life_days <= 0:
        raise ValueError(
            f"half_life_days is {half_life_days}; it must be positive, or None for equal weights"
        )
    weights: NDArray[np.float64] | None = None
    if columns.weight is not None:
        weights = rows[columns.weight].cast(float).to_numpy()
        if not (np.isfinite(weights).all() and (weights >= 0.0).all() and weights.sum() > 0.0):
            raise ValueError(
                f"weight column {columns.weight!r} has missing, negative or only zero values; every training row needs "
                "a weight of zero or more, and some row a positive one"
            )
    if half_life_days is None:
        return weights
    import polars as pl

    times = pl.col(columns.time)
    age_days = rows.select((times.max() - times).dt.total_seconds()).to_series().to_numpy() / 86_400.0
    if weights is None:
        weights = np.ones(len(age_days))
    # In logarithms, so that rows that are all old against the half-life still differ.
    with np.errstate(divide="ignore"):
        logarithms = np.log(weights) - np.log(2.0) * age_days / half_life_days
    aged = np.exp(logarithms - logarithms.max())
    return np.asarray(aged * (weights.mean() / aged.mean()), dtype=np.float64)


def simple_prediction(target: pl.Series, metric: Metric, *, classes: Sequence[str] = ()) -> float | str:
    """Give the answer that is best by the metric among those that are the same for every row.

    That is the mean, the median or a quantile where theory knows which, else the best of the mean and quantiles in steps of 5 %;
    of labels the most frequent one, or the best by F1, precision, recall and metrics of a user's own. Any other would be beaten by a model
    that knows nothing either.

    Source: Gneiting, "Making and evaluating point forecasts", Journal of the American Statistical Association 106, 2011.

    :param target: of the training rows.
    :param metric: the training's.
    :param classes: labels of the model; empty for numbers.
    """
    if classes:
        usual = str(target.mode().sort()[0])
        if metric.needs_probabilities or metric.name in _OF_MOST:
            return usual
        return best_constant([usual, *classes], target.to_numpy(), metric, classes)
    numbers = target.cast(float)
    kind, _, level = metric.name.partition("@")
    median, mean, *_ = constants = constant_answers(numbers)
    if kind == "quantile_loss":
        return float(np.quantile(numbers.to_numpy(), float(level)))
    if kind in {"mae", "rmse", "r2"}:
        return median if kind == "mae" else mean
    return best_constant(constants, numbers.to_numpy(), metric, ())


def constant_answers(target: pl.Series) -> tuple[float, ...]:
    """Give median, mean and every twentieth quantile of numbers."""
    numbers = target.cast(float).to_numpy()
    quantiles = np.quantile(numbers, [0.5, *np.linspace(0.05, 0.95, 19)]).tolist()
    return (quantiles[0], float(np.mean(numbers)), *quantiles[1:])


def class_shares(target: pl.Series) -> dict[str, float]:
    """Share of each label, under the text that the model's labels and what turned out are compared as."""
    counts = target.alias("label").value_counts(sort=True)
    return {str(label): count / len(target) for label, count in counts.rows()}


def _last_change(model_name: str, services: Services) -> datetime | None:
    """Find when the world last changed, as far as a promoted model was trained on what came after alone."""
    from airflow_mlops.ledger import Ledger

    with Ledger.open(services.require("ledger_url")) as ledger:
        return ledger.world_since(model_name)
