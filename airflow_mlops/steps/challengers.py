"""Challengers: the champion and each recipe's newest models side by side on a window that none of them has seen."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from airflow_mlops.core.comparison.metrics import resolve_metric, row_losses
from airflow_mlops.core.comparison.predictions import Graded, Predictions, valid_values
from airflow_mlops.core.decision.challengers import ChallengerCheck, Contender, measure_gap
from airflow_mlops.core.model.simple_guess import simple_guess
from airflow_mlops.core.windows import Window
from airflow_mlops.exceptions import (
    ArtifactIntegrityError,
    InsufficientDataError,
    ModelVersionNotFoundError,
    SchemaMismatchError,
)
from airflow_mlops.integrations.mlflow import RegisteredVersion, Registry
from airflow_mlops.steps.base import Step
from airflow_mlops.steps.common import DatasetRef, model_columns, read_rows, resolve_dataset, with_target
from airflow_mlops.steps.registry.aliases import resolve_alias
from airflow_mlops.steps.registry.packages import load_version

if TYPE_CHECKING:
    import polars as pl
    from numpy.typing import NDArray

    from airflow_mlops.core.data.dataset import DatasetVersion
    from airflow_mlops.services import Services
    from airflow_mlops.serving.model import ServedModel

log = logging.getLogger(__name__)

#: Of each recipe the newest model and the one before: what one window of age costs is the gap between them.
PER_RECIPE = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class ChallengersSpec:
    """What to compare.

    :param dataset: dataset version, or table URI for its newest, with inputs and target of the window.
    :param model_name: registered model.
    :param window: rows to compare on; models that have seen any of them are left out.
    :param time_column: places a row in the window and orders the rows.
    :param target: column that was predicted; default the champion's.
    :param metric: whose loss per row is compared; a metric that is no mean over rows is replaced by mistakes or
        absolute errors.
    :param champion_alias: alias of the champion.
    :param earlier: versions that were champion before; those that can't be compared any more are left out.
    """

    dataset: DatasetRef
    model_name: str
    window: Window
    time_column: str
    target: str | None = None
    metric: str = "mae"
    champion_alias: str = "champion"
    earlier: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class ChallengersResult:
    """The comparison, and a sentence about it.

    :param check: ``None``: the champion has learned from rows of the window, so there was nothing to compare.
    """

    model_name: str
    window: Window
    metric: str
    check: ChallengerCheck | None
    reason: str


class _Entrant(NamedTuple):
    version: RegisteredVersion
    model: ServedModel
    losses: NDArray[Any]


def run(spec: ChallengersSpec, services: Services) -> ChallengersResult:
    """Compare on the same rows.

    :raises ArtifactIntegrityError: a version's tags say something else of how and until when it was trained than its package.
    :raises InsufficientDataError: no row of the window has a target.
    :raises ModelVersionNotFoundError: there is no champion.
    """
    registry = Registry.connect(services)
    champion = resolve_alias(registry, services, spec.model_name, spec.champion_alias)
    versions = _unseen(registry, spec, champion)
    models = {version.model_version: _load(registry, version, services) for version in versions}
    first = models[champion.model_version]
    trained = first.manifest.trained_on.window
    if trained is not None and trained.end > spec.window.start:
        return ChallengersResult(
            model_name=spec.model_name,
            window=spec.window,
            metric=spec.metric,
            check=None,
            reason=f"not compared: champion, version {champion.model_version}, has learned from rows until "
            f"{trained.end:%Y-%m-%d %H:%M}, and so from {spec.window}",
        )
    dataset = resolve_dataset(spec.dataset, time_column=spec.time_column)
    known = {version.model_version: (version, models[version.model_version]) for version in versions}
    former, left_out = _former(registry, spec, known, champion.model_version, dataset, services)
    target_name = spec.target or first.manifest.target
    rows, infinite = _rows(spec, dataset, [*models.values(), *(model for _, model in former)])
    answers = {number: _answers(model, rows) for number, model in models.items()}
    invalid = {number: ~given.valid for number, given in answers.items() if not given.valid.all()}
    valid = ~np.any([np.zeros(rows.height, dtype=bool), *invalid.values()], axis=0)
    told = _told_invalid(infinite, int(np.sum(~valid)), list(invalid))
    if not valid.any():
        raise InsufficientDataError(f"nothing to compare on in {dataset.uri} in {spec.window}{told}")
    rows = rows.filter(valid)
    target = rows[target_name].to_numpy()
    entrants = [
        _Entrant(version, model, _losses(spec.metric, Graded(target, answers[number].take(valid))))
        for number, (version, model) in known.items()
    ]
    check = _check(spec, champion, entrants, target)
    earlier = []
    for version, model in former:
        try:
            graded = Graded(target, _answers(model, rows))
            losses = _losses(spec.metric, graded)
        except ValueError as err:  # also a column that holds something else by now
            left_out[version.model_version] = str(err)
        else:
            if not graded.valid.all():  # it costs the others no row
                left_out[version.model_version] = "some of its answers are no finite numbers"
                continue
            earlier.append(_Entrant(version, model, losses))
    check = _with_earlier(check, entrants, earlier, spec.window)
    for number, why in left_out.items():
        log.warning("version %s of %s, a former champion, is left out: %s", number, spec.model_name, why)
    return ChallengersResult(
        model_name=spec.model_name,
        window=spec.window,
        metric=spec.metric,
        check=check,
        reason=_reason(check, left_out) + told,
    )


def _unseen(
    registry: Registry, spec: ChallengersSpec, champion: RegisteredVersion
) -> list[RegisteredVersion]:
    """List the champion and, of every recipe, the newest models that end before the window begins."""
    chosen = {champion.model_version: champion}
    count: dict[str, int] = {}
    known = registry.made_by_recipe(spec.model_name)
    for version in sorted(known, key=_age, reverse=True):
        recipe = version.recipe or ""
        if _age(version) > spec.window.start or count.get(recipe, 0) >= PER_RECIPE:
            continue
        count[recipe] = count.get(recipe, 0) + 1
        chosen.setdefault(version.model_version, version)
    return list(chosen.values())


def _former(
    registry: Registry,
    spec: ChallengersSpec,
    known: dict[str, tuple[RegisteredVersion, ServedModel]],
    champion: str,
    dataset: DatasetVersion,
    services: Services,
) -> tuple[list[tuple[RegisteredVersion, ServedModel]], dict[str, str]]:
    """Load the champions of the past that can still be compared, and say why the others can't: none of them is needed.

    :param known: the models of today.
    """
    found, left_out = [], {}
    for number in dict.fromkeys(spec.earlier):
        if number == champion:
            continue
        try:
            version, model = known.get(number) or _load_former(registry, spec, number, services)
            _require_comparable(model, known[champion][1], spec, dataset)
        except (ModelVersionNotFoundError, ArtifactIntegrityError, SchemaMismatchError) as err:
            left_out[number] = str(err)
        else:
            found.append((version, model))
    return found, left_out


def _load_former(
    registry: Registry, spec: ChallengersSpec, number: str, services: Services
) -> tuple[RegisteredVersion, ServedModel]:
    version = registry.version(spec.model_name, number)
    return version, _load(registry, version, services)


def _require_comparable(
    model: ServedModel, champion: ServedModel, spec: ChallengersSpec, dataset: DatasetVersion
) -> None:
    """See that a former champion answers the same question, from columns that there still are, and knows no row of the window.

    :raises SchemaMismatchError: it does not.
    """
    manifest, target = model.manifest, spec.target or champion.manifest.target
    missing = [name for name in manifest.signature.names if name not in dataset.columns]
    if missing:
        raise SchemaMismatchError(f"{dataset.uri} has no column {', '.join(missing)} any more")
    if (manifest.task, manifest.target) != (champion.manifest.task, target):
        raise SchemaMismatchError(f"it predicts {manifest.target!r} by {manifest.task}")
    if manifest.trained_on.window is None:
        raise SchemaMismatchError("it does not say which rows it has learned from")


def _load(registry: Registry, version: RegisteredVersion, services: Services) -> ServedModel:
    """Load a model, and see that it is what it was chosen as: who may write to MLflow may write any tag."""
    model = load_version(registry, version, services)
    trained = model.manifest.trained_on
    until = trained.window_end if trained.recipe is not None else None
    if (version.recipe, version.trained_until) != (trained.recipe, until):
        raise ArtifactIntegrityError(
            f"the tags of {version.model_name} version {version.model_version} say that it is of recipe {version.recipe!r} and "
            f"rows until {version.trained_until}, its package says {trained.recipe!r} and {until}. Register its run again, which "
            "writes the tags, or delete the version"
        )
    return model


def _age(version: RegisteredVersion) -> Any:
    return version.trained_until


def _rows(
    spec: ChallengersSpec, dataset: DatasetVersion, models: list[ServedModel]
) -> tuple[pl.DataFrame, int]:
    """Give the rows to compare on, and how many have an infinite target: every loss on them would be infinite."""
    target = spec.target or models[0].manifest.target
    names = [name for model in models for name in model.manifest.signature.names]
    columns = [*dict.fromkeys([*names, target, spec.time_column])]
    rows = read_rows(dataset, columns=columns, time_column=spec.time_column, window=spec.window)
    where = f"{dataset.uri} in {spec.window}"
    labelled = with_target(rows, target, where=where)
    known = labelled.filter(valid_values(labelled[target].to_numpy()))
    infinite = labelled.height - known.height
    if known.height == 0:
        raise InsufficientDataError(
            f"the {target!r} of all {infinite} rows of {where} is infinite or too large: correct them"
        )
    return known.sort(spec.time_column), infinite


def _told_invalid(infinite: int, strange: int, versions: list[str]) -> str:
    """Say how many rows are left out, and why."""
    told = [
        f"{count} {'rows have' if count > 1 else 'row has'} {what}"
        for count, what in (
            (infinite, "a label that is infinite or too large"),
            (strange, f"an answer of version {', '.join(versions)} that is no finite number"),
        )
        if count
    ]
    left_out = "are left out" if infinite + strange > 1 else "is left out"
    return f"; {' and '.join(told)} and {left_out}" if told else ""


def _answers(model: ServedModel, rows: pl.DataFrame) -> Predictions:
    return model.answer(model_columns(rows, model.manifest.signature))


def _losses(metric: str, graded: Graded) -> NDArray[Any]:
    return row_losses(resolve_metric(metric), graded).values


def _check(
    spec: ChallengersSpec, champion: RegisteredVersion, entrants: list[_Entrant], target: NDArray[Any]
) -> ChallengerCheck:
    contenders = tuple(_contender(entrant, spec.window) for entrant in entrants)
    newest = {
        max((one for one in contenders if one.recipe == recipe), key=lambda one: one.trained_until).version
        for recipe in {one.recipe for one in contenders if one.recipe}
    }
    gaps = tuple(
        measure_gap(older.version.model_version, newer.version.model_version, older.losses, newer.losses)
        for older in entrants
        for newer in entrants
        if newer.version.model_version in newest and older is not newer
    )
    metric = resolve_metric(spec.metric)
    guess = simple_guess(entrants[0].model.manifest, target, metric)
    simple = row_losses(metric, Graded(target, guess)).values
    return ChallengerCheck(
        window=spec.window,
        row_count=len(target),
        champion=champion.model_version,
        simple_loss=float(np.mean(simple)),
        contenders=contenders,
        gaps=gaps,
    )


def _with_earlier(
    check: ChallengerCheck, entrants: list[_Entrant], earlier: list[_Entrant], window: Window
) -> ChallengerCheck:
    """Add the champions of the past, and how the best of them compares with the best model of today."""
    unseen = [
        one
        for one in earlier
        if _trained_until(one, window) <= window.start and np.isfinite(np.mean(one.losses))
    ]
    if not unseen:
        return check
    best = min(unseen, key=lambda one: float(np.mean(one.losses)))
    # Against each of today's: which of them is the best depends on where the world is held to begin.
    today = {check.champion, *(one.version for one in map(check.newest, check.recipes) if one is not None)}
    pairs = {(one.older, one.newer) for one in check.gaps}
    gaps = [
        measure_gap(best.version.model_version, one.version.model_version, best.losses, one.losses)
        for one in entrants
        if one.version.model_version in today - {best.version.model_version}
        and (best.version.model_version, one.version.model_version) not in pairs
    ]
    return replace(
        check,
        earlier=tuple(_contender(one, window) for one in unseen),
        gaps=(*check.gaps, *gaps),
    )


def _contender(entrant: _Entrant, window: Window) -> Contender:
    return Contender(
        version=entrant.version.model_version,
        recipe=entrant.version.recipe,
        trained_until=_trained_until(entrant, window),
        loss=float(np.mean(entrant.losses)),
    )


def _trained_until(entrant: _Entrant, window: Window) -> Any:
    trained = entrant.model.manifest.trained_on.window
    return trained.end if trained is not None else window.start


def _reason(check: ChallengerCheck, left_out: dict[str, str]) -> str:
    shown = ", ".join(
        f"{one.recipe} (version {one.version}) {one.loss:.4g}"
        for recipe in check.recipes
        if (one := check.newest(recipe)) is not None and one.version != check.champion
    )
    champion = check.contender(check.champion)
    own = f"champion, version {check.champion}, {champion.loss:.4g}" if champion else "no champion"
    without = f"; former champions left out: {', '.join(left_out)}" if left_out else ""
    return f"mean loss on {check.row_count} rows: {own}; {shown or 'no challenger yet'}{without}"


STEP = Step(name="challengers", spec=ChallengersSpec, result=ChallengersResult, run=run)
