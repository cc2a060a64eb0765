"""Optuna: search several candidates in one study that survives the process it runs in."""

from __future__ import annotations

import itertools
import json
import logging
import math
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from airflow_mlops.core.model.tuning import Candidate, Range, Search, SearchResult, Trial, Value
from airflow_mlops.exceptions import TransientError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import optuna

    from airflow_mlops.core.model.tuning import FoldScore

log = logging.getLogger(__name__)

#: Attribute of a trial that failed: with what.
_ERROR = "error"

#: A space with more parameter sets is not listed.
_MOST_POINTS = 1000
#: After so many repeats in a row there is hardly anything new to find.
_MOST_REPEATS = 100


def search(
    candidates: Sequence[Candidate],
    settings: Search,
    score: FoldScore,
    *,
    greater_is_better: bool,
    study_name: str,
    storage_url: str | None,
    seed: int,
    on_trial: Callable[[int, Trial], None],
) -> SearchResult:
    """Try parameter sets until there are enough; a study that was interrupted goes on where it stopped.

    A parameter set is measured once: when the sampler draws it again, it is told what was found, and that is no trial. A space
    with fewer sets than trials is tried in full.

    The sampler is seeded by the seed and the number of finished trials, so that an interrupted search and one that ran through
    try the same parameter sets.

    Source: Bergstra et al., "Algorithms for hyper-parameter optimization", NeurIPS 2011 (tree-structured Parzen
    estimator); Golovin et al., "Google Vizier", KDD 2017, section 3.2 (median stopping).

    :param candidates: estimators and their spaces.
    :param settings: how many trials and folds.
    :param score: fits and scores one fold.
    :param greater_is_better: direction of the metric.
    :param study_name: names the work; the same name finds its finished trials.
    :param storage_url: SQLAlchemy URL; ``None`` keeps the study in memory.
    :param seed: of the sampler.
    :param on_trial: told of every trial when it is finished.
    :raises ValueError: every trial failed; with the last one's error.
    :raises TransientError: another process goes on with this study.
    """
    import optuna

    study = _open_study(study_name, storage_url, settings, greater_is_better=greater_is_better)
    started, here = time.monotonic(), 0
    points = _points(candidates)
    wanted = _wanted_trials(candidates, settings, points)
    while (done := len((known := _known(study)).measured)) < wanted and known.repeats < _MOST_REPEATS:
        if (
            done
            and settings.timeout_seconds is not None
            and time.monotonic() - started > settings.timeout_seconds
        ):
            log.warning(
                "tuning: stopped after %.0f s with %d of %d trials", settings.timeout_seconds, done, wanted
            )
            break
        try:
            trial = _run_trial(study, candidates, settings, score, known, seed=seed, points=points)
        except optuna.exceptions.UpdateFinishedTrialError as err:
            raise TransientError(
                "tuning: another attempt at this search took this one for dead and goes on with it; try again to get what it finds"
            ) from err
        if trial is None:
            continue
        on_trial(done, trial)
        here += 1
        spent = time.monotonic() - started
        log.info("tuning: %s", _progress(study, trial, done + 1, wanted, here, spent))
    if points is not None and done == len(points) and done < settings.trials:
        log.info("tuning: the space holds %d parameter sets, and all are tried", done)
    return _result(study, candidates, storage_url, greater_is_better=greater_is_better)


def make_tables(storage_url: str) -> None:
    """Make the tables of the studies where they are not there yet; for one process at a time."""
    import optuna

    optuna.storages.RDBStorage(storage_url).engine.dispose()


def _open_study(
    name: str, storage_url: str | None, settings: Search, *, greater_is_better: bool
) -> optuna.Study:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        study_name=name,
        storage=storage_url,
        load_if_exists=True,
        direction="maximize" if greater_is_better else "minimize",
        pruner=optuna.pruners.MedianPruner(n_startup_trials=4)
        if settings.prune
        else optuna.pruners.NopPruner(),
    )
    for trial in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)  # its process was killed
    if finished := len(_finished(study)):
        log.info("tuning: %d trials were finished before; going on", finished)
    return study


def _finished(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    from optuna.trial import TrialState

    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))


def _identity(index: int, params: Mapping[str, Any]) -> str:
    """Name a parameter set: the same of the same candidate is fitted once."""
    return json.dumps([index, params], sort_keys=True, default=repr)


class _Known(NamedTuple):
    """What the finished trials of a study found.

    :param measured: those that were fitted, by identity; the sampler's repeats were told what the first one found.
    :param finished: how many there are, repeats included.
    :param repeats: how many since something new was tried.
    """

    measured: dict[str, optuna.trial.FrozenTrial]
    finished: int
    repeats: int


def _known(study: optuna.Study) -> _Known:
    measured: dict[str, optuna.trial.FrozenTrial] = {}
    repeats = 0
    finished = _finished(study)
    for trial in finished:
        identity = _identity(trial.user_attrs["candidate"], trial.user_attrs["params"])
        repeats = repeats + 1 if identity in measured else 0
        measured.setdefault(identity, trial)
    return _Known(measured, len(finished), repeats)


