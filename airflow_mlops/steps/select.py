"""Select: of several trained candidates keep the one that did best in cross-validation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from airflow_mlops.core.codec import to_dict
from airflow_mlops.core.comparison.metrics import resolve_metric
from airflow_mlops.core.model.tuning import best_of
from airflow_mlops.integrations.mlflow import Registry
from airflow_mlops.steps.base import Step
from airflow_mlops.steps.training.spec import TrainResult

if TYPE_CHECKING:
    from collections.abc import Sequence

    from airflow_mlops.services import Services


@dataclass(frozen=True, kw_only=True, slots=True)
class SelectSpec:
    """What to choose from.

    :param trainings: results of trainings on the same rows with the same metric, each cross-validated.
    """

    trainings: tuple[TrainResult, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class SelectResult:
    """The candidate that is kept.

    :param training: its training result, what an evaluation takes.
    :param reason: one sentence.
    """

    training: TrainResult
    reason: str


def run(spec: SelectSpec, services: Services) -> SelectResult:
    """Choose by the cross-validated metric, and mark the runs, so that a person sees in MLflow which one it was.

    The held-out rows are not looked at: the chosen one is judged on them afterwards, and a choice by them would
    make it look better than it is.

    :raises ValueError: nothing to choose from, different models, rows or metrics, or a training without cross-validation.
    """
    _require_same_rows(spec.trainings)
    metric = resolve_metric(spec.trainings[0].metric) if spec.trainings else resolve_metric("mae")
    results = [to_dict(training) for training in spec.trainings]
    chosen = spec.trainings[best_of(results, greater_is_better=metric.greater_is_better)]
    registry = Registry.connect(services)
    for training in spec.trainings:
        selected = str(training.run_id == chosen.run_id).lower()
        registry.tag_run(training.run_id, "airflow_mlops.selected", selected)
    ranked = sorted(
        spec.trainings, key=lambda one: one.validation_value or 0.0, reverse=metric.greater_is_better
    )
    scores = ", ".join(f"{_name(one)} {one.validation_value:.4g}" for one in ranked)
    return SelectResult(
        training=chosen,
        reason=f"{_name(chosen)} has the best cross-validated {metric.name.upper()} of {len(ranked)}: {scores}",
    )


def _require_same_rows(trainings: Sequence[TrainResult]) -> None:
    """Refuse scores of different rows, also those of other folds: the better one may only have had the easier ones.

    A table that grew meanwhile is no other one, as long as the windows hold as many rows.
    """
    for one in trainings[1:]:
        apart = [
            (ours, theirs)
            for ours, theirs in zip(_learned(trainings[0]), _learned(one), strict=True)
            if ours != theirs and ours is not None and theirs is not None
        ]
        if apart:
            raise ValueError(
                f"runs {trainings[0].run_id} and {one.run_id} can't be compared, as one is of {apart[0][0]} and the other of "
                f"{apart[0][1]}: give all candidates the same model_name, dataset version, window and number of folds"
            )


def _learned(training: TrainResult) -> tuple[str | None, ...]:
    """Say of what rows a score is; ``None`` where that was not noted."""
    return (
        f"model {training.model_name!r}",
        f"table {training.dataset.uri}",
        f"{training.training_rows} training rows in {training.training}",
        f"{training.holdout_rows} held-out rows in {training.holdout}",
        f"{training.folds} folds" if training.folds is not None else None,
    )


def _name(training: TrainResult) -> str:
    return training.estimator.replace(":", ".").rpartition(".")[2]


STEP = Step(name="select", spec=SelectSpec, result=SelectResult, run=run)
