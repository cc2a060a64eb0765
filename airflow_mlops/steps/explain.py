"""Explain: what a trained model pays attention to, in numbers and pictures on its MLflow run."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from airflow_mlops.core.codec import json_safe, to_dict
from airflow_mlops.core.comparison.metrics import evaluate_metric, resolve_metric
from airflow_mlops.core.model.explanation import (
    Counterfactual,
    Importance,
    Score,
    Table,
    find_counterfactual,
    partial_dependence,
    permutation_importance,
    rank_contributions,
)
from airflow_mlops.core.windows import Window
from airflow_mlops.exceptions import SchemaMismatchError
from airflow_mlops.integrations import plots, shap
from airflow_mlops.integrations.mlflow import Registry
from airflow_mlops.steps.base import Step
from airflow_mlops.steps.common import DatasetRef, model_columns, read_rows, resolve_dataset, with_target
from airflow_mlops.steps.registry.packages import run_package

if TYPE_CHECKING:
    import polars as pl
    from numpy.typing import NDArray

    from airflow_mlops.services import Services
    from airflow_mlops.serving.model import ServedModel

EXPLANATION_FOLDER = "explanation"

#: Rows that partial dependence averages over, and that stand for "not knowing" in SHAP.
AVERAGED_ROWS, BACKGROUND_ROWS = 200, 50


_BY_HEART = ", on rows it has learned from: what it knows by heart counts too"


@dataclass(frozen=True, kw_only=True, slots=True)
class ExplainSpec:
    """What to explain.

    :param dataset: dataset version, or table URI for its newest.
    :param model_name: name of the model.
    :param run_id: MLflow run that holds the package.
    :param package_digest: digest it must have, from the training's result; needed where signing keys are configured.
    :param window: rows to explain on, best those the training held out.
    :param time_column: places a row in the window.
    :param metric: name of a built-in metric or import path of one.
    :param explained_label: class whose probability is explained; ``None``: the last of the model's classes.
    :param maximum_rows: rows drawn from the window for the importance.
    :param explained_rows: rows whose answers are shared out among the features.
    :param counterfactual_shift: for these rows, also the smallest change that moves the answer this far, up or down (by its
        sign); for a classification any other label; ``None`` looks for none.
    :param seed: of the draws.
    """

    dataset: DatasetRef
    model_name: str
    run_id: str
    package_digest: str | None = None
    window: Window
    time_column: str
    metric: str = "mae"
    explained_label: str | None = None
    maximum_rows: int = 5_000
    explained_rows: int = 100
    counterfactual_shift: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("maximum_rows", "explained_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class ExplainResult:
    """What matters, most first.

    :param explanation_url: page of the pictures.
    :param importances: increase of the loss without each feature.
    :param contributions: mean size of each feature's contribution.
    :param headline: one sentence.
    """

    model_name: str
    run_id: str
    explanation_url: str
    row_count: int
    importances: tuple[Importance, ...]
    contributions: tuple[tuple[str, float], ...]
    headline: str


def run(spec: ExplainSpec, services: Services) -> ExplainResult:
    """Explain the model as it is served, and put the findings on its run.

    :raises InsufficientDataError: no row of the window has a target yet.
    :raises ModelVersionNotFoundError: the run has no package.
    :raises ValueError: a label the model does not know.
    """
    registry = Registry.connect(services)
    dataset = resolve_dataset(spec.dataset, time_column=spec.time_column)
    with run_package(
        registry, spec.run_id, services, model_name=spec.model_name, package_digest=spec.package_digest
    ) as (_, model):
        names = list(model.manifest.signature.names)
        learned = model.manifest.trained_on.window
    target_name = model.manifest.target
    found = read_rows(
        dataset, columns=[*names, target_name], time_column=spec.time_column, window=spec.window
    )
    rows = with_target(found, target_name, where=f"{dataset.uri} in {spec.window}")
    # Shuffled, so that the first rows of the table are rows of any time.
    rows = rows.sample(min(rows.height, spec.maximum_rows), shuffle=True, seed=spec.seed)
    table, target = _table(model, rows), rows[target_name].to_numpy()
    score, output = _score(model, spec.explained_label)
    importances = permutation_importance(_loss(model, spec.metric, target), table, seed=spec.seed)
    curves = [
        partial_dependence(score, _head(table, AVERAGED_ROWS), item.name)
        for item in importances[: plots.MOST_FEATURES]
    ]
    explained = _head(table, spec.explained_rows)
    contributions, mean = shap.explain_rows(score, explained, _tail(table, BACKGROUND_ROWS), seed=spec.seed)
    ranked = rank_contributions(names, contributions)
    counterfactuals = _counterfactuals(spec, model, explained, table)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / EXPLANATION_FOLDER
        folder.mkdir()
        plots.draw_importances(importances, spec.metric.upper(), folder / "importance.png")
        plots.draw_partial_dependences(curves, output, folder / "partial_dependence.png")
        plots.draw_contributions(
            names, contributions, explained, [name for name, _ in ranked], folder / "contributions.png"
        )
        _write(folder / "importance.json", [to_dict(item) for item in importances])
        _write(folder / "partial_dependence.json", [to_dict(curve) for curve in curves])
        _write(folder / "rows.json", _rows(names, explained, contributions, mean, counterfactuals))
        registry.upload(spec.run_id, folder, EXPLANATION_FOLDER)
    experiment_id = registry.training_run(spec.run_id).experiment_id
    return ExplainResult(
        model_name=spec.model_name,
        run_id=spec.run_id,
        explanation_url=registry.run_url(experiment_id, spec.run_id, f"{EXPLANATION_FOLDER}/importance.png"),
        row_count=rows.height,
        importances=importances[:50],
        contributions=ranked[:50],
        headline=_headline(importances, spec.metric)
        + (_BY_HEART if learned is not None and spec.window.start < learned.end else ""),
    )


def _table(model: ServedModel, rows: pl.DataFrame) -> dict[str, NDArray[Any]]:
    """Give the rows as the model takes them.

    :raises SchemaMismatchError: the target is also an input.
    """
    if model.manifest.target in model.manifest.signature.names:
        raise SchemaMismatchError(f"target {model.manifest.target!r} is also an input of the model")
    return {
        name: values
        if isinstance(values, np.ndarray)
        else np.array(["" if value is None else value for value in values], dtype=object)
        for name, values in model_columns(rows, model.manifest.signature).items()
    }


def _score(model: ServedModel, label: str | None) -> tuple[Score, str]:
    """Give the number that is explained, and its name."""
    classes = model.manifest.classes
    if classes is None:
        if label is not None:
            raise ValueError(f"explained_label is {label!r}, and the model answers numbers: leave it out")
        return model.score(), model.manifest.target
    chosen = label or classes[-1]
    what = "probability" if model.probabilities is not None else "share"
    return model.score(chosen), f"{what} of {chosen}"


def _loss(model: ServedModel, metric: str, target: NDArray[Any]) -> Callable[[Table], float]:
    how = resolve_metric(metric)
    sign = -1.0 if how.greater_is_better else 1.0
    return lambda table: sign * evaluate_metric(how, target=target, prediction=model.answer(table)).value


def _counterfactuals(
    spec: ExplainSpec, model: ServedModel, explained: Table, pool: Table
) -> list[Counterfactual | None]:
    """Find, for each row, the smallest change to another label, or of the answer by the shift that is asked for."""
    shift = spec.counterfactual_shift
    if shift is None:
        return []
    count = len(next(iter(explained.values())))
    rows = [{name: column[number] for name, column in explained.items()} for number in range(count)]
    known = _ask(model, pool)  # once, whatever row is explained

    def find(row: Mapping[str, Any], own: float | str) -> Counterfactual | None:
        other = find_counterfactual(
            lambda table: _scores(model, _ask(model, table), own),
            row,
            pool,
            _other_label if isinstance(own, str) else _beyond(own, shift),
            pool_scores=_scores(model, known, own),
        )
        if other is None:
            return None
        after = {**row, **{name: value for name, (_, value) in other.changes.items()}}
        changed = {name: np.array([after[name]], dtype=column.dtype) for name, column in pool.items()}
        return replace(other, answer_before=own, answer_after=model.predict_columns(changed)[0])

    answers: Sequence[float | str] = model.predict_columns(explained)
    return [find(row, own) for row, own in zip(rows, answers, strict=True)]


def _ask(model: ServedModel, table: Table) -> NDArray[Any]:
    """Give the probabilities of the classes, or the bare answers of a model that has none."""
    return np.asarray(model.probabilities(table) if model.probabilities else model.predict_columns(table))


def _scores(model: ServedModel, given: NDArray[Any], own: float | str) -> NDArray[Any]:
    """Give numbers as they are; of labels how far its own is ahead of the best other one."""
    if not isinstance(own, str):
        return given
    if given.ndim == 1:
        return np.where(given == own, 1.0, -1.0)
    place = (model.manifest.classes or ()).index(own)
    return np.asarray(given[:, place] - np.delete(given, place, axis=1).max(axis=1))


def _other_label(leads: NDArray[Any]) -> NDArray[np.bool_]:
    return leads < 0.0


def _beyond(own: float, shift: float) -> Callable[[NDArray[Any]], NDArray[np.bool_]]:
    return lambda scores: scores >= own + shift if shift > 0 else scores <= own + shift


def _rows(
    names: list[str],
    explained: Table,
    contributions: NDArray[Any],
    mean: float,
    counterfactuals: list[Counterfactual | None],
) -> list[dict[str, Any]]:
    """One record per row: its values, what each contributed, and what would have led elsewhere."""
    records = []
    for number in range(len(contributions)):
        shares = dict(zip(names, contributions[number].tolist(), strict=True))
        record: dict[str, Any] = {
            "row": {name: explained[name][number] for name in names},
            "mean_score": mean,
            "score": mean + float(contributions[number].sum()),
            "contributions": dict(sorted(shares.items(), key=lambda item: -abs(item[1]))),
        }
        if counterfactuals:
            other = counterfactuals[number]
            record["counterfactual"] = to_dict(other) if other else None
        records.append(record)
    return records


def _headline(importances: tuple[Importance, ...], metric: str) -> str:
    top = [
        item
        for item in importances[:3]
        if item.increase > 2.0 * item.standard_deviation and item.increase > 0.0
    ]
    idle = sum(item.increase <= 2.0 * item.standard_deviation for item in importances)
    if not top:
        return f"no feature changes {metric.upper()} beyond chance"
    parts = ", ".join(
        f"{item.name} ({metric.upper()} gets worse by {item.increase:.3g} without it)" for item in top
    )
    return f"most important: {parts}" + (
        f"; {idle} of {len(importances)} features change nothing" if idle else ""
    )


def _head(table: Table, count: int) -> dict[str, NDArray[Any]]:
    return {name: column[:count] for name, column in table.items()}


def _tail(table: Table, count: int) -> dict[str, NDArray[Any]]:
    return {name: column[-count:] for name, column in table.items()}


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(json_safe(value), indent=1, default=_builtin))


def _builtin(value: Any) -> Any:
    return value.item()


STEP = Step(name="explain", spec=ExplainSpec, result=ExplainResult, run=run)
