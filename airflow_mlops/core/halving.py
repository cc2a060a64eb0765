"""Successive halving: many parameter sets on few rows, the better ones on more."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from airflow_mlops.core.tuning import Candidate, Search, SearchResult, Trial

log = logging.getLogger(__name__)

#: ``score(candidate, fold, share) -> value``: fit on a share of the fold's rows, measure on those it is checked on.
Score = Callable[[Candidate, int, float], float]


def successive_halving(
    families: Sequence[Sequence[Candidate]],
    settings: Search,
    score: Score,
    *,
    greater_is_better: bool,
    on_trial: Callable[[int, Trial], None],
) -> SearchResult:
    """Try each family's parameter sets on few rows and the better ones on more; keep the best of all on all rows.

    Source: Jamieson and Talwalkar, "Non-stochastic best arm identification and hyperparameter optimization",
    AISTATS 2016.

    :param families: parameter sets that compete with each other, drawn already.
    :param settings: folds and time limit; after it no set is tried, once one was tried on all rows.
    :param score: fits and measures.
    :param greater_is_better: direction of the value.
    :param on_trial: told of every set that was tried on all rows.
    :raises ValueError: every set failed.
    """
    sign = 1.0 if greater_is_better else -1.0
    clock = _Clock(sum(count * share for sets in families for count, share in rungs(len(sets))))
    finished: list[tuple[Candidate, Trial]] = []
    for sets in families:
        standing = list(sets)
        for count, share in rungs(len(sets)):
            tried: list[tuple[float, Candidate]] = []
            for candidate in standing[:count]:
                if (
                    finished
                    and settings.timeout_seconds is not None
                    and clock.seconds > settings.timeout_seconds
                ):
                    log.warning("tuning: stopped after %.0f s", settings.timeout_seconds)
                    return _best(finished, sign)
                trial = _try(candidate, share, settings.folds, score)
                clock.tell(candidate, share, trial)
                if trial.value is not None:
                    tried.append((sign * trial.value, candidate))
                if share == 1.0:
                    finished.append((candidate, trial))
                    on_trial(len(finished) - 1, trial)
            standing = [candidate for _, candidate in sorted(tried, key=lambda pair: -pair[0])]
    return _best(finished, sign)


def rungs(sets: int, factor: int = 3) -> list[tuple[int, float]]:
    """Say how many parameter sets are tried on which share of the rows: a third on three times as many, up to all.

    >>> [(count, round(share, 3)) for count, share in rungs(20)]
    [(20, 0.111), (6, 0.333), (2, 1.0)]
    """
    counts = [sets]
    while counts[-1] > factor:
        counts.append(counts[-1] // factor)
    return [(count, factor ** -(len(counts) - 1.0 - place)) for place, count in enumerate(counts)]


class _Clock:
    """Tells how far the search is; a fit counts by the share of rows it takes."""

    def __init__(self, work: float) -> None:
        self.work, self.done, self.started = work, 0.0, time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def tell(self, candidate: Candidate, share: float, trial: Trial) -> None:
        self.done += share
        value = "failed" if trial.value is None else f"{trial.value:.4g}"
        left = self.seconds / self.done * (self.work - self.done)
        log.info(
            "tuning: %s on %.0f %% of the rows: %s; about %.0f s to go",
            candidate.name,
            100 * share,
            value,
            left,
        )


def _try(candidate: Candidate, share: float, folds: int, score: Score) -> Trial:
    """Score one parameter set; one that fails is logged, and does not end the search."""
    started, values = time.monotonic(), list[float]()
    try:
        values.extend(score(candidate, fold, share) for fold in range(folds))
    except Exception:
        # Estimators raise anything on parameters that do not go together.
        log.warning("tuning: %s with %s failed", candidate.name, candidate.params, exc_info=True)
    return Trial(
        candidate=candidate.name,
        params=candidate.params,
        value=sum(values) / folds if len(values) == folds else None,
        folds=tuple(values),
        seconds=time.monotonic() - started,
    )


def _best(finished: Sequence[tuple[Candidate, Trial]], sign: float) -> SearchResult:
    measured = [(candidate, trial.value) for candidate, trial in finished if trial.value is not None]
    if not measured:
        raise ValueError("tuning: every parameter set failed; the log says of what")
    best, value = max(measured, key=lambda pair: sign * pair[1])
    return SearchResult(best=best, value=value, trials=tuple(trial for _, trial in finished))
