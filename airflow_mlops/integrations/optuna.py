"""Optuna: search several candidates in one study that survives the process it runs in."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from airflow_mlops.core.model.tuning import Candidate, Range, Search, SearchResult, Trial, Value
from airflow_mlops.exceptions import TransientError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import optuna

    from airflow_mlops.core.model.tuning import FoldScore

log = logging.getLogger(__name__)

#: Attribute of a trial that failed: with what.
_ERROR = "error"


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
    wanted = _wanted_trials(candidates, settings)
    while (done := len(_finished(study))) < wanted:
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
            trial = _run_trial(study, candidates, settings, score, seed=seed, number=done)
        except optuna.exceptions.UpdateFinishedTrialError as err:
            raise TransientError(
                "tuning: another attempt at this search took this one for dead and goes on with it; try again to get what it finds"
            ) from err
        on_trial(done, trial)
        here += 1
        spent = time.monotonic() - started
        log.info("tuning: %s", _progress(study, trial, done + 1, wanted, here, spent))
    return _result(study, candidates, storage_url)


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


def _wanted_trials(candidates: Sequence[Candidate], settings: Search) -> int:
    """At least one trial per candidate, and no more than one where there is nothing to search."""
    if not any(candidate.space for candidate in candidates):
        return len(candidates)
    return max(settings.trials, len(candidates))


def _run_trial(
    study: optuna.Study,
    candidates: Sequence[Candidate],
    settings: Search,
    score: FoldScore,
    *,
    seed: int,
    number: int,
) -> Trial:
    import numpy as np
    import optuna

    # Not their sum: searches with neighboring seeds would try mostly the same.
    (drawn,) = np.random.SeedSequence(seed, spawn_key=(number,)).generate_state(1)
    study.sampler = optuna.samplers.TPESampler(seed=int(drawn))
    waiting = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.WAITING,))
    # Every candidate gets a first trial; then the sampler knows something. What a killed process began is begun again, and
    # what it only had put into the queue is still there.
    if number < len(candidates) and not waiting:
        study.enqueue_trial({"candidate": number})
    asked = study.ask()
    index = int(asked.suggest_categorical("candidate", list(range(len(candidates)))))
    asked.set_user_attr("candidate", index)
    candidate = candidates[index]
    params = candidate.params | _suggest(asked, index, candidate)
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
        except TransientError:
            raise
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
    choices = {name: space for name, space in candidate.space.items() if not isinstance(space, Range)}
    return drawn | {name: _chosen(space, drawn[name]) for name, space in choices.items()}


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


def _result(study: optuna.Study, candidates: Sequence[Candidate], storage_url: str | None) -> SearchResult:
    import optuna

    finished = _finished(study)
    if not any(trial.value is not None for trial in finished):
        errors = [trial.user_attrs[_ERROR] for trial in finished if _ERROR in trial.user_attrs]
        if storage_url is not None:  # kept, it would leave a retry nothing to try
            optuna.delete_study(study_name=study.study_name, storage=storage_url)
        raise ValueError(f"tuning: all {len(finished)} trials failed, the last with {errors[-1]}")
    best = study.best_trial
    candidate = candidates[best.user_attrs["candidate"]]
    return SearchResult(
        best=replace(candidate, params=candidate.params | _drawn(best, candidate), space={}),
        value=float(best.value or 0.0),
        trials=tuple(
            Trial(
                candidate=candidates[trial.user_attrs["candidate"]].name,
                params=trial.user_attrs["params"],
                value=trial.value if trial.state.name == "COMPLETE" else None,
                folds=tuple(trial.user_attrs["folds"]),
                seconds=trial.user_attrs["seconds"],
            )
            for trial in finished
        ),
    )