def _wanted_trials(
    candidates: Sequence[Candidate], settings: Search, points: Mapping[str, Any] | None
) -> int:
    """At least one trial per candidate, and no more than there are parameter sets."""
    wanted = max(settings.trials, len(candidates))
    return wanted if points is None else min(wanted, len(points))


def _points(candidates: Sequence[Candidate]) -> dict[str, dict[str, Any]] | None:
    """List every parameter set as the study names its parts; ``None`` where they are endless or too many."""
    listed: dict[str, dict[str, Any]] = {}
    for index, candidate in enumerate(candidates):
        values = [_every_value(space) for space in candidate.space.values()]
        known = [value for value in values if value is not None]
        if len(known) < len(values) or math.prod(map(len, known)) > _MOST_POINTS:
            return None
        for drawn in itertools.product(*known):
            named = dict(zip(candidate.space, drawn, strict=True))
            point = {f"{index}.{name}": value for name, value in named.items()}
            params = candidate.params | _meant(candidate, named)
            listed.setdefault(_identity(index, params), {"candidate": index, **point})
    return listed


def _every_value(space: Range | Sequence[Value]) -> Sequence[Any] | None:
    """Give all that a parameter may be, as the study knows it; ``None`` where that is endless."""
    if not isinstance(space, Range):
        return range(len(space)) if _is_numbered(space) else space
    if space.low == space.high:
        return [int(space.low) if space.integer else float(space.low)]
    if space.integer and space.high - space.low < _MOST_POINTS:
        return range(int(space.low), int(space.high) + 1)
    return None


def _run_trial(
    study: optuna.Study,
    candidates: Sequence[Candidate],
    settings: Search,
    score: FoldScore,
    known: _Known,
    *,
    seed: int,
    points: Mapping[str, dict[str, Any]] | None,
) -> Trial | None:
    """Draw a parameter set and measure it; one that was measured is told again without a fit, and gives ``None``."""
    import optuna

    asked = _ask(study, known, len(candidates), seed=seed, points=points)
    number = known.finished
    index = int(asked.suggest_categorical("candidate", list(range(len(candidates)))))
    asked.set_user_attr("candidate", index)
    candidate = candidates[index]
    params = candidate.params | _suggest(asked, index, candidate)
    earlier = known.measured.get(_identity(index, params))
    if earlier is not None:
        _tell_again(study, asked, earlier)
        return None
    candidate = replace(candidate, params=params, space={})
    asked.set_user_attr("params", candidate.params)
    started = time.monotonic()
    # The first trial of each candidate is not given up: there is nothing yet to compare it with.
    values, state = _score_folds(
        asked, candidate, settings, score, number, may_prune=number >= len(candidates)
    )
    seconds = time.monotonic() - started
    asked.set_user_attr("seconds", seconds)
    complete = state == optuna.trial.TrialState.COMPLETE
    mean = sum(values) / len(values) if complete else None
    study.tell(asked, mean, state=None if complete else state)
    return Trial(
        candidate=candidate.name, params=candidate.params, value=mean, folds=tuple(values), seconds=seconds
    )


def _ask(
    study: optuna.Study,
    known: _Known,
    candidates: int,
    *,
    seed: int,
    points: Mapping[str, dict[str, Any]] | None,
) -> optuna.Trial:
    """Begin a trial whose parameters depend on the finished ones and the seed alone."""
    import numpy as np
    import optuna

    # Not their sum: searches with neighboring seeds would try mostly the same.
    (drawn,) = np.random.SeedSequence(seed, spawn_key=(known.finished,)).generate_state(1)
    # A sampler that drew what is known would draw it again.
    sampler = optuna.samplers.RandomSampler if known.repeats else optuna.samplers.TPESampler
    study.sampler = sampler(seed=int(drawn))
    waiting = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.WAITING,))
    # Every candidate gets a first trial; then the sampler knows something. What a killed process began is begun again, and
    # what it only had put into the queue is still there.
    if not waiting and known.finished < candidates:
        study.enqueue_trial({"candidate": known.finished})
    elif not waiting and known.repeats and points is not None:
        left = [point for identity, point in points.items() if identity not in known.measured]
        study.enqueue_trial(left[int(drawn) % len(left)])
    return study.ask()


def _tell_again(study: optuna.Study, asked: optuna.Trial, earlier: optuna.trial.FrozenTrial) -> None:
    """End a trial with what the one of the same parameters found."""
    for name, value in earlier.user_attrs.items():
        asked.set_user_attr(name, value)
    if earlier.state.name == "COMPLETE":
        study.tell(asked, earlier.value)
        return
    for step, value in earlier.intermediate_values.items():
        asked.report(value, step)
    study.tell(asked, state=earlier.state)


