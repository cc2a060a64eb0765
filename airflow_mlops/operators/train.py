"""Train a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from airflow_mlops.links import MLflowRunLink
from airflow_mlops.operators.base import StepOperator, names, optional_number, part_of, window_spec

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from airflow.sdk import Context


class TrainModelOperator(StepOperator):
    """Fit a scikit-learn estimator with its preprocessing, log the run to MLflow, package it for serving.

    The newest rows are held out. The model is served in ONNX when that gives the same predictions on them, otherwise in its
    scikit-learn form, and the run says why. The same arguments on the same data find the finished run.

    :param dataset: what an ingest or validation task returned, a dataset version, or a table URI for its newest. (templated)
    :param model_name: name of the model to be, and of the MLflow experiment. (templated)
    :param estimator: import path of an estimator or of a factory function. (templated)
    :param estimator_params: its arguments. (templated)
    :param target: column to predict. (templated)
    :param numeric: numeric input columns. (templated)
    :param categorical: categorical input columns. (templated)
    :param time_column: orders the rows. (templated)
    :param window_start: first instant of the rows to use; default the run's data interval. (templated)
    :param window_end: first instant after them. (templated)
    :param half_life_days: weight of a row halves with this age in days; empty: equal weights. (templated)
    :param holdout_share: newest share of the rows that is held out, in ``(0, 0.5]``. (templated)
    :param metric: name of a built-in metric, or import path of one. (templated)
    :param seed: random state. (templated)
    """

    step = "train"
    needs = frozenset({"mlflow"})
    operator_extra_links = (MLflowRunLink(),)
    template_fields: Sequence[str] = (
        "dataset",
        "model_name",
        "estimator",
        "estimator_params",
        "target",
        "numeric",
        "categorical",
        "time_column",
        "window_start",
        "window_end",
        "half_life_days",
        "holdout_share",
        "metric",
        "seed",
    )

    def __init__(
        self,
        *,
        dataset: Any,
        model_name: str,
        estimator: str,
        estimator_params: Mapping[str, Any] | None = None,
        target: str,
        numeric: Sequence[str] | str,
        categorical: Sequence[str] | str = (),
        time_column: str,
        window_start: str | None = "{{ data_interval_start }}",
        window_end: str | None = "{{ data_interval_end }}",
        half_life_days: float | str | None = None,
        holdout_share: float | str = 0.2,
        metric: str = "mae",
        seed: int | str = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.dataset = dataset
        self.model_name = model_name
        self.estimator = estimator
        self.estimator_params = estimator_params
        self.target = target
        self.numeric = numeric
        self.categorical = categorical
        self.time_column = time_column
        self.window_start = window_start
        self.window_end = window_end
        self.half_life_days = half_life_days
        self.holdout_share = holdout_share
        self.metric = metric
        self.seed = seed

    def build_spec(self, context: Context) -> dict[str, Any]:
        """Give a :class:`~airflow_mlops.steps.train.TrainSpec`."""
        return {
            "dataset": part_of(self.dataset, "dataset"),
            "model_name": self.model_name,
            "estimator": self.estimator,
            "estimator_params": dict(self.estimator_params or {}),
            "target": self.target,
            "numeric": names(self.numeric),
            "categorical": names(self.categorical),
            "time_column": self.time_column,
            "window": window_spec(self.window_start, self.window_end),
            "half_life_days": optional_number(self.half_life_days),
            "holdout_share": float(self.holdout_share),
            "metric": self.metric,
            "seed": int(self.seed),
        }

    def record(self, result: dict[str, Any], context: Context) -> None:
        """Write the run to the ledger and link to it."""
        from airflow_mlops.ledger import EntryKind

        self.note_link(MLflowRunLink, result["run_url"])
        reused = " (found finished)" if result["reused"] else ""
        self.write_entry(
            context,
            kind=EntryKind.TRAINING,
            key=result["run_id"],
            model_name=result["model_name"],
            window=result["training"],
            subject=result["run_id"],
            summary=f"trained {result['model_name']} on {result['training_rows']} rows{reused}: {result['metric'].upper()} "
            f"{result['metric_value']:.4g} on {result['holdout_rows']} held-out rows; served as {result['serving_form']}",
            payload=result,
        )
