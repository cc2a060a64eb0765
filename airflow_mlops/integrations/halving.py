"""scikit-learn's halving search: many parameter sets on few rows, the better ones on more."""

from __future__ import annotations

import logging
import math
import time
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np

from airflow_mlops.core.model.tuning import Candidate, Search, SearchResult, Trial
from airflow_mlops.exceptions import TransientError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    Rows = NDArray[np.intp]
    #: ``score(candidate, learn, check) -> metric``: fit on some rows, measure on others, both by number.
    RowsScore = Callable[[Candidate, Rows, Rows], float]

log = logging.getLogger(__name__)

#: Of each round this share of the sets goes on, and gets so many times the rows.
FACTOR = 3


def search(
    families: Sequence[Sequence[Candidate]],
    settings: Search,
    score: RowsScore,
    *,
    folds: Sequence[tuple[Rows, Rows]],
    greater_is_better: bool,
    on_trial: Callable[[int, Trial], None],
) -> SearchResult:
    """Search each family by itself, and keep the best of those that were tried on all rows.

    The rows of a round are spread evenly over the learning rows of each fold, so that old and new ones are in it; what is
    checked is the whole fold.

    Source: Jamieson and Talwalkar, "Non-stochastic best arm identification and hyperparameter optimization",
    AISTATS 2016; scikit-learn's ``HalvingGridSearchCV``.

    :param families: parameter sets that compete with each other, drawn already.
    :param settings: the time limit; after it no set is tried, once one was measured on all rows.
    :param score: fits and measures.
    :param folds: numbers of the rows to learn from and to check on, per fold.
    :param greater_is_better: direction of the metric.
    :param on_trial: told of every set that was tried on all rows.
    :raises ValueError: every set failed; with the last one's error.
    """
    work = _Work(families, settings, score, folds, sign=1.0 if greater_is_better else -1.0, on_trial=on_trial)
    try:
        for sets in families:
            _halve(sets, work)
    except _TimeIsUpError:
        log.warning("tuning: stopped after %.0f s", settings.timeout_seconds)
    return work.result()


def _halve(sets: Sequence[Candidate], work: _Work) -> None:
    """Let scikit-learn search one family.

    What it sees are row numbers and the sets' numbers: a set may name arguments of a user's function, which are no
    parameters of the pipeline that the function gives; and the resource is a share of the rows to learn from, where
    scikit-learn's own would thin out the rows that are checked as well.
    """
    from sklearn.base import BaseEstimator
    from sklearn.experimental import enable_halving_search_cv  # noqa: F401  the import is the switch
    from sklearn.model_selection import HalvingGridSearchCV

    class Attempt(BaseEstimator):  # type: ignore[misc]
        """One parameter set on a part of the rows."""

        def __init__(self, number: int = 0, part: int = 1) -> None:
            self.number = number
            self.part = part

        def fit(self, rows: NDArray[Any], target: None = None) -> Attempt:
            self.learn_ = rows[:, 0]  # fitted where the time is taken and failures are told, in the scorer
            return self

    whole = FACTOR ** last_round(len(sets))

    def scorer(attempt: Attempt, rows: NDArray[Any], target: None = None) -> float:
        return work.score(sets[attempt.number], attempt.part / whole, attempt.learn_, rows[:, 0])

    halving = HalvingGridSearchCV(
        Attempt(),
        {"number": list(range(len(sets)))},
        factor=FACTOR,
        resource="part",
        min_resources=1,
        # Twice, as scikit-learn takes a logarithm of it: that of 243 is a bit below 5, and the last round would be left out.
        max_resources=2 * whole,
        cv=list(work.folds),
        scoring=scorer,
        refit=False,
        error_score="raise",
        return_train_score=False,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "One or more of the test scores are non-finite", UserWarning)
        halving.fit(np.arange(max(int(check.max()) for _, check in work.folds) + 1)[:, None])


def last_round(sets: int) -> int:
    """Give the number of the round in which at most three sets are left, from 0."""
    return math.floor(math.log(sets, FACTOR))  # as scikit-learn has it, to the bit


