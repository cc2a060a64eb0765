"""Tuning: the candidates, the space each is searched in, and which one is kept."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import ConfigDict, Discriminator, Tag

if TYPE_CHECKING:
    from numpy.typing import NDArray

_Plain = str | int | float | bool | None
#: One of the choices for a parameter: what JSON has, or several of them, as the sizes of layers.
Value = _Plain | tuple[_Plain, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Range:
    """Numbers a parameter may take.

    :param low: smallest.
    :param high: largest, included; the same as ``low`` for one value only.
    :param log: draw evenly in the logarithm: for learning rates and penalties.
    :param integer: whole numbers only.
    :raises ValueError: an empty or endless range, a logarithm of what is not positive, or fractions as ends of whole numbers.
    """

    #: A misspelled ``log`` would be a range of another kind without a word.
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    low: float
    high: float
    log: bool = False
    integer: bool = False

    def __post_init__(self) -> None:
        if not self.low <= self.high:
            raise ValueError(f"range from {self.low} to {self.high} is empty")
        if math.isinf(self.high - self.low):
            raise ValueError(
                f"range from {self.low} to {self.high} has no end to draw up to; give finite numbers"
            )
        if self.integer and (self.low % 1 or self.high % 1):
            raise ValueError(
                f"range of whole numbers from {self.low} to {self.high} has a fraction at its end; give whole numbers"
            )
        if self.log and self.low <= 0:
            raise ValueError(f"a logarithmic range can't begin at {self.low}; it must be positive")


def _kind(part: Any) -> str | None:
    """Say which of the two a part of a space is meant to be, so that what is wrong is told of that one only."""
    if isinstance(part, Range | Mapping):
        return "range"
    return "choices" if isinstance(part, list | tuple) else None


_Part = Annotated[
    Annotated[Range, Tag("range")] | Annotated[tuple[Value, ...], Tag("choices")],
    Discriminator(
        _kind,
        custom_error_type="space",
        custom_error_message='give a list of choices, or a range {"low": .., "high": ..}',
    ),
]
Space = dict[str, _Part]


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """An estimator to try.

    :param estimator: import path of a scikit-learn estimator or of a factory function.
    :param params: its fixed arguments; ``a__b`` reaches into a nested estimator.
    :param space: arguments to search: a range ``{"low": .., "high": .., "log": .., "integer": ..}`` or a list of choices.
    :raises ValueError: an empty list of choices.
    """

    estimator: str
    params: dict[str, Any] = field(default_factory=dict)
    space: Space = field(default_factory=dict)

    def __post_init__(self) -> None:
        empty = [name for name, space in self.space.items() if not isinstance(space, Range) and not space]
        if empty:
            raise ValueError(
                f"space of {self.estimator!r} gives no value for {', '.join(empty)}; give choices, or leave it out"
            )

    @property
    def name(self) -> str:
        """The last part of the import path."""
        return self.estimator.replace(":", ".").rpartition(".")[2]

    def example(self) -> Candidate:
        """Give one of the sets of arguments in the space: enough to ask what kind of estimator it is."""
        drawn = {
            name: (int(space.low) if space.integer else space.low) if isinstance(space, Range) else space[0]
            for name, space in self.space.items()
        }
        return replace(self, params=self.params | drawn, space={})


@dataclass(frozen=True, kw_only=True, slots=True)
class Search:
    """How candidates are compared: by cross-validation inside the training rows; the held-out rows stay unseen.

    :param method: ``optuna`` (Bayesian, all candidates in one study) or ``halving`` (scikit-learn's halving
        search, each candidate by itself, best of the winners).
    :param trials: parameter sets to try in all.
    :param folds: of the time-ordered cross-validation.
    :param prune: give a trial up when its first folds are worse than the median of the others'.
    :param timeout_seconds: start no trial after this; ``None``: no limit.
    :raises ValueError: fewer than one trial or two folds.
    """

    method: Literal["optuna", "halving"] = "optuna"
    trials: int = 20
    folds: int = 3
    prune: bool = True
    timeout_seconds: float | None = None

    def __post_init__(self) -> None:
        if self.trials < 1:
            raise ValueError(f"trials is {self.trials}; at least 1 is needed")
        if self.folds < 2:
            raise ValueError(f"folds is {self.folds}; at least 2 are needed")


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """One parameter set and how it did.

    :param candidate: name of the estimator.
    :param params: every argument it was given.
    :param value: mean of the metric over the folds; ``None`` when it was given up or failed.
    :param folds: the metric per fold that was scored.
    :param seconds: wall time.
    """

    candidate: str
    params: dict[str, Any]
    value: float | None
    folds: tuple[float, ...]
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchResult:
    """The winner and its evidence.

    :param best: candidate with the parameters that won, none left to search.
    :param value: its cross-validated metric.
    :param trials: every one, in order.
    :param untried: import paths of candidates that the time limit left no trial for.
    """

    best: Candidate
    value: float
    trials: tuple[Trial, ...]
    untried: tuple[str, ...] = ()


#: ``score(candidate, fold) -> metric``: fit on the fold's training rows, score on the rows after them.
FoldScore = Callable[[Candidate, int], float]


def time_ordered_folds(times: NDArray[Any], folds: int) -> list[tuple[NDArray[np.intp], NDArray[np.intp]]]:
    """Cut ordered rows into folds that always validate on what came later.

    The rows are cut into ``folds + 1`` parts of about equal size; fold ``k`` trains on the first ``k + 1`` parts and
    validates on the next. Rows of one instant are never on both sides.

    Source: Tashman, "Out-of-sample tests of forecasting accuracy: an analysis and review", International Journal of
    Forecasting 16, 2000 (rolling origin with a growing training set).

    :param times: when each row happened, ascending, shape ``(n,)``.
    :param folds: number of folds.
    :returns: training and validation row numbers per fold.
    :raises ValueError: too few distinct instants to cut.

    >>> [(len(train), len(test)) for train, test in time_ordered_folds(np.arange(8), 3)]
    [(2, 2), (4, 2), (6, 2)]
    """
    cuts = [
        int(np.searchsorted(times, times[len(times) * part // (folds + 1)])) for part in range(1, folds + 1)
    ]
    ends = [0, *cuts, len(times)]
    if any(start >= end for start, end in itertools.pairwise(ends)):
        raise ValueError(
            f"{len(times)} training rows at {len(np.unique(times))} instants can't be cut into {folds} time-ordered "
            "folds; use fewer folds or more rows"
        )
    return [(np.arange(cuts[fold]), np.arange(cuts[fold], ends[fold + 2])) for fold in range(folds)]


def best_of(results: Sequence[Mapping[str, Any]], *, greater_is_better: bool) -> int:
    """Say which training result has the best cross-validated metric; the first of equals.

    :param results: with ``validation_value``, and ``metric`` the same in all.
    :raises ValueError: nothing to choose from, different metrics, or one that was not cross-validated: choosing by
        the held-out rows would leave no rows to judge the chosen one on.
    """
    if not results:
        raise ValueError("there is no candidate to choose from")
    metrics = sorted({str(result["metric"]) for result in results})
    if len(metrics) > 1:
        raise ValueError(f"the candidates were measured by different metrics ({', '.join(metrics)})")
    unmeasured = [str(result["run_id"]) for result in results if result.get("validation_value") is None]
    if unmeasured:
        raise ValueError(
            f"run {unmeasured[0]} was trained without cross-validation; give it search={{'folds': 3}}"
        )
    values = [float(result["validation_value"]) for result in results]
    return values.index(max(values) if greater_is_better else min(values))
