"""Quality of both versions of a rollout: losses where labels have arrived, and estimates where none have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from airflow_mlops.core.comparison.metrics import resolve_metric
from airflow_mlops.core.comparison.predictions import Graded, Predictions, valid_values
from airflow_mlops.core.comparison.resampling import t_quantile
from airflow_mlops.core.monitoring.estimation import COVERAGE
from airflow_mlops.core.monitoring.estimator_record import GradedEstimate, judge_estimator
from airflow_mlops.core.rollouts.mean_losses import (
    EstimatedLoss,
    Losses,
    PairedLosses,
    losses_of,
    paired_losses_of,
)
from airflow_mlops.steps.common import DatasetRef
from airflow_mlops.steps.monitoring.estimation import estimate, open_for_grading
from airflow_mlops.steps.monitoring.labels import as_trained, join_labels, newest_answers

if TYPE_CHECKING:
    from pathlib import Path

    import polars as pl
    from numpy.typing import NDArray

    from airflow_mlops.core.comparison.metric import Metric
    from airflow_mlops.core.model.signing import Trust
    from airflow_mlops.ledger import WindowGrade
    from airflow_mlops.steps.monitoring.estimation import GradingPackage

#: Answers that are read at a look to estimate losses, at most: many more make an estimate no better than its model is.
MOST_ESTIMATED = 200_000

#: Columns of the inference log that labels are joined to; nothing is read of what was asked.
ANSWER_COLUMNS = ("prediction_id", "request_id", "caller", "model_version", "prediction", "received_at")


@dataclass(frozen=True, kw_only=True, slots=True)
class QualitySpec:
    """Labels to judge a rollout by, as they arrive.

    :param labels: dataset version or table URI that holds them.
    :param id_column: column of the labels that equals the prediction id.
    :param target: label column.
    :param metric: built-in metric or import path of one, a mean of losses by row.
    """

    labels: DatasetRef
    id_column: str
    target: str
    metric: str


class Copy(NamedTuple):
    """A version as the serving folder holds it.

    :param folder: of its verified copy.
    :param digest: of its package.
    """

    model_version: str
    folder: Path
    digest: str


def losses_with_labels(
    quality: QualitySpec,
    answered: pl.DataFrame | None,
    *,
    stable: str,
    new: str,
    mirrored: bool,
    sticky: bool,
    classes: Sequence[str] | None = None,
) -> tuple[Losses, Losses] | PairedLosses:
    """Give what both versions lost on the answers whose labels have arrived.

    :param answered: rows of the inference log, with :data:`ANSWER_COLUMNS`.
    :param stable: version that was served before.
    :param new: version that is to replace it.
    :param mirrored: whether both answered every request: then they are compared in pairs.
    :param sticky: whether callers were drawn by lot, who then stay with their version, and not requests.
    :param classes: what both versions answer; ``None`` for numbers.
    :raises ValueError: the metric is no mean of losses.
    :raises SchemaMismatchError: no label is one that the versions answer.
    """
    metric = resolve_metric(quality.metric)
    losses_by_row = metric.losses
    if losses_by_row is None or metric.needs_probabilities:
        raise ValueError(
            f"{metric.name} is no mean of losses row by row: give a metric such as mae, rmse or accuracy for a rollout"
        )
    if answered is None or answered.height == 0:
        return PairedLosses() if mirrored else (Losses(), Losses())

    known = _with_labels(quality, answered, (stable, new))

    def labelled(version: str) -> tuple[pl.DataFrame, int]:
        """Give the rows that can be graded, and how many others have a label: one infinite loss would hide all others."""
        rows = known.filter(known["model_version"] == version)
        valid = valid_values(rows[quality.target].to_numpy()) & valid_values(rows["prediction"].to_numpy())
        return rows.filter(valid), int(np.sum(~valid))

    def losses(rows: pl.DataFrame, answers: str = "prediction") -> NDArray[np.float64]:
        truth = as_trained(rows[quality.target], classes).to_numpy()
        graded = Graded(truth, Predictions(values=rows[answers].to_numpy()))
        return np.asarray(losses_by_row(graded), dtype=np.float64)

    (before, stable_left_out), (after, new_left_out) = labelled(stable), labelled(new)
    if not mirrored:
        one, other = (
            losses_of(losses(rows), _drawn(rows, sticky=sticky).to_list()) if rows.height else Losses()
            for rows in (before, after)
        )
        return replace(one, left_out=stable_left_out), replace(other, left_out=new_left_out)
    both = before.join(
        after.select("prediction_id", "request_id", new_prediction="prediction"),
        on=["prediction_id", "request_id"],
        maintain_order="left",
    )
    pairs = (
        paired_losses_of(losses(both), losses(both, "new_prediction"), both["request_id"].to_list())
        if both.height
        else PairedLosses()
    )
    return replace(
        pairs,
        stable=replace(pairs.stable, left_out=stable_left_out),
        new=replace(pairs.new, left_out=new_left_out),
    )


def _with_labels(quality: QualitySpec, answered: pl.DataFrame, versions: Sequence[str]) -> pl.DataFrame:
    """Give the newest answer of each version to each row that has a label, joined with it: labels are read once for all."""
    import polars as pl

    rows = pl.concat(
        [newest_answers(answered.filter(answered["model_version"] == version)) for version in versions]
    )
    joined = join_labels(rows, labels=quality.labels, id_column=quality.id_column, target=quality.target)
    return joined.drop_nulls(quality.target)


def estimated_losses(
    read: Callable[[], pl.DataFrame | None],
    *,
    stable: Copy,
    new: Copy,
    sticky: bool,
    trust: Trust | None,
    grades: Sequence[WindowGrade],
    metric: str | None,
) -> tuple[tuple[EstimatedLoss, EstimatedLoss] | None, str]:
    """Estimate both versions' mean losses on what they answered, each by what its own package knows about estimating.

    :param read: gives rows of the inference log; asked only when both can be estimated.
    :param stable: version that was served before.
    :param new: version that is to replace it.
    :param sticky: whether callers were drawn by lot, or requests; one row of each counts.
    :param trust: keys the packages must be signed with.
    :param grades: performance checks of the model, oldest first: who estimated badly is not asked.
    :param metric: the one that is wanted; ``None``: what both were trained for.
    :returns: the estimates, and why there are none.
    :raises ArtifactIntegrityError: a copy is damaged.
    """
    estimators: list[_Estimator] = []
    for version in (stable, new):
        estimator, why = _estimator(version, trust, grades, metric)
        if estimator is None:
            return None, f"version {version.model_version}: {why}"
        metric = estimator.metric.name  # one for both
        estimators.append(estimator)
    answered = read()
    if answered is None or answered.height == 0:
        return None, "nothing was answered"
    found: list[EstimatedLoss] = []
    for version, estimator in zip((stable, new), estimators, strict=True):
        rows = answered.filter(answered["model_version"] == version.model_version)
        one, why = _estimated(estimator, _one_of_each(rows, sticky=sticky))
        if one is None:
            return None, f"version {version.model_version}: {why}"
        found.append(one)
    return (found[0], found[1]), ""


class _Estimator(NamedTuple):
    """What a package knows about estimating.

    :param metric: that it estimates.
    :param mean_loss: turns its value into a mean loss.
    :param folds: stretches of held-out rows that its error is known from.
    """

    package: GradingPackage
    metric: Metric
    mean_loss: Callable[[float], float]
    folds: int


def _estimator(
    version: Copy, trust: Trust | None, grades: Sequence[WindowGrade], wanted: str | None
) -> tuple[_Estimator | None, str]:
    package = open_for_grading(version.folder, version.digest, trust=trust)
    estimation = package.estimation
    if estimation is None or estimation.method == "none":
        return None, estimation.reason if estimation else "it was trained before estimates were learned"
    if wanted is not None and estimation.metric != wanted:
        return None, f"it estimates {estimation.metric}, not {wanted}"
    metric = resolve_metric(estimation.metric)
    if metric.mean_loss is None:
        return None, f"{metric.name} is no mean of losses"
    bad = _distrust(grades, version.model_version, metric.name)
    if bad:
        return None, f"its estimates are not used: {bad}"
    return _Estimator(package, metric, metric.mean_loss, max(estimation.folds, 2)), ""


def _estimated(estimator: _Estimator, rows: pl.DataFrame) -> tuple[EstimatedLoss | None, str]:
    guess, why = estimate(estimator.package, estimator.metric, rows)
    if guess is None:
        return None, why
    mean, *ends = (estimator.mean_loss(value) for value in (guess.value, guess.low, guess.high))
    # The interval may end where the metric does; its other half is whole.
    reach = max(abs(end - mean) for end in ends)
    deviation = reach / t_quantile(0.5 + COVERAGE / 2.0, estimator.folds - 1)
    return (
        EstimatedLoss(
            metric=estimator.metric.name,
            count=rows.height,
            mean=mean,
            deviation=deviation,
            folds=estimator.folds,
        ),
        "",
    )


def _drawn(rows: pl.DataFrame, *, sticky: bool) -> pl.Series:
    """Name what each row was drawn with: its request, or its caller. A request of nobody in particular is drawn by itself."""
    import polars as pl

    caller = pl.when(pl.col("caller") != "").then("caller")
    return rows.select(pl.coalesce(caller, "request_id") if sticky else "request_id").to_series()


def _one_of_each(rows: pl.DataFrame, *, sticky: bool) -> pl.DataFrame:
    """Keep one row of what was drawn together: rows of a request are alike, and would pass for more than they are."""
    drawn = _drawn(rows, sticky=sticky).fill_null("")
    return rows.filter(drawn.is_first_distinct() | (drawn == ""))


def _distrust(grades: Sequence[WindowGrade], model_version: str, metric: str) -> str:
    """Say why a version's estimates may not be acted on; empty when they may."""
    measured = [
        grade.entry.payload for grade in grades if grade.measured and grade.entry.payload["metric"] == metric
    ]
    past = [
        GradedEstimate(
            value=payload["estimated_value"],
            low=payload["estimate_interval"][0],
            high=payload["estimate_interval"][1],
            realized=payload["value"],
        )
        for payload in measured
        if payload["model_version"] == model_version
        and payload.get("estimated_value") is not None
        and payload.get("estimate_interval") is not None
    ]
    record = judge_estimator(past, concept_drift=bool(measured) and bool(measured[-1]["degraded"]))
    return "" if record.trusted else record.reason
