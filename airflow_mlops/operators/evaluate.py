"""Evaluate a challenger against the champion."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any, Literal

from airflow.sdk.exceptions import AirflowSkipException

from airflow_mlops.exceptions import PromotionRejectedError
from airflow_mlops.links import MLflowRunLink
from airflow_mlops.operators.base import StepOperator, dataset_ref, names, optional, optional_number

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from airflow.sdk import Context


class EvaluateModelOperator(StepOperator):
    """Compare challenger, champion and simple guesses on the rows the training held out, and judge.

    Where a retraining was decided because the predecessors of the model beat the champion, that is its verdict, once it answers
    in a process of its own: it has learned from all rows, and none is left to test it on.

    :param training: what the training task returned. (templated)
    :param as_of: judge on the training's table as it was at another time: a version number or an instant such as
        ``2024-03-01T00:00:00Z``; default the version it was trained on. (templated)
    :param metric: name of a built-in metric, or import path of one; default the training's. It decides. (templated)
    :param metrics: further metrics to report; default the usual ones of the task; these, slices and groups may also be one
        comma-separated text. (templated)
    :param last_value: whether the target of the row before is a guess to beat as well; for one time series.
    :param minimum_uplift: relative improvement the challenger has to show, 0.01 is one percent; ``None`` asks for none.
        (templated)
    :param significance: largest p-value, the rate at which an equally good challenger would pass; ``None`` tests nothing.
        With neither threshold there is no verdict. (templated)
    :param slices: columns whose parts may not get significantly worse; default the model's inputs, ``[]`` none. (templated)
    :param slice_policy: fields of :class:`~airflow_mlops.core.comparison.slices.SlicePolicy` that differ from its defaults.
    :param groups: columns with groups of people whose selection and error rates are compared. (templated)
    :param maximum_group_difference: largest difference between their rates; default: reported only. (templated)
    :param minimum_group_rows: a group of fewer rows is not measured, nor is a rate that is a share of fewer, such as the true
        positive rate where few are truly positive; with ``maximum_group_difference`` that is no verdict. (templated)
    :param artifact_limits: fields of :class:`~airflow_mlops.core.comparison.artifact.ArtifactLimits` that differ from its defaults.
    :param champion_alias: alias of the version to beat, such as ``shadow``; the evaluation promotes to this alias only.
        (templated)
    :param decision_key: retraining decision that is being carried out; a rejection closes it, and one that was taken on
        predecessors is the verdict. (templated)
    :param on_reject: ``fail`` the task (a gate), or ``skip`` what follows: not every retraining has to win.
    """

    step = "evaluate"
    needs = frozenset({"mlflow", "ledger"})
    operator_extra_links = (MLflowRunLink(),)
    template_fields: Sequence[str] = (
        "training",
        "as_of",
        "metric",
        "metrics",
        "minimum_uplift",
        "significance",
        "slices",
        "groups",
        "maximum_group_difference",
        "minimum_group_rows",
        "champion_alias",
        "decision_key",
    )

    def __init__(
        self,
        *,
        training: Any,
        as_of: str | int | None = None,
        metric: str | None = None,
        metrics: str | Sequence[str] | None = None,
        last_value: bool = False,
        minimum_uplift: float | str | None = 0.0,
        significance: float | str | None = 0.05,
        slices: str | Sequence[str] | None = None,
        slice_policy: Mapping[str, Any] | None = None,
        groups: str | Sequence[str] = (),
        maximum_group_difference: float | str | None = None,
        minimum_group_rows: int | str = 50,
        artifact_limits: Mapping[str, Any] | None = None,
        champion_alias: str = "champion",
        decision_key: str | None = None,
        on_reject: Literal["fail", "skip"] = "fail",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.training = training
        self.as_of = as_of
        self.metric = metric
        self.metrics = metrics
        self.last_value = last_value
        self.minimum_uplift = minimum_uplift
        self.significance = significance
        self.slices = slices
        self.slice_policy = slice_policy
        self.groups = groups
        self.maximum_group_difference = maximum_group_difference
        self.minimum_group_rows = minimum_group_rows
        self.artifact_limits = artifact_limits
        self.champion_alias = champion_alias
        self.decision_key = decision_key
        self.on_reject = on_reject

    def build_spec(self, context: Context) -> dict[str, Any]:
        """Give an :class:`~airflow_mlops.steps.evaluate.EvaluateSpec`."""
        training = self.training
        asked = dataset_ref(training["dataset"]["uri"], self.as_of)
        return {
            "dataset": asked if isinstance(asked, dict) else training["dataset"],
            "model_name": training["model_name"],
            "run_id": training["run_id"],
            "package_digest": training["package_digest"],
            "twin_digest": training.get("twin_digest"),  # a training of an older release has none
            "window": training["holdout"],
            "time_column": training["dataset"]["time_column"],
            "metric": self.metric or training["metric"],
            "metrics": _optional_names(self.metrics),
            "last_value": self.last_value,
            "slices": _optional_names(self.slices),
            "champion_alias": self.champion_alias,
            "decision_key": optional(self.decision_key),
            "groups": names(self.groups),
            "policy": {
                "minimum_uplift": optional_number(self.minimum_uplift),
                "significance": optional_number(self.significance),
                "maximum_group_difference": optional_number(self.maximum_group_difference),
                "minimum_group_rows": int(self.minimum_group_rows),
            },
            "slice_policy": dict(self.slice_policy or {}),
            "artifact_limits": dict(self.artifact_limits or {}),
        }

    def record(self, result: dict[str, Any], context: Context) -> None:
        """Write the verdict to the ledger; a rejection also closes the retraining decision."""
        from airflow_mlops.ledger import EntryKind

        self.note_link(MLflowRunLink, result["run_url"])
        self.write_entry(
            context,
            kind=EntryKind.EVALUATION,
            key=f"{result['run_id']}|{result['champion_version']}|{result['verdict']}|{_digest(self.build_spec(context))}",
            model_name=result["model_name"],
            window=result["window"],
            subject=result["run_id"],
            summary=f"verdict on the challenger of {result['model_name']}: {result['verdict']}: {result['reason']}",
            payload=result,
        )
        decision_key = optional(self.decision_key)
        if result["verdict"] != "promote" and decision_key is not None:
            self.write_entry(
                context,
                kind=EntryKind.RETRAINING_OUTCOME,
                key=decision_key,
                model_name=result["model_name"],
                window=None,
                subject=result["run_id"],
                summary=f"the retraining of {result['model_name']} ended without a new champion: {result['reason']}",
                payload={
                    "outcome": str(result["verdict"]),
                    "reason": result["reason"],
                    "run_id": result["run_id"],
                },
            )

    def decide(self, result: dict[str, Any], context: Context) -> dict[str, Any]:
        """Let the challenger through, or stop.

        :raises PromotionRejectedError: it did not earn the place and ``on_reject`` is ``fail``.
        """
        if result["verdict"] == "promote":
            return result
        if self.on_reject == "skip":
            raise AirflowSkipException(f"{result['verdict']}: {result['reason']}; the champion stays")
        raise PromotionRejectedError(
            f"{result['verdict']}: {result['reason']}; the champion stays",
            evidence={"checks": result["checks"], "evaluation": result["evaluation_url"]},
        )


def _optional_names(value: str | Sequence[str] | None) -> list[str] | None:
    found = optional(value)
    return None if found is None else names(found)


def _digest(spec: dict[str, Any]) -> str:
    """Name what was asked: asked otherwise, or of a newer dataset, it is another verdict."""
    return hashlib.sha256(json.dumps(spec, sort_keys=True, default=str).encode()).hexdigest()[:16]
