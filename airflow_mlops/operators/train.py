"""Train a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic_core import PydanticSerializationError, to_jsonable_python

from airflow_mlops.links import MLflowRunLink
from airflow_mlops.operators.base import (
    StepOperator,
    dataset_ref,
    names,
    optional,
    optional_number,
    optional_text,
    part_of,
)
from airflow_mlops.run_windows import RUN_WINDOW, window_spec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from airflow.sdk import Context


class TrainModelOperator(StepOperator):
    """Fit a scikit-learn estimator with its preprocessing, log the run to MLflow, package it for serving.

    The newest rows are held out. The model is served in ONNX when that gives the same answers, also on missing,
    unseen and extreme values; otherwise in its scikit-learn form, and the run says why. The same arguments on the same
    data find the finished run, and a search that was interrupted goes on.

    :param dataset: what an ingest or validation task returned, a dataset version, or a table URI for its newest. (templated)
    :param as_of: with a table URI, read it as it was: a version number or an instant such as ``2024-03-01T00:00:00Z``. (templated)
    :param model_name: name of the model to be, and of the MLflow experiment. (templated)
    :param estimator: import path of an estimator or of a factory function; or give ``candidates``. (templated)
    :param estimator_params: its arguments; ``a__b`` reaches into a nested estimator. Numbers, texts, lists and the like; for
        an object name a factory function in ``estimator``. (templated)
    :param candidates: estimators to try, ``{"estimator": .., "params": .., "space": ..}``, the fields of
        a :class:`~airflow_mlops.core.model.tuning.Candidate`. (templated)
    :param search: how candidates are compared, the fields of a :class:`~airflow_mlops.core.model.tuning.Search`; default with
        more than one or with a space: 20 trials of Optuna on 3 time-ordered folds. (templated)
    :param target: column to predict. (templated)
    :param numeric: inputs that are numbers. (templated)
    :param categorical: inputs that are one of some values. (templated)
    :param text: inputs that are free text. (templated)
    :param time_column: orders the rows. (templated)
    :param id_column: names the row; never an input. (templated)
    :param weight_column: how much a row counts. (templated)
    :param preprocessing: ``auto`` (default), ``codes``, ``scaled`` or ``none``. (templated)
    :param feature_selection: ``{"method": "rfe" | "l1" | "importance", "keep": number}``; default keeps all. (templated)
    :param window_start: first instant of the rows to use; default the run's data interval. (templated)
    :param window_end: first instant after them. (templated)
    :param plan: what a retraining decision asks for, in place of the window and the arguments from ``rows`` to ``recipe``: what
        the deciding task returned, or an item of :func:`~airflow_mlops.ledger.wanted_challengers`. (templated)
    :param rows: ``window`` (default): the rows in it; ``all`` before its end; ``trailing`` days before its end;
        ``since_change``: since the world last changed and a model of its rows alone was promoted; else ``all``. (templated)
    :param trailing_days: for ``trailing``. (templated)
    :param half_life_days: weight of a row halves with this age in days; empty: equal weights. (templated)
    :param holdout_share: newest share of the rows that is held out, in ``(0, 0.5]``. (templated)
    :param holdout_start: first instant of the rows that are held out, instead of a share. (templated)
    :param refit: fit once more on all rows and package that model; its twin that was measured says what to expect. Such a
        model can't be evaluated on these rows any more; its recipe is, one window later. (templated)
    :param keep_twin: with ``refit``: package the measured twin as well, so that an evaluation can hold it against the champion.
        (templated)
    :param mlflow_copy: store the pipeline for MLflow's own loaders as well (default). (templated)
    :param recipe: name of this way of making a model, for ``CompareChallengersOperator``; retrainings are decided among ``recent``
        and ``all``, others are compared only. (templated)
    :param metric: name of a built-in metric, or import path of one; default ``mae`` for numbers, ``log_loss`` for labels,
        ``accuracy`` where the estimator gives no probabilities. (templated)
    :param parity: how far the ONNX form may be from the scikit-learn form, the fields of
        a :class:`~airflow_mlops.core.model.parity.ParityLimits`. (templated)
    :param quantize: ``float16`` or ``int8``: a smaller ONNX form, if that stays within ``parity``. (templated)
    :param allow_pickle: store a model that has neither an ONNX form nor a skops form that a service would load as a pickle. A
        pickle is code and runs where it is loaded: that takes a signature by a trusted key, and the model's name in
        ``AIRFLOW_MLOPS_PICKLED_MODELS`` of every process that loads it. Default: such a model is refused. (templated)
    :param background_rows: training rows to store in the package, up to 100, so that the service can say what each input of a
        request contributed to the answer (``POST /predict/explain``). Default none: these are rows of your data, readable by
        whoever may read the package. (templated)
    :param private_columns: inputs of which no row is stored as an example; a list, or one text with commas. Five held-out rows are in each
        package, one in the version's description and model card: there they have made-up values. (templated)
    :param seed: random state. (templated)
    """

    step = "train"
    needs = frozenset({"mlflow", "ledger"})
    operator_extra_links = (MLflowRunLink(),)
    template_fields: Sequence[str] = (
        "dataset",
        "model_name",
        "estimator",
        "estimator_params",
        "candidates",
        "search",
        "target",
        "numeric",
        "categorical",
        "text",
        "time_column",
        "id_column",
        "weight_column",
        "preprocessing",
        "feature_selection",
        "window_start",
        "window_end",
        "plan",
        "rows",
        "trailing_days",
        "half_life_days",
        "holdout_share",
        "holdout_start",
        "refit",
        "keep_twin",
        "mlflow_copy",
        "recipe",
        "metric",
        "parity",
        "quantize",
        "allow_pickle",
        "background_rows",
        "private_columns",
        "seed",
        "as_of",
    )

    def __init__(
        self,
        *,
        dataset: Any,
        model_name: str,
        estimator: str | None = None,
        estimator_params: Mapping[str, Any] | None = None,
        candidates: Sequence[Mapping[str, Any]] = (),
        search: Mapping[str, Any] | None = None,
        target: str,
        numeric: Sequence[str] | str = (),
        categorical: Sequence[str] | str = (),
        text: Sequence[str] | str = (),
        time_column: str,
        id_column: str | None = None,
        weight_column: str | None = None,
        preprocessing: str = "auto",
        feature_selection: Mapping[str, Any] | None = None,
        window_start: str | None = RUN_WINDOW[0],
        window_end: str | None = RUN_WINDOW[1],
        plan: Any = None,
        rows: str = "window",
        trailing_days: float | str | None = None,
        half_life_days: float | str | None = None,
        holdout_share: float | str = 0.2,
        holdout_start: str | None = None,
        refit: bool | str = False,
        keep_twin: bool | str = False,
        mlflow_copy: bool | str = True,
        recipe: str | None = None,
        metric: str | None = None,
        parity: Mapping[str, Any] | None = None,
        quantize: str | None = None,
        allow_pickle: bool | str = False,
        background_rows: int | str = 0,
        private_columns: str | Sequence[str] = (),
        seed: int | str = 0,
        as_of: str | int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.as_of = as_of
        self.dataset = dataset
        self.model_name = model_name
        self.estimator = estimator
        self.estimator_params = estimator_params
        self.candidates = candidates
        self.search = search
        self.target = target
        self.numeric = numeric
        self.categorical = categorical
        self.text = text
        self.time_column = time_column
        self.id_column = id_column
        self.weight_column = weight_column
        self.preprocessing = preprocessing
        self.feature_selection = feature_selection
        self.window_start = window_start
        self.window_end = window_end
        self.plan = plan
        self.rows = rows
        self.trailing_days = trailing_days
        self.half_life_days = half_life_days
        self.holdout_share = holdout_share
        self.holdout_start = holdout_start
        self.refit = refit
        self.keep_twin = keep_twin
        self.mlflow_copy = mlflow_copy
        self.recipe = recipe
        self.metric = metric
        self.parity = parity
        self.quantize = quantize
        self.allow_pickle = allow_pickle
        self.background_rows = background_rows
        self.private_columns = private_columns
        self.seed = seed

    def build_spec(self, context: Context) -> dict[str, Any]:
        """Give a :class:`~airflow_mlops.steps.training.spec.TrainSpec`."""
        plan = _plan(self.plan)
        _require_plain(self.estimator_params, "estimator_params")
        for number, candidate in enumerate(self.candidates):
            _require_plain(candidate, f"candidates[{number}]")
        return {
            "dataset": dataset_ref(self.dataset, self.as_of),
            "model_name": self.model_name,
            "estimator": optional(self.estimator),
            "estimator_params": dict(self.estimator_params or {}),
            "candidates": [dict(candidate) for candidate in self.candidates],
            "search": dict(self.search) if self.search else None,
            "target": self.target,
            "numeric": names(self.numeric),
            "categorical": names(self.categorical),
            "text": names(self.text),
            "time_column": self.time_column,
            "id_column": optional(self.id_column),
            "weight_column": optional(self.weight_column),
            "preprocessing": self.preprocessing,
            "feature_selection": dict(self.feature_selection) if self.feature_selection else None,
            "window": window_spec(self.window_start, self.window_end, context) if not plan else None,
            "rows": self.rows,
            "trailing_days": optional_number(self.trailing_days),
            "half_life_days": optional_number(self.half_life_days),
            "holdout_share": float(self.holdout_share),
            "holdout_start": optional_text(self.holdout_start),
            "refit": str(self.refit).lower() == "true",
            "keep_twin": str(self.keep_twin).lower() == "true",
            "mlflow_copy": str(self.mlflow_copy).lower() == "true",
            "recipe": None if self.recipe in {None, "", "None"} else self.recipe,
            "metric": optional(self.metric),
            "parity": dict(self.parity or {}),
            "quantize": optional(self.quantize),
            "allow_pickle": str(self.allow_pickle).lower() == "true",
            "background_rows": int(self.background_rows),
            "private_columns": names(self.private_columns),
            "seed": int(self.seed),
            "dag_code": _dag_code(context),
            **plan,
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


def _dag_code(context: Context) -> dict[str, str]:
    """Say which version of the Dag file trains: it names the estimator, the columns and the rows."""
    from airflow_mlops.steps.training.code_version import dag_code_version

    file = getattr(context.get("dag"), "fileloc", None)
    bundle = getattr(context.get("ti"), "bundle_instance", None)
    return dag_code_version(Path(file) if file else None, getattr(bundle, "version", None))


def _require_plain(value: Any, name: str) -> None:
    """See that parameters can be handed to the process that trains.

    :raises ValueError: naming the first that is an object.
    """
    if isinstance(value, Mapping):
        for key, item in value.items():
            _require_plain(item, f"{name}[{key!r}]")
    elif isinstance(value, list | tuple | set | frozenset):
        for number, item in enumerate(value):
            _require_plain(item, f"{name}[{number}]")
    else:
        try:
            to_jsonable_python(value)
        except PydanticSerializationError as err:
            raise ValueError(
                f"{name} is an object ({type(value).__name__}), which can't be handed to the process that trains: name a function by "
                'its import path, estimator="my_models:make_estimator", that makes the estimator with the object in it'
            ) from err


def _plan(value: Any) -> dict[str, Any]:
    """Read what a decision asks for; nothing where no plan is given.

    :raises ValueError: it is no plan, asks for no training, or for more than how rows are chosen.
    """
    from airflow_mlops.core.decision.retraining import TrainingPlan

    if optional(value) is None:
        return {}
    plan = part_of(value, "plan")
    if plan is None:
        raise ValueError(
            f"plan asks for no training ({value.get('reason', 'it says no reason')}): train only where the decision's "
            "retrain is true"
        )
    if not isinstance(plan, Mapping):
        raise ValueError(
            f"plan is {plan!r:.100}: give what DecideRetrainingOperator returned (task.output, or a template with "
            "render_template_as_native_obj=True)"
        )
    known = [field.name for field in fields(TrainingPlan)]
    unknown = sorted({*map(str, plan)} - {*known})
    if unknown:
        raise ValueError(f"plan holds {', '.join(unknown)}: a plan says only {', '.join(known)}")
    return dict(plan)