def _planned(sets: int) -> float:
    """Say how many fits on all rows the search of one family costs."""
    last = last_round(sets)
    fits: float = sum(math.ceil(sets / FACTOR**place) / FACTOR ** (last - place) for place in range(last + 1))
    return fits


class _TimeIsUpError(Exception):
    """No set shall be tried any more."""


class _Work:
    """Scores parameter sets fold by fold, tells how it goes, and knows what was tried on all rows."""

    def __init__(
        self,
        families: Sequence[Sequence[Candidate]],
        settings: Search,
        score: RowsScore,
        folds: Sequence[tuple[Rows, Rows]],
        *,
        sign: float,
        on_trial: Callable[[int, Trial], None],
    ) -> None:
        self.settings, self.folds, self.sign, self.on_trial = settings, folds, sign, on_trial
        self.finished: list[tuple[Candidate, Trial]] = []
        self._score = score
        self._families = families
        self._planned, self._done = sum(_planned(len(sets)) for sets in families), 0.0
        self._began = self._begun = time.monotonic()
        self._values: list[float] = []
        self._error: Exception | None = None

    def score(self, candidate: Candidate, share: float, learn: Rows, check: Rows) -> float:
        """Score one fold; a set that fails is worse than all others, and does not end the search."""
        if not self._values:
            self._require_time()
            self._begun = time.monotonic()
        self._values.append(self._try(candidate, _spread(learn, share), check))
        value = self._values[-1]
        if len(self._values) == len(self.folds):
            self._tell(candidate, share)
            self._values = []
        return self.sign * value

    def _require_time(self) -> None:
        limit = self.settings.timeout_seconds
        measured = any(trial.value is not None for _, trial in self.finished)
        if measured and limit is not None and time.monotonic() - self._began > limit:
            raise _TimeIsUpError

    def _try(self, candidate: Candidate, learn: Rows, check: Rows) -> float:
        if any(math.isnan(value) for value in self._values):  # failed on an earlier fold
            return math.nan
        try:
            return self._score(candidate, learn, check)
        except (TransientError, MemoryError, OSError):
            raise  # what the machine lacks says nothing of the parameters
        except Exception as err:
            # Estimators raise anything on parameters that do not go together.
            log.warning("tuning: %s with %s failed", candidate.name, candidate.params, exc_info=True)
            self._error = err
            return math.nan

    def _tell(self, candidate: Candidate, share: float) -> None:
        now = time.monotonic()
        values = tuple(value for value in self._values if not math.isnan(value))
        trial = Trial(
            candidate=candidate.name,
            params=candidate.params,
            value=sum(values) / len(values) if len(values) == len(self.folds) else None,
            folds=values,
            seconds=now - self._begun,
        )
        self._done += share
        log.info(
            "tuning: %s on %.0f %% of the rows: %s; about %.0f s to go",
            candidate.name,
            100 * share,
            "failed" if trial.value is None else f"{trial.value:.4g}",
            (now - self._began) / self._done * (self._planned - self._done),
        )
        if share == 1.0:
            self.finished.append((candidate, trial))
            self.on_trial(len(self.finished) - 1, trial)

    def result(self) -> SearchResult:
        """Give the best of the sets that were tried on all rows.

        :raises ValueError: none was measured.
        """
        measured = [(one, trial.value) for one, trial in self.finished if trial.value is not None]
        if not measured:
            last = f"{type(self._error).__name__}: {str(self._error)[:500]}" if self._error else "no number"
            raise ValueError(f"tuning: every parameter set failed, the last with {last}")
        best, value = max(measured, key=lambda pair: self.sign * pair[1])
        known = [one for one, _ in self.finished]
        return SearchResult(
            best=best,
            value=value,
            trials=tuple(trial for _, trial in self.finished),
            untried=tuple(
                sets[0].estimator for sets in self._families if not any(one in known for one in sets)
            ),
        )


def _spread(rows: Rows, share: float) -> Rows:
    """Take a share of the rows, evenly spread, at least two."""
    if share == 1.0:
        return rows
    return np.asarray(rows[np.linspace(0, len(rows) - 1, max(2, int(share * len(rows)))).astype(int)])
