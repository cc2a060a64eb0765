"""What a training is asked for and what it reports, and which code of the user decides it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from typing import Any

from airflow_mlops.core.codec import canonical_json, to_dict
from airflow_mlops.core.data.dataset import DatasetVersion
from airflow_mlops.core.decision.retraining import TrainingPlan
from airflow_mlops.core.model.background import MAXIMUM_BACKGROUND_ROWS
from airflow_mlops.core.model.columns import ColumnRoles
from airflow_mlops.core.model.package import file_digest
from airflow_mlops.core.model.parity import ParityLimits
from airflow_mlops.core.model.tuning import Candidate, Search
from airflow_mlops.core.windows import Window
from airflow_mlops.integrations import onnx, sklearn
from airflow_mlops.steps.common import DatasetRef
from airflow_mlops.steps.training.rows import RowRule

#: What MLflow takes in no name of a logged or registered model.
_NOT_IN_NAMES = "/:.%\"'"

#: Characters of a name that the ledger takes; MLflow takes six more.
_LONGEST_NAME = 250

#: What a training is asked for besides its method: all that a decision's plan says, which rows, and how the model is stored.
_NO_METHOD = {
    *(part.name for part in fields(TrainingPlan)),
    *("dataset", "trailing_days", "holdout_share", "model_name", "id_column"),
    *("parity", "quantize", "allow_pickle", "background_rows", "private_columns", "experiment", "dag_code"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainSpec:
    """What to train, and on what.

    :param dataset: dataset version, or table URI for its newest.
    :param model_name: name of the model to be; also the default MLflow experiment.
    :param estimator: import path of a scikit-learn estimator or of a factory function; or give ``candidates``.
    :param estimator_params: its arguments; ``a__b`` reaches into a nested estimator.
    :param candidates: estimators to try, each with its space; the best in cross-validation is kept.
    :param search: how candidates are compared; default for more than one, or with a space: 20 trials of Optuna.
    :param target: column to predict.
    :param numeric: inputs that are numbers.
    :param categorical: inputs that are one of some values.
    :param text: inputs that are free text.
    :param time_column: orders the rows; the newest are held out.
    :param id_column: names the row; never an input.
    :param weight_column: how much a row counts.
    :param preprocessing: ``auto``, ``codes``, ``scaled`` or ``none``, see
        :data:`airflow_mlops.integrations.sklearn.Preprocessing`.
    :param feature_selection: stage that keeps the most useful features; ``None`` keeps all.
    :param window: rows to use; ``None`` uses all.
    :param rows: which rows: the ``window`` itself, ``all`` before its end, ``trailing`` days before its end, or
        ``since_change``: since the world last changed and a model of its rows alone was promoted; else ``all``.
    :param trailing_days: for ``trailing``.
    :param half_life_days: weight of a row halves with this age (before the newest row); ``None``: equal weights.
    :param holdout_share: newest share of the rows, held out of the fit that is measured, ``(0, 0.5]``.
    :param holdout_start: rows from here on are held out, instead of a share; a naive time is taken as UTC.
    :param refit: fit once more on all rows, and package that model: nothing is left to test it on, but its measured twin says
        what to expect of it.
    :param keep_twin: with ``refit``: package the measured twin as well, so that it can be held against the champion.
    :param mlflow_copy: store the pipeline for MLflow's own loaders as well; nobody loads a challenger with them.
    :param recipe: name of this way of making a model, under which its models of different age are compared.
    :param metric: name of a built-in metric or import path of one; ``None``: ``mae`` for numbers, ``log_loss`` for labels,
        ``accuracy`` where an estimator gives no probabilities.
    :param parity: how far the ONNX form may be from the scikit-learn form.
    :param quantize: make the ONNX form smaller, if that stays within ``parity``.
    :param allow_pickle: store a model that has neither an ONNX form nor a skops form that a service would load as a pickle: code,
        which runs where it is loaded. That takes a trusted signature and ``AIRFLOW_MLOPS_PICKLED_MODELS``.
    :param background_rows: training rows to store in the package, which a service explains its answers against, at most 100; 0: none,
        and nothing is explained there. Whoever may read the package reads these rows.
    :param private_columns: inputs of which no row is stored as an example: known rows, input example and model card have made-up values
        there.
    :param seed: random state.
    :param experiment: MLflow experiment.
    :param dag_code: which version of the Dag file asks, for the run's tags; decides nothing.
    :raises ValueError: ``keep_twin`` without ``refit``, too many background rows, or any with private columns.
    """

    dataset: DatasetRef
    model_name: str
    estimator: str | None = None
    estimator_params: dict[str, Any] = field(default_factory=dict)
    candidates: tuple[Candidate, ...] = ()
    search: Search | None = None
    target: str
    numeric: tuple[str, ...] = ()
    categorical: tuple[str, ...] = ()
    text: tuple[str, ...] = ()
    time_column: str
    id_column: str | None = None
    weight_column: str | None = None
    preprocessing: sklearn.Preprocessing = "auto"
    feature_selection: sklearn.FeatureSelection | None = None
    window: Window | None = None
    rows: RowRule = "window"
    trailing_days: float | None = None
    half_life_days: float | None = None
    holdout_share: float = 0.2
    holdout_start: datetime | None = None
    refit: bool = False
    keep_twin: bool = False
    mlflow_copy: bool = True
    recipe: str | None = None
    metric: str | None = None
    parity: ParityLimits = field(default_factory=ParityLimits)
    quantize: onnx.Quantization | None = None
    allow_pickle: bool = False
    background_rows: int = 0
    private_columns: tuple[str, ...] = ()
    seed: int = 0
    experiment: str | None = None
    dag_code: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.keep_twin and not self.refit:
            raise ValueError(
                "keep_twin is set, but refit is not: a model that is not fitted again on all rows is measured itself and has "
                "no twin; set refit, or leave keep_twin out"
            )
        if not 0 <= self.background_rows <= MAXIMUM_BACKGROUND_ROWS:
            raise ValueError(
                f"background_rows is {self.background_rows}; it must be from 0 to {MAXIMUM_BACKGROUND_ROWS}"
            )
        if self.background_rows and self.private_columns:
            raise ValueError(
                f"background_rows stores training rows as they are, and {', '.join(self.private_columns)} is private: leave one of both out"
            )
        start = self.holdout_start
        if start is not None:  # one instant is one text, as the text decides whether it was trained already
            start = start.replace(tzinfo=UTC) if start.tzinfo is None else start.astimezone(UTC)
            object.__setattr__(self, "holdout_start", start)

    def asked(self) -> dict[str, Any]:
        """Give all that decides the model, as JSON: the same training of another commit is the same training."""
        values = {name: value for name, value in to_dict(self).items() if name != "dag_code"}
        values["estimator_params"] = _told_apart(values["estimator_params"], self.estimator_params)
        for known, candidate in zip(values["candidates"], self.candidates, strict=True):
            known["params"] = _told_apart(known["params"], candidate.params)
            known["space"] = _told_apart(known["space"], candidate.space)
        return values

    def columns(self) -> ColumnRoles:
        """Give the roles.

        :raises ValueError: a column with two roles, no input, or a private column that is none.
        """
        unknown = sorted({*self.private_columns} - {*self.numeric, *self.categorical, *self.text})
        if unknown:
            raise ValueError(
                f"private_columns names {', '.join(unknown)}, which is no input of the model: no row of it is stored"
            )
        return ColumnRoles(
            target=self.target,
            time=self.time_column,
            numeric=self.numeric,
            categorical=self.categorical,
            text=self.text,
            id=self.id_column,
            weight=self.weight_column,
        )

    def to_try(self) -> tuple[Candidate, ...]:
        """Give the candidates.

        :raises ValueError: neither ``estimator`` nor ``candidates``, or both.
        """
        if (self.estimator is None) == (not self.candidates):
            raise ValueError("give either estimator (with estimator_params) or candidates")
        if self.estimator is None:
            return self.candidates
        return (Candidate(estimator=self.estimator, params=self.estimator_params),)

    def how_to_search(self) -> Search | None:
        """Give the search; ``None`` when there is one candidate, nothing to search and no cross-validation asked for."""
        candidates = self.to_try()
        if self.search is not None or (len(candidates) == 1 and not candidates[0].space):
            return self.search
        return Search()


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainResult:
    """A finished run and the package it holds.

    :param model_id: the copy for MLflow's own loaders; ``None`` when it holds types that nobody vouches for.
    :param copy_digest: of all files of that copy.
    :param estimator: import path of what was fitted.
    :param estimator_params: its arguments; the winning ones after a search.
    :param validation_value: the metric in cross-validation on the training rows; ``None`` without a search.
    :param trials: parameter sets that were tried.
    :param untried: import paths of candidates that the search's time limit left no trial for.
    :param folds: of the cross-validation; ``None`` without a search, or of a training of an older release.
    :param metric_value: the metric on the held-out rows.
    :param recipe: name of the way it was made; ``None``: it has none.
    :param twin_digest: of the package of its twin that was measured; ``None``: there is none.
    :param training_digest: of all that decides what is learned of given rows; ``None``: a training of an older release.
    :param reused: whether a former attempt had already finished this work.
    """

    model_name: str
    run_id: str
    run_url: str
    model_id: str | None
    copy_digest: str | None = None
    package_digest: str
    serving_form: str
    serving_reason: str
    dataset: DatasetVersion
    training: Window
    holdout: Window
    training_rows: int
    holdout_rows: int
    estimator: str
    estimator_params: dict[str, Any]
    validation_value: float | None
    trials: int
    metric: str
    metric_value: float | None
    recipe: str | None = None
    twin_digest: str | None = None
    training_digest: str | None = None
    folds: int | None = None
    untried: tuple[str, ...] = ()
    reused: bool


def _told_apart(value: Any, raw: Any) -> Any:
    """Put back into JSON what has no place there: infinity is another argument than ``None``."""
    if isinstance(raw, float) and not math.isfinite(raw):
        return {"float": str(raw)}
    if isinstance(value, dict) and isinstance(raw, Mapping):
        return {name: _told_apart(value[name], part) for name, part in raw.items()}
    if isinstance(value, list) and isinstance(raw, list | tuple):
        return [_told_apart(*pair) for pair in zip(value, raw, strict=True)]
    return value


def require_model_name(name: str) -> None:
    """See that MLflow takes the name, for the model and for its copy."""
    if len(name) > _LONGEST_NAME:
        raise ValueError(
            f"model_name {name[:40]!r}… has {len(name)} characters: give {_LONGEST_NAME} at most"
        )
    if not name.isprintable():
        raise ValueError(f"model_name {name!r} holds characters that can't be printed: leave them out")
    wrong = sorted({*name} & {*_NOT_IN_NAMES})
    if wrong or not name.strip():
        raise ValueError(
            f"model_name {name!r} {'holds ' + ' '.join(wrong) if wrong else 'is empty'}: MLflow takes names without any of "
            f"{' '.join(_NOT_IN_NAMES)}"
        )


def method_digest(spec: TrainSpec) -> str:
    """Digest of how a model is made of whatever rows: what was asked for besides them, and the code that fits."""
    asked = {name: value for name, value in spec.asked().items() if name not in _NO_METHOD}
    code = [sklearn.code_of(path) for path in own_code(spec)]
    return f"sha256:{file_digest(canonical_json([asked, code]).encode())}"


def training_digest(spec: TrainSpec) -> str:
    """Digest of all that decides what is learned of given rows: the method, their weights, and whether held-out ones count."""
    asked = [method_digest(spec), spec.half_life_days, spec.refit]
    return f"sha256:{file_digest(canonical_json(asked).encode())}"


def own_code(spec: TrainSpec) -> list[str]:
    """Name what is found by import path: the estimators, and a metric that is not built in."""
    estimators = [candidate.estimator for candidate in spec.to_try()]
    metric = spec.metric or ""
    built_in = "@" in metric or not {":", "."} & set(metric)
    return estimators if built_in else [*estimators, metric]
