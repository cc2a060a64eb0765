"""Evaluate: challenger, champion and simple guesses on the same rows, and one verdict with its reason."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from airflow_mlops.core.codec import canonical_json, to_dict
from airflow_mlops.core.comparison.artifact import ArtifactFacts, ArtifactLimits
from airflow_mlops.core.comparison.evaluation import (
    EvaluationReport,
    compare_models,
    repeat_last,
    require_known_labels,
)
from airflow_mlops.core.comparison.fairness import FairnessReport, compare_groups
from airflow_mlops.core.comparison.metrics import (
    DEFAULT_METRICS,
    require_decisive,
    resolve_metric,
    row_losses,
    slice_losses,
)
from airflow_mlops.core.comparison.predictions import Graded, Predictions
from airflow_mlops.core.comparison.promotion import Check, PromotionPolicy, Verdict, decide_promotion
from airflow_mlops.core.comparison.resampling import cut_clusters
from airflow_mlops.core.comparison.slices import SlicePolicy, SliceReport, find_worse_slices
from airflow_mlops.core.data.categories import as_text
from airflow_mlops.core.data.dataset import DatasetVersion
from airflow_mlops.core.model.model_card import describe_evaluation
from airflow_mlops.core.model.simple_guess import as_in, simple_guess
from airflow_mlops.core.windows import Window
from airflow_mlops.exceptions import ArtifactIntegrityError, InsufficientDataError, SchemaMismatchError
from airflow_mlops.integrations.mlflow import TWIN_FOLDER, Registry
from airflow_mlops.serving.probe import check_artifact
from airflow_mlops.steps.base import Step
from airflow_mlops.steps.common import DatasetRef, model_columns, read_rows, resolve_dataset, with_target
from airflow_mlops.steps.registry.aliases import find_rival
from airflow_mlops.steps.registry.packages import load_version, run_package
from airflow_mlops.steps.registry.predecessors import find_earned, judge_earned, read_predecessor

if TYPE_CHECKING:
    import polars as pl
    from numpy.typing import NDArray

    from airflow_mlops.services import Services
    from airflow_mlops.serving.model import ServedModel

EVALUATION_FOLDER = "evaluation"

_KEEP = ", or train with keep_twin=True where it is fitted again on all rows"

Measured = Literal["model", "twin", "predecessors"]


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateSpec:
    """What to compare.

    :param dataset: dataset version, or table URI for its newest.
    :param model_name: registered model whose champion is the rival.
    :param run_id: MLflow run of the challenger.
    :param package_digest: digest its package must have, from the training's result; needed where signing keys are
        configured, as a challenger is not signed yet.
    :param twin_digest: digest of the package of its twin, which is measured in the place of a challenger that has learned from
        these rows as well.
    :param window: rows to judge on; neither model may have been trained on them (the training's held-out window).
    :param time_column: places a row in the window, and rows in order.
    :param target: column to predict; default the challenger's own.
    :param metric: name of a built-in metric or import path of one; it decides.
    :param metrics: further ones that are reported; ``None``: the usual ones of the task.
    :param last_value: whether the target of the row before is a guess to beat; for a table that is one time series.
    :param slices: columns whose parts may not get worse; ``None``: the inputs of the challenger; empty: none.
    :param groups: columns with groups of people whose rates are compared.
    :param champion_alias: alias of the rival.
    :param decision_key: retraining decision that is being carried out; one that was taken on the model's predecessors is
        the verdict, as the model has learned from all rows there are.
    :param policy: what a challenger has to show.
    :param slice_policy: when a slice counts.
    :param artifact_limits: what the packaged model may cost.
    :param seed: of the resampling.
    """

    dataset: DatasetRef
    model_name: str
    run_id: str
    package_digest: str | None = None
    twin_digest: str | None = None
    window: Window
    time_column: str
    target: str | None = None
    metric: str = "mae"
    metrics: tuple[str, ...] | None = None
    last_value: bool = False
    slices: tuple[str, ...] | None = None
    groups: tuple[str, ...] = ()
    champion_alias: str = "champion"
    decision_key: str | None = None
    policy: PromotionPolicy = field(default_factory=PromotionPolicy)
    slice_policy: SlicePolicy = field(default_factory=SlicePolicy)
    artifact_limits: ArtifactLimits = field(default_factory=ArtifactLimits)
    seed: int = 0

    def __post_init__(self) -> None:
        limit = self.policy.maximum_group_difference
        if limit is not None and not self.groups:
            raise ValueError(
                f"maximum_group_difference is {limit}, but groups is empty: name the columns with groups of people"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateResult:
    """The verdict, what it follows from, and the numbers behind it.

    :param evaluation_url: page of the whole evaluation on the challenger's run.
    :param checks: everything that was looked at, each with its outcome and a sentence.
    :param report: ``None`` where the model's predecessors were tested instead.
    :param champion_alias: alias of ``champion_version``, the one this evaluation may promote to.
    :param measured: what the numbers are of: the ``model``, its ``twin``, or its ``predecessors``.
    :param artifact: what the packaged model costs; ``None`` when it did not answer.
    """

    model_name: str
    run_id: str
    run_url: str
    evaluation_url: str
    champion_version: str | None
    dataset: DatasetVersion
    window: Window
    verdict: Verdict
    reason: str
    checks: tuple[Check, ...]
    report: EvaluationReport | None
    slices: SliceReport | None
    groups: tuple[FairnessReport, ...]
    artifact: ArtifactFacts | None
    champion_alias: str = "champion"
    measured: Measured = "model"


def run(spec: EvaluateSpec, services: Services) -> EvaluateResult:
    """Compare on the same rows and judge.

    :raises ArtifactIntegrityError: a package is not the one it should be, or the twin is of another training.
    :raises InsufficientDataError: no rows in the window, or a metric that can't be measured on them.
    :raises ModelVersionNotFoundError: the run has no package; or MLflow no longer has the champion of the ledger.
    :raises SchemaMismatchError: a column that is not there, or a model that answers something else than the rows hold.
    :raises ValueError: ``decision_key`` names no decision to retrain this model.
    """
    registry = Registry.connect(services)
    earned = find_earned(services, spec.model_name, spec.decision_key, run_id=spec.run_id)
    champion_version = find_rival(registry, services, spec.model_name, spec.champion_alias)
    dataset = resolve_dataset(spec.dataset, time_column=spec.time_column)
    with run_package(
        registry, spec.run_id, services, model_name=spec.model_name, package_digest=spec.package_digest
    ) as (folder, challenger):
        artifact, costs = check_artifact(
            folder,
            spec.artifact_limits,
            signed_as=spec.model_name if challenger.manifest.serving_form == "pickle" else None,
            public_keys=services.signing_public_keys,
        )
    champion = load_version(registry, champion_version, services) if champion_version else None
    if champion is not None:
        _require_comparable(challenger, champion)
    rival = champion_version.model_version if champion_version else None
    measured: Measured = "twin" if spec.twin_digest else "model"
    if earned is not None:
        measured = "predecessors"
        window, judged = earned.window, _Judged()
        predecessor = read_predecessor(earned, spec.model_name, registry, services)
        decision = judge_earned(earned, challenger.manifest, predecessor, rival, artifact)
    else:
        tested = _twin(spec, challenger, registry, services) or challenger
        window = _unseen(spec, tested, champion)
        rows = _rows(spec, window, dataset, [model for model in (tested, champion) if model is not None])
        judged, report = _judge(spec, rows, tested, champion)
        decision = decide_promotion(
            report,
            spec.policy,
            slices=judged.slices,
            named_slices=spec.slices is not None,
            groups=judged.groups,
            further=[artifact],
        )
    experiment_id = registry.training_run(spec.run_id).experiment_id
    result = EvaluateResult(
        model_name=spec.model_name,
        run_id=spec.run_id,
        run_url=registry.run_url(experiment_id, spec.run_id),
        evaluation_url=registry.run_url(experiment_id, spec.run_id, f"{EVALUATION_FOLDER}/evaluation.html"),
        champion_version=rival,
        champion_alias=spec.champion_alias,
        dataset=dataset,
        window=window,
        verdict=decision.verdict,
        reason=decision.reason,
        checks=decision.checks,
        report=judged.report,
        slices=judged.slices,
        groups=judged.groups,
        artifact=costs,
        measured=measured,
    )
    _publish(registry, result)
    return result


def _twin(
    spec: EvaluateSpec, challenger: ServedModel, registry: Registry, services: Services
) -> ServedModel | None:
    """Load the twin that has not seen the held-out rows; ``None``: the challenger itself has not.

    :raises ArtifactIntegrityError: it is another package, or the twin of another training.
    """
    if spec.twin_digest is None:
        return None
    with run_package(
        registry,
        spec.run_id,
        services,
        model_name=spec.model_name,
        package_digest=spec.twin_digest,
        artifact_folder=TWIN_FOLDER,
    ) as (_, twin):
        if _training_of(twin) != _training_of(challenger):
            raise ArtifactIntegrityError(
                f"twin_digest {spec.twin_digest} is no twin of the package of run {spec.run_id}: they were made of other rows or in "
                "another way. Give run_id, package_digest and twin_digest of one training's result"
            )
        return twin


def _training_of(model: ServedModel) -> tuple[object, ...]:
    """Give what a model and its twin have in common."""
    manifest, trained = model.manifest, model.manifest.trained_on
    made = (trained.dataset_digest, trained.window_start, trained.recipe, trained.method_digest)
    return manifest.task, manifest.signature, manifest.holdout, made


def _answers_of_champion(spec: EvaluateSpec, rows: pl.DataFrame, champion: ServedModel) -> Predictions:
    try:
        columns = model_columns(rows, champion.manifest.signature)
    except SchemaMismatchError as err:
        raise SchemaMismatchError(
            f"{err}; it is the champion of {spec.model_name} that does, so it can't be compared on the same rows: give the column its "
            "former type back, or promote the challenger by hand, without an evaluation"
        ) from err
    return champion.answer(columns)


@dataclass(frozen=True, slots=True)
class _Judged:
    """What was measured; nothing where predecessors were."""

    report: EvaluationReport | None = None
    slices: SliceReport | None = None
    groups: tuple[FairnessReport, ...] = ()


def _judge(
    spec: EvaluateSpec, rows: pl.DataFrame, challenger: ServedModel, champion: ServedModel | None
) -> tuple[_Judged, EvaluationReport]:
    manifest = challenger.manifest
    target = rows[spec.target or manifest.target].to_numpy()
    metric = resolve_metric(spec.metric)
    require_decisive(metric, len(manifest.classes or ()))
    for who, model in (("challenger", challenger), ("champion", champion)):
        if model is not None:
            require_known_labels(who, model.manifest.classes or (), target)
    answers = challenger.answer(model_columns(rows, manifest.signature))
    rival = _answers_of_champion(spec, rows, champion) if champion else None
    graded = Graded(target, answers)
    old = Graded(target, rival) if rival is not None else None
    guesses = _guesses(spec, challenger, target)
    further = DEFAULT_METRICS[manifest.task] if spec.metrics is None else spec.metrics
    report = compare_models(
        target=target,
        challenger=answers,
        champion=rival,
        baselines=guesses,
        metrics=[spec.metric, *further],
        seed=spec.seed,
        significance=spec.policy.significance,
    )
    losses = row_losses(metric, graded)
    slices = None
    columns = manifest.signature.names if spec.slices is None else spec.slices
    if old is not None and columns:
        cut = {name: _slice_column(rows[name]) for name in columns}
        after, before = slice_losses(metric, graded), slice_losses(metric, old)
        slices = find_worse_slices(
            cut,
            after.values,
            before.values,
            cut_clusters(len(target), after.values - before.values),
            spec.slice_policy,
            loss=after.name,
            of_mean=after.of_mean,
        )
    groups = tuple(
        compare_groups(
            name,
            _group_column(rows[name]),
            target=target,
            predicted=answers.values,
            losses=losses.values,
            labels=manifest.classes or (),
            loss=losses.name,
            of_mean=losses.of_mean,
            minimum_rows=spec.policy.minimum_group_rows,
        )
        for name in spec.groups
    )
    return _Judged(report, slices, groups), report


def _guesses(spec: EvaluateSpec, challenger: ServedModel, target: NDArray[Any]) -> dict[str, Predictions]:
    """Give what somebody would answer who knows only the training rows' target, or the row before."""
    simple = simple_guess(challenger.manifest, target, resolve_metric(spec.metric))
    guesses = {"a simple guess": simple}
    if spec.last_value:
        classes = challenger.manifest.classes or ()
        shares = [challenger.manifest.trained_on.class_shares.get(label, 0.0) for label in classes]
        first = as_in(target, simple.values[:1].tolist()[0])
        guesses["the value before"] = repeat_last(target, first, classes=classes, shares=shares)
    return guesses


def _slice_column(column: pl.Series) -> NDArray[Any]:
    """Give numbers as floats, missing ones as NaN, dates and times as such (in UTC), and all else as text."""
    import polars as pl

    if column.dtype.is_numeric():
        return column.cast(float).to_numpy()
    if isinstance(column.dtype, pl.Datetime | pl.Date):
        return column.cast(pl.Datetime("us")).to_numpy()
    return as_text(column).fill_null("").to_numpy()


def _group_column(column: pl.Series) -> NDArray[Any]:
    """Give the groups as text; all that are missing are one group, be they null or no number."""
    known = column.fill_nan(None) if column.dtype.is_float() else column
    return as_text(known).fill_null("").to_numpy()


def _unseen(spec: EvaluateSpec, challenger: ServedModel, champion: ServedModel | None) -> Window:
    """Give the part of the window that begins after the training of both models: rows one has learned by heart prove nothing.

    :raises InsufficientDataError: nothing is left of it.
    :raises SchemaMismatchError: their rows were told apart by another column than these.
    """
    start = spec.window.start
    for who, model in (("challenger", challenger), ("champion", champion)):
        trained = model.manifest.trained_on.window if model is not None else None
        by = model.manifest.trained_on.time_column if model is not None else None
        if by not in {None, spec.time_column}:
            raise SchemaMismatchError(
                f"the {who} of {spec.model_name} was trained on rows until a time in {by!r}, and time_column is "
                f"{spec.time_column!r}: which of these rows it has learned from can't be told. "
                + (
                    f"Evaluate by {by!r}"
                    if who == "challenger"
                    else "Promote the challenger by hand, without an evaluation"
                )
            )
        if trained is None or trained.end <= start:
            continue
        if trained.end >= spec.window.end:
            raise InsufficientDataError(
                f"the {who} was trained on rows until {trained.end:%Y-%m-%d %H:%M}, so it has seen all of window "
                f"{spec.window}: judge on later rows{_KEEP if who == 'challenger' else ''}"
            )
        start = trained.end
    return Window(start=start, end=spec.window.end)


def _rows(
    spec: EvaluateSpec, window: Window, dataset: DatasetVersion, models: list[ServedModel]
) -> pl.DataFrame:
    """Read what all models need, oldest row first.

    :raises InsufficientDataError: no row has a target yet.
    """
    target = spec.target or models[0].manifest.target
    inputs = [name for model in models for name in model.manifest.signature.names]
    if target in inputs:
        raise SchemaMismatchError(f"target {target!r} is also an input of the model of run {spec.run_id}")
    for model in models[1:]:
        gone = [name for name in model.manifest.signature.names if name not in dataset.columns]
        if gone:
            raise SchemaMismatchError(
                f"the champion of {spec.model_name} reads {', '.join(gone)}, which {dataset.uri} does not have, so it can't be "
                "compared on the same rows: bring the column back, or promote the challenger by hand, without an evaluation"
            )
    columns = [*dict.fromkeys([*inputs, target, spec.time_column, *(spec.slices or ()), *spec.groups])]
    rows = read_rows(dataset, columns=columns, time_column=spec.time_column, window=window)
    return with_target(rows, target, where=f"{dataset.uri} in {window}").sort(spec.time_column)


def _require_comparable(challenger: ServedModel, champion: ServedModel) -> None:
    new, old = challenger.manifest, champion.manifest
    if new.task != old.task:
        raise SchemaMismatchError(
            f"the challenger is a {new.task} and the champion a {old.task}: they have no metric in common; "
            "give the new model a name of its own"
        )


def _publish(registry: Registry, result: EvaluateResult) -> None:
    """Put the evaluation on the challenger's run."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / EVALUATION_FOLDER
        folder.mkdir()
        plain = to_dict(result)
        (folder / "evaluation.json").write_text(canonical_json(plain))
        (folder / "evaluation.html").write_text(describe_evaluation(plain).to_html())
        registry.upload(result.run_id, folder, EVALUATION_FOLDER)
    registry.log_dataset(result.run_id, result.dataset, "evaluation")
    registry.log(
        result.run_id,
        params={},
        metrics=_numbers(result),
        tags={"airflow_mlops.verdict": result.verdict, "airflow_mlops.verdict_reason": result.reason},
    )


def _numbers(result: EvaluateResult) -> dict[str, float]:
    numbers = {}
    for item in result.report.metrics if result.report else ():
        numbers[f"evaluation_{item.metric}"] = item.challenger.value
        if item.champion is not None:
            numbers[f"evaluation_{item.metric}_champion"] = item.champion.value.value
    costs = to_dict(result.artifact) if result.artifact else {}
    return numbers | {f"artifact_{name}": value for name, value in costs.items()}


STEP = Step(name="evaluate", spec=EvaluateSpec, result=EvaluateResult, run=run)
