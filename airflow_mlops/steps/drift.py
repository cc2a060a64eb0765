"""Drift: what the service was asked and answered in a window, against the training or against earlier windows."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from airflow_mlops.core.checks.skew import find_skew
from airflow_mlops.core.codec import to_dict
from airflow_mlops.core.data.dataset import DatasetVersion
from airflow_mlops.core.monitoring.drift import DriftReport, compare_profiles
from airflow_mlops.core.monitoring.drift_policy import DriftPolicy
from airflow_mlops.core.profiles.profile_format import PREDICTION
from airflow_mlops.core.windows import Window, find_time_zone
from airflow_mlops.exceptions import InsufficientDataError, MLOpsError
from airflow_mlops.integrations.mlflow import Registry
from airflow_mlops.steps.base import Step
from airflow_mlops.steps.common import DatasetRef, pin_dataset
from airflow_mlops.steps.monitoring.drift_report import write_report
from airflow_mlops.steps.monitoring.drift_sides import DriftSides, Reference, ReferenceKind
from airflow_mlops.steps.registry.packages import champion_profile

if TYPE_CHECKING:
    from airflow_mlops.services import Services

_LOG = logging.getLogger(__name__)

#: Columns in the result, those that drifted first: it has to stay small with a thousand columns.
FEATURES_SHOWN = 60


@dataclass(frozen=True, kw_only=True, slots=True)
class DriftSpec:
    """What to compare.

    :param model_name: model whose inference log is read.
    :param window: predictions whose time is inside: the current window.
    :param champion_alias: the version whose training data is the reference.
    :param detector: name of a detector or import path of one, for all inputs or by input; ``None`` chooses by column type.
    :param thresholds: by input, instead of the detector's own.
    :param policy: when an input, and when the window has drifted.
    :param reference: ``fixed``: the champion's training rows; ``trailing``: the windows before this one; ``last_year``: the
        same season a year earlier.
    :param reference_windows: how many windows ``trailing`` takes together.
    :param at_least: the window counts as drifted when it and so many of the last windows together did.
    :param of_windows: how many windows, this one included, ``at_least`` looks at.
    :param time_zone: whose months and days the windows are, such as ``Europe/Berlin``: by them the windows before and the season
        a year earlier are found.
    :param columns: inputs to compare; none: all of them. Leave out what counts the season, or the rows.
    :param pairs: numeric inputs to look at together, for correlations.
    :param domain_classifier: also train a classifier to tell the windows apart.
    :param report: write an Evidently report ``never``, when ``fired``, or ``always``.
    :param labels: dataset version or table URI with labels, for the drift of the target.
    :param id_column: column of the labels that equals the prediction id.
    """

    model_name: str
    window: Window
    champion_alias: str = "champion"
    detector: str | dict[str, str] | None = None
    thresholds: dict[str, float] = field(default_factory=dict)
    policy: DriftPolicy = field(default_factory=DriftPolicy)
    reference: ReferenceKind = "fixed"
    reference_windows: int = 3
    at_least: int = 1
    of_windows: int = 1
    time_zone: str = "UTC"
    columns: tuple[str, ...] = ()
    pairs: tuple[tuple[str, str], ...] = ()
    domain_classifier: bool = False
    report: Literal["never", "fired", "always"] = "fired"
    labels: DatasetRef | None = None
    id_column: str | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.at_least <= self.of_windows:
            raise ValueError(
                f"at_least={self.at_least} of of_windows={self.of_windows} can't be: 1 <= k <= n is needed"
            )
        if self.reference_windows < 1:
            raise ValueError(
                f"reference_windows={self.reference_windows}: at least one window is needed to compare with"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class DriftResult:
    """The verdict on the inputs; per input in ``features``, those that drifted first.

    :param drifted: the inputs drifted, in as many windows as asked for.
    :param reference: what the window was compared with, in words.
    :param features: at most 60 inputs; ``feature_count`` counts all.
    :param window_verdicts: whether this window alone drifted, then the ones before it; those without predictions are left out.
    :param prediction: the answers' comparison; ``None`` where the model package has no reference for them.
    :param target: the labels' comparison; ``None`` where none are given, ``measured`` false where it can't be judged yet.
    :param skew: requests unlike anything in training.
    :param not_judged: inputs that no row of the window's log has, with why: neither drift nor skew of them is known.
    :param classifier: whether a classifier tells the windows apart; ``None`` where it was not asked for, ``measured`` false where
        there are too few rows.
    :param labels: version of the labels' table that was read.
    """

    model_name: str
    window: Window
    row_count: int
    drifted: bool
    drifted_count: int
    feature_count: int
    headline: str
    features: tuple[dict[str, Any], ...]
    report_url: str | None
    reference: str = "training rows"
    window_verdicts: tuple[bool, ...] = ()
    prediction: dict[str, Any] | None = None
    target: dict[str, Any] | None = None
    skew: tuple[dict[str, Any], ...] = ()
    not_judged: tuple[str, ...] = ()
    classifier: dict[str, Any] | None = None
    labels: DatasetVersion | None = None


def run(spec: DriftSpec, services: Services) -> DriftResult:
    """Compare the window's profile with the reference's, explain when it fired.

    The verdict stands without its explanation: a report that can't be written is logged and left out.

    :raises InsufficientDataError: nothing was predicted in the window, or too little to judge.
    """
    registry = Registry.connect(services)
    manifest, trained = champion_profile(registry, services, spec.model_name, spec.champion_alias)
    sides = DriftSides(
        log=Path(services.require("serving_dir")) / "inference_log",
        model_name=spec.model_name,
        manifest=manifest,
        trained=trained,
        pairs=spec.pairs,
        columns=spec.columns,
        zone=find_time_zone(spec.time_zone),
    )
    reference = _reference(spec, sides, spec.window)
    report = _compare(spec, sides, spec.window, reference)
    verdicts = (report.drifted, *_earlier_verdicts(spec, sides))
    drifted = report.drifted and sum(verdicts) >= spec.at_least
    current = sides.profile(spec.window)
    url, labels = None, _pinned_labels(spec)
    if spec.report == "always" or (spec.report == "fired" and drifted):
        url = _explain(spec, registry, sides, reference, labels)
    return DriftResult(
        model_name=spec.model_name,
        window=spec.window,
        row_count=current.row_count,
        drifted=drifted,
        drifted_count=report.drifted_count,
        feature_count=report.feature_count,
        headline=_headline(spec, report, verdicts, drifted=drifted),
        features=tuple(to_dict(feature) for feature in report.features[:FEATURES_SHOWN]),
        report_url=url,
        reference=reference.told,
        window_verdicts=verdicts,
        prediction=_prediction_drift(spec, sides, reference),
        target=_target_drift(spec, sides, labels),
        skew=tuple(
            to_dict(item) for item in find_skew(sides.trained, current.select(sides.inputs))[:FEATURES_SHOWN]
        ),
        not_judged=sides.not_logged(spec.window)[:FEATURES_SHOWN],
        classifier=_told_apart(spec, sides) if spec.domain_classifier else None,
        labels=labels if isinstance(labels, DatasetVersion) else None,
    )


def _reference(spec: DriftSpec, sides: DriftSides, window: Window) -> Reference:
    """Give what a window is compared with."""
    return sides.reference(
        window, spec.reference, spec.reference_windows, minimum_rows=spec.policy.minimum_rows
    )


def _compare(spec: DriftSpec, sides: DriftSides, window: Window, reference: Reference) -> DriftReport:
    """Compare the inputs of a window with its reference."""
    names = [*sides.compared, *sides.pair_names]
    return compare_profiles(
        reference.profile.select(names),
        sides.profile(window).select(names),
        detector=spec.detector,
        thresholds=spec.thresholds,
        policy=spec.policy,
        read_rows=sides.reader(window, reference.open_rows),
        absent=sides.absent(window, reference, spec.reference),
    )


def _earlier_verdicts(spec: DriftSpec, sides: DriftSides) -> list[bool]:
    """Judge the windows before this one, as far as there are any predictions in them."""
    verdicts = []
    for window in sides.windows_before(spec.window, spec.of_windows - 1):
        try:
            verdicts.append(_compare(spec, sides, window, _reference(spec, sides, window)).drifted)
        except InsufficientDataError:
            _LOG.info("%s has too few predictions of %s to be judged", window, spec.model_name)
    return verdicts


def _prediction_drift(spec: DriftSpec, sides: DriftSides, reference: Reference) -> dict[str, Any] | None:
    if PREDICTION not in sides.layout.by_name:
        return None  # a package of an older version
    try:
        report = compare_profiles(
            reference.profile.select([PREDICTION]),
            sides.profile(spec.window).select([PREDICTION]),
            policy=spec.policy,
            what="predictions",
        )
    except InsufficientDataError as err:  # of a model with a handful of held-out rows
        return {"feature": PREDICTION, "measured": False, "drifted": False, "sentence": str(err)}
    return to_dict(report.features[0])


def _told_apart(spec: DriftSpec, sides: DriftSides) -> dict[str, Any]:
    """Let a classifier tell the windows apart; too few rows for it cost the inputs no verdict."""
    try:
        return to_dict(sides.tell_apart(spec.window, spec.policy)) | {"measured": True}
    except InsufficientDataError as err:
        return {"measured": False, "drifted": False, "sentence": str(err)}


def _pinned_labels(spec: DriftSpec) -> DatasetRef | None:
    """Give the version of the labels that is read; what can't be read stays as it is, and is told where it is needed."""
    if not (spec.labels and spec.id_column):
        return None
    try:
        return pin_dataset(spec.labels)
    except MLOpsError:
        return spec.labels


