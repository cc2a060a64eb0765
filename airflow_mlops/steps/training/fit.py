"""Search, fit and measure: from rows and candidates to a fitted pipeline with its score."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, NamedTuple

from airflow_mlops.core.comparison.metrics import (
    DEFAULT_METRICS,
    evaluate_metric,
    require_decisive,
    resolve_metric,
)
from airflow_mlops.core.comparison.number_metrics import require_nonzero
from airflow_mlops.core.model.tuning import Candidate, SearchResult, time_ordered_folds
from airflow_mlops.exceptions import InsufficientDataError, SchemaMismatchError
from airflow_mlops.integrations import halving, optuna, sklearn
from airflow_mlops.ledger.studies import making_studies
from airflow_mlops.steps.training.model_package import FittedModel, require_safe_form
from airflow_mlops.steps.training.record import TrialChart
from airflow_mlops.steps.training.rows import Split, row_weights

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd
    import polars as pl
    from numpy.typing import NDArray

    from airflow_mlops.core.comparison.metric import Metric
    from airflow_mlops.core.data.dataset import DatasetVersion
    from airflow_mlops.core.model.columns import ColumnRoles
    from airflow_mlops.integrations.mlflow import Registry
    from airflow_mlops.services import Services
    from airflow_mlops.steps.training.record import Clock
    from airflow_mlops.steps.training.spec import TrainSpec

log = logging.getLogger(__name__)

#: Labels an error names.
_NAMED = 5


class Work(NamedTuple):
    """What one training has at hand."""

    spec: TrainSpec
    columns: ColumnRoles
    metric: Metric
    dataset: DatasetVersion
    split: Split
    registry: Registry
    experiment_id: str
    run_id: str
    key: str


class Made(NamedTuple):
    """What a training found.

    :param winner: what was fitted.
    :param search: how it was chosen; ``None`` without a search.
    :param model: the model.
    :param split: the rows it learned from and was measured on.
    :param twin: its twin that was measured, where the model was fitted again on all rows.
    """

    winner: Candidate
    search: SearchResult | None
    model: FittedModel
    split: Split
    twin: FittedModel | None = None


def choose_metric(spec: TrainSpec, columns: ColumnRoles, target: pl.Series) -> Metric:
    """Find the metric, and see before anything is fitted that it, the target and the estimators fit together.

    :raises InsufficientDataError: a classification where all rows have the same label, or targets of zero to divide by.
    :raises SchemaMismatchError: a regression of what is no number.
    :raises UnsafeModelError: an estimator that could be stored in no form that is safe to load, where pickles are not allowed.
    :raises ValueError: classifiers beside regressors, or a metric that can't measure their answers.
    """
    estimators = [_build(spec, columns, candidate.example()) for candidate in spec.to_try()]
    labels = _predict_labels(spec, estimators)
    numbers = target.dtype.is_numeric()
    if not labels and not numbers and str(target.dtype) != "Boolean":
        raise SchemaMismatchError(
            f"target {spec.target!r} holds {target.dtype}, and {spec.to_try()[0].name} predicts numbers; give a classifier"
        )
    if labels:
        _require_labels(spec.target, target.to_numpy(), "training rows", remedy="train on a longer window")
    probabilities = all(sklearn.gives_probabilities(estimator) for estimator in estimators)
    default = "mae" if not labels else "log_loss" if probabilities else "accuracy"
    metric = resolve_metric(spec.metric or default)
    if not labels and metric.name in DEFAULT_METRICS["classification"]:
        raise ValueError(
            f"{metric.name} measures labels, and {spec.to_try()[0].name} predicts numbers: choose mae, rmse or another metric "
            "of numbers, or give a classifier"
        )
    if not spec.allow_pickle:
        for estimator in estimators:
            require_safe_form(estimator)
    of_numbers = {*DEFAULT_METRICS["regression"]} | {f"quantile_loss@{metric.name.partition('@')[2]}"}
    if labels and not numbers and metric.name in of_numbers:
        raise ValueError(
            f"{metric.name} measures numbers, and {spec.target!r} holds {target.dtype}: choose {default}, or leave metric out"
        )
    if labels:
        _note_undecisive(metric, target.n_unique())
    if metric.name == "mape":
        require_nonzero(repr(spec.target), target.to_numpy())
    if metric.needs_probabilities and not probabilities:
        raise ValueError(
            f"{metric.name} needs probabilities, and not every estimator here gives them: choose accuracy, f1 or another "
            "metric of labels"
        )
    return metric


def require_measurable(spec: TrainSpec, columns: ColumnRoles, metric: Metric, split: Split) -> None:
    """See before a search is paid for that its winner can be measured on the held-out rows, and fitted again on them.

    :raises InsufficientDataError: held-out rows without a label that is to be ranked, or with a target of zero to divide by.
    :raises ValueError: a model that is fitted again on rows of which some have no sound weight.
    """
    known, held_out = split.training[spec.target], split.holdout[spec.target]
    if metric.name == "mape":
        require_nonzero(f"{spec.target!r} of the held-out rows", held_out.to_numpy())
    if metric.name in {"roc_auc", "pr_auc"}:
        labels, found = sorted({*known.unique(), *held_out.unique()}), {*held_out.unique()}
        ranked = labels[-1:] if metric.name == "pr_auc" and len(labels) == 2 else labels
        absent = [str(label) for label in ranked if label not in found]
        if absent:
            raise InsufficientDataError(
                f"{metric.name} ranks every label, and none of the {len(held_out)} held-out rows has {spec.target!r} "
                f"{', '.join(absent[:_NAMED])}: hold out more rows, or choose log_loss"
            )
    if spec.refit:
        row_weights(split.whole.training, columns, spec.half_life_days)


def _note_undecisive(metric: Metric, label_count: int) -> None:
    """Say before the training is paid for what the evaluation will refuse to decide by."""
    try:
        require_decisive(metric, label_count)
    except ValueError as err:
        log.warning("training: the evaluation will need a metric of its own, as %s", err)


def _predict_labels(spec: TrainSpec, estimators: list[Any]) -> bool:
    """Tell whether they are classifiers; all of them, or none."""
    for candidate, estimator in zip(spec.to_try(), estimators, strict=True):
        if not sklearn.learns_target(sklearn.final_estimator(estimator)[1]):
            raise ValueError(f"{candidate.name} learns no target; give a classifier or a regressor")
    kinds = {sklearn.is_classification(estimator) for estimator in estimators}
    if len(kinds) > 1:
        raise ValueError("some candidates are classifiers and some are not; give either, as the target needs")
    return kinds == {True}


def _require_labels(name: str, labels: NDArray[Any], rows: str, *, remedy: str) -> None:
    """See that there is a difference to learn; what estimators say of one label alone names neither the column nor a way out."""
    found = {str(label) for label in labels}
    if len(found) < 2:
        raise InsufficientDataError(
            f"{name!r} is {found.pop()!r} in all {len(labels)} {rows}, and a classifier needs two labels: {remedy}"
        )


def search_and_fit(work: Work, services: Services, clock: Clock) -> Made:
    """Search, fit and measure."""
    spec, split = work.spec, work.split
    features = sklearn.to_features(split.training, work.columns)
    weights = row_weights(split.training, work.columns, spec.half_life_days)
    clock.lap("prepare_seconds")
    found = _search(work, features, services)
    if found and found.untried:
        log.warning(
            "training: %s was never tried: raise the search's timeout_seconds, or leave candidates out",
            ", ".join(found.untried),
        )
    clock.lap("search_seconds")
    winner = found.best if found else spec.to_try()[0]
    fitted = _fit(work, winner, features, weights)
    made = Made(winner, found, fitted, split)
    if spec.refit:
        made = Made(winner, found, _refit(work, winner, fitted, split.whole), split.whole, twin=fitted)
    clock.lap("fit_seconds")
    return made


def _search(
    work: Work,
    features: pd.DataFrame,
    services: Services,
) -> SearchResult | None:
    """Compare the candidates inside the training rows, oldest to newest."""
    spec, settings = work.spec, work.spec.how_to_search()
    if settings is None:
        return None
    known = work.split.training[spec.target]
    folds = time_ordered_folds(work.split.training[spec.time_column].to_numpy(), settings.folds)
    if sklearn.is_classification(_pipeline(work, spec.to_try()[0].example())):
        _require_labels(
            spec.target,
            known[folds[0][0]].to_numpy(),
            "rows of the first fold",
            remedy="use fewer folds, or a longer window",
        )

    _require_weights(work, [learn for learn, _ in folds])

    def score(candidate: Candidate, learn: NDArray[Any], check: NDArray[Any]) -> float:
        weights = row_weights(work.split.training[learn], work.columns, spec.half_life_days)
        pipeline = _pipeline(work, candidate)
        target = sklearn.to_target(known, pipeline)  # as this one learns it: candidates differ in that
        sklearn.fit(pipeline, features.iloc[learn], target[learn], weights)
        predictions = sklearn.predict(pipeline, features.iloc[check])
        return evaluate_metric(work.metric, target=target[check], prediction=predictions).value

    tell = TrialChart(work.registry, work.run_id, work.metric.name).tell
    if settings.method == "halving":
        each = max(1, settings.trials // len(spec.to_try()))
        return halving.search(
            [sklearn.draw(one, each, spec.seed) if one.space else [one] for one in spec.to_try()],
            settings,
            score,
            folds=folds,
            greater_is_better=work.metric.greater_is_better,
            on_trial=tell,
        )
    return optuna.search(
        spec.to_try(),
        settings,
        lambda candidate, fold: score(candidate, *folds[fold]),
        greater_is_better=work.metric.greater_is_better,
        study_name=work.key,
        storage_url=studies_storage(services.ledger_url),
        seed=spec.seed,
        on_trial=tell,
    )


def studies_storage(ledger_url: str | None) -> str | None:
    """Give where trials are kept, with the tables made: candidates that are mapped tasks begin at once."""
    with making_studies(ledger_url) as storage_url:
        if storage_url is not None:
            optuna.make_tables(storage_url)
    return storage_url


def _require_weights(work: Work, folds: Sequence[NDArray[Any]]) -> None:
    """See that each fold has a row that counts; the weights of all rows together are sound."""
    training, columns = work.split.training, work.columns
    for number, learn in enumerate(folds, start=1):
        if columns.weight is not None and not training[columns.weight][learn].sum() > 0:
            until: Any = training[columns.time][learn].max()
            raise ValueError(
                f"weight column {columns.weight!r} is zero in all {len(learn)} rows that fold {number} of {len(folds)} learns from, "
                f"until {until:%Y-%m-%d %H:%M}: use fewer folds, or begin the window later"
            )


def _fit(
    work: Work,
    candidate: Candidate,
    features: pd.DataFrame,
    weights: NDArray[Any] | None,
) -> FittedModel:
    """Fit on all training rows and score on the held-out ones."""
    pipeline = _pipeline(work, candidate)
    target = sklearn.to_target(work.split.training[work.spec.target], pipeline)
    sklearn.fit(pipeline, features, target, weights)
    log.info("training: fitted %s on %d rows", candidate.name, len(features))
    holdout = sklearn.to_features(work.split.holdout, work.columns)
    unseen = sklearn.predict(pipeline, holdout)
    score = evaluate_metric(
        work.metric, target=work.split.holdout[work.spec.target].to_numpy(), prediction=unseen
    )
    return FittedModel(pipeline=pipeline, features=holdout, unseen=unseen, score=score)


def _refit(work: Work, candidate: Candidate, measured: FittedModel, split: Split) -> FittedModel:
    """Fit on all rows; the score stays that of the twin that had not seen the newest ones."""
    pipeline = _pipeline(work, candidate)
    features = sklearn.to_features(split.training, work.columns)
    target = sklearn.to_target(split.training[work.spec.target], pipeline)
    sklearn.fit(
        pipeline, features, target, row_weights(split.training, work.columns, work.spec.half_life_days)
    )
    log.info("training: fitted %s again on all %d rows", candidate.name, len(features))
    return measured._replace(pipeline=pipeline)


def _pipeline(work: Work, candidate: Candidate) -> Any:
    return _build(work.spec, work.columns, candidate)


def _build(spec: TrainSpec, columns: ColumnRoles, candidate: Candidate) -> Any:
    return sklearn.build_pipeline(
        candidate,
        columns,
        preprocessing=spec.preprocessing,
        selection=spec.feature_selection,
        seed=spec.seed,
    )