def _score_folds(
    asked: optuna.Trial,
    candidate: Candidate,
    settings: Search,
    score: FoldScore,
    number: int,
    *,
    may_prune: bool,
) -> tuple[list[float], optuna.trial.TrialState]:
    """Score fold after fold, until one fails or the trial is given up."""
    from optuna.trial import TrialState

    started = time.monotonic()
    values: list[float] = []
    asked.set_user_attr("folds", values)
    for fold in range(settings.folds):
        try:
            values.append(score(candidate, fold))
        except (TransientError, MemoryError, OSError):
            raise  # what the machine lacks says nothing of the parameters, which would be known as bad ones for good
        except Exception as err:  # noqa: BLE001 - estimators raise anything on parameters that do not go together
            log.warning(
                "tuning: trial %d, %s with %s failed: %r",
                number + 1,
                candidate.name,
                candidate.params,
                err,
            )
            asked.set_user_attr(_ERROR, f"{type(err).__name__}: {str(err)[:500]}")
            # Not FAIL, which the sampler would not learn from: it would draw the like again and again.
            return values, TrialState.PRUNED
        log.info(
            "tuning: trial %d, %s: fold %d of %d: %.4g after %.1f s",
            number + 1,
            candidate.name,
            fold + 1,
            settings.folds,
            values[-1],
            time.monotonic() - started,
        )
        asked.report(sum(values) / len(values), fold)
        asked.set_user_attr("folds", values)
        if may_prune and fold + 1 < settings.folds and asked.should_prune():
            return values, TrialState.PRUNED
    return values, TrialState.COMPLETE


def _suggest(asked: optuna.Trial, index: int, candidate: Candidate) -> dict[str, Any]:
    """Draw one value per parameter; names carry the candidate, as two may share a parameter."""
    drawn: dict[str, Any] = {}
    for name, space in candidate.space.items():
        label = f"{index}.{name}"
        if not isinstance(space, Range):
            choices: list[Any] = list(range(len(space)) if _is_numbered(space) else space)
            drawn[name] = _chosen(space, asked.suggest_categorical(label, choices))
        elif space.integer:
            drawn[name] = asked.suggest_int(label, int(space.low), int(space.high), log=space.log)
        else:
            drawn[name] = asked.suggest_float(label, space.low, space.high, log=space.log)
    return drawn


def _is_numbered(choices: Sequence[Value]) -> bool:
    """Say whether choices are known to the study by their numbers: it holds no tuples, and takes 1, 1.0 and true for one."""
    known = list(choices)
    return any(
        isinstance(choice, tuple) or known.index(choice) != place for place, choice in enumerate(known)
    )


def _chosen(choices: Sequence[Value], drawn: Any) -> Any:
    return choices[drawn] if _is_numbered(choices) else drawn


def _drawn(trial: optuna.trial.FrozenTrial, candidate: Candidate) -> dict[str, Any]:
    """Give what was drawn in a trial as it was: read from storage, a tuple is a list."""
    drawn = {name: trial.params[f"{trial.user_attrs['candidate']}.{name}"] for name in candidate.space}
    return _meant(candidate, drawn)


def _meant(candidate: Candidate, drawn: Mapping[str, Any]) -> dict[str, Any]:
    """Give the values behind what the study knows of them."""
    choices = {name: space for name, space in candidate.space.items() if not isinstance(space, Range)}
    return {**drawn} | {name: _chosen(space, drawn[name]) for name, space in choices.items()}


def _progress(study: optuna.Study, trial: Trial, done: int, wanted: int, here: int, seconds: float) -> str:
    value = "given up" if trial.value is None else f"{trial.value:.4g}"
    # The study's best_value raises while no trial is complete.
    measured = [one.value for one in study.get_trials(deepcopy=False) if one.value is not None]
    best = f"best {study.best_value:.4g}" if measured else "none measured yet"
    left = seconds / here * (wanted - done)
    return (
        f"trial {done} of {wanted}: {trial.candidate} {value} in {trial.seconds:.1f} s; {best}; "
        f"about {left:.0f} s to go"
    )


def _result(
    study: optuna.Study, candidates: Sequence[Candidate], storage_url: str | None, *, greater_is_better: bool
) -> SearchResult:
    import optuna

    tried = list(_known(study).measured.values())
    complete = [
        (trial, trial.value) for trial in tried if trial.value is not None and trial.state.name == "COMPLETE"
    ]
    if not complete:
        errors = [trial.user_attrs[_ERROR] for trial in tried if _ERROR in trial.user_attrs]
        if storage_url is not None:  # kept, it would leave a retry nothing to try
            optuna.delete_study(study_name=study.study_name, storage=storage_url)
        raise ValueError(f"tuning: all {len(tried)} trials failed, the last with {errors[-1]}")
    sign = 1.0 if greater_is_better else -1.0
    best, value = max(complete, key=lambda pair: sign * pair[1])
    candidate = candidates[best.user_attrs["candidate"]]
    known = {trial.user_attrs["candidate"] for trial in tried}
    return SearchResult(
        best=replace(candidate, params=candidate.params | _drawn(best, candidate), space={}),
        value=float(value),
        trials=tuple(
            Trial(
                candidate=candidates[trial.user_attrs["candidate"]].name,
                params=trial.user_attrs["params"],
                value=trial.value if trial.state.name == "COMPLETE" else None,
                folds=tuple(trial.user_attrs["folds"]),
                seconds=trial.user_attrs["seconds"],
            )
            for trial in tried
        ),
        untried=tuple(one.estimator for index, one in enumerate(candidates) if index not in known),
    )