def _target_drift(spec: DriftSpec, sides: DriftSides, labels: DatasetRef | None) -> dict[str, Any] | None:
    """Compare the labels that have arrived with those of the training."""
    if not (labels and spec.id_column):
        return None
    try:
        current = sides.target_profile(spec.window, labels=labels, id_column=spec.id_column)
        report = compare_profiles(
            sides.trained.select([sides.manifest.target]), current, policy=spec.policy, what="labels"
        )
    except MLOpsError as err:  # labels that are late or mistyped cost the inputs no verdict
        _LOG.warning("the drift of the target is not judged: %s", err)
        return {
            "feature": sides.manifest.target,
            "measured": False,
            "drifted": False,
            "sentence": str(err),
        }
    return to_dict(report.features[0])


def _explain(
    spec: DriftSpec, registry: Registry, sides: DriftSides, reference: Reference, labels: DatasetRef | None
) -> str | None:
    try:
        return write_report(
            registry,
            sides,
            spec.window,
            reference,
            spec=to_dict(spec),
            share_threshold=spec.policy.share_threshold,
            labels=labels,
            id_column=spec.id_column,
        )
    except Exception:  # noqa: BLE001 - labels that are late or mistyped, Evidently, MLflow, the disk
        _LOG.exception(
            "no report for %s in %s: the verdict is recorded without it", spec.model_name, spec.window
        )
        return None


def _headline(spec: DriftSpec, report: DriftReport, verdicts: tuple[bool, ...], *, drifted: bool) -> str:
    if not report.drifted or spec.of_windows == 1:
        return report.headline
    word = "reached" if drifted else "not reached"
    return (
        f"{report.headline}; {sum(verdicts)} of the last {len(verdicts)} windows drifted, {spec.at_least} of "
        f"{spec.of_windows} needed: {word}"
    )


STEP = Step(name="drift", spec=DriftSpec, result=DriftResult, run=run)
