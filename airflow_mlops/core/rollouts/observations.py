"""Observations of an endpoint: what each version did while several were served, as counts that add up over workers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

#: Times are counted in cells whose edges grow by this factor, from a microsecond on: a ratio of times is a distance in cells.
TIME_GROWTH = 1.05
FIRST_SECONDS = 1e-6
#: The last cell begins at two minutes.
TIME_CELLS = 382


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswerCells:
    """Into which cells answers are counted; one for all versions of an endpoint.

    :param edges: of numbers, ascending; below the first and from the last on are cells of their own.
    :param labels: of labels; others are counted together.
    """

    edges: tuple[float, ...] = ()
    labels: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        """How many cells there are."""
        return len(self.labels) + 1 if self.labels else len(self.edges) + 1

    def counts(self, answers: Sequence[Any]) -> Array:
        """Count answers, shape ``(count,)``."""
        if self.labels:
            numbers = {label: number for number, label in enumerate(self.labels)}
            cells = np.array([numbers.get(answer, len(numbers)) for answer in answers], dtype=np.int64)
        else:
            values = np.asarray(answers, dtype=np.float64)
            cells = np.searchsorted(np.asarray(self.edges), values, side="right")
        return np.bincount(cells, minlength=self.count)


@dataclass(frozen=True, kw_only=True, slots=True)
class VersionObservations:
    """What one version did.

    :param requests: that it was asked to answer.
    :param failed: of these, how many it failed on: an exception, or no finite number.
    :param callers: how many it was asked by, where callers stay with their version: as many as one worker saw, at least.
    :param rows: that it answered.
    :param times: requests by the time they took, by cell; see :func:`time_cell`.
    :param answers: rows by answer, by cell of :class:`AnswerCells`.
    :param sums: sum and sum of squares of answers that are numbers.
    :param pairs: rows that it answered as a mirror, beside the answer that was returned.
    :param differing: of these, rows with another label.
    :param absolute_difference: sum over them of the distance between two numbers.
    """

    requests: int = 0
    failed: int = 0
    callers: int = 0
    rows: int = 0
    times: tuple[int, ...] = ()
    answers: tuple[int, ...] = ()
    sums: tuple[float, float] = (0.0, 0.0)
    pairs: int = 0
    differing: int = 0
    absolute_difference: float = 0.0

    def __add__(self, other: VersionObservations) -> VersionObservations:
        """Add what two workers saw."""
        return VersionObservations(
            requests=self.requests + other.requests,
            failed=self.failed + other.failed,
            callers=max(self.callers, other.callers),
            rows=self.rows + other.rows,
            times=_added(self.times, other.times),
            answers=_added(self.answers, other.answers),
            sums=(self.sums[0] + other.sums[0], self.sums[1] + other.sums[1]),
            pairs=self.pairs + other.pairs,
            differing=self.differing + other.differing,
            absolute_difference=self.absolute_difference + other.absolute_difference,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Observations:
    """What the versions of an endpoint did under one desired state.

    :param revision: of the desired state.
    :param cells: of the answers.
    :param versions: by version.
    :param shed: answers that the mirror had no time to compare.
    :param fell_back: why the stable version answers everything, though something else was asked for.
    """

    revision: int
    cells: AnswerCells = AnswerCells()
    versions: Mapping[str, VersionObservations] = field(default_factory=dict)
    shed: int = 0
    fell_back: str | None = None

    def of(self, model_version: str) -> VersionObservations:
        """Give what a version did; nothing, where it was not seen."""
        return self.versions.get(model_version, VersionObservations())


def merge_observations(parts: Iterable[Observations]) -> Observations:
    """Add up what several workers saw under the same desired state.

    :raises ValueError: none is given, or they are of different states.
    """
    first, *rest = parts
    versions, shed, fell_back = dict(first.versions), first.shed, first.fell_back
    for part in rest:
        if part.revision != first.revision or part.cells != first.cells:
            raise ValueError(f"observations of revisions {first.revision} and {part.revision} can't be added")
        for name, seen in part.versions.items():
            versions[name] = versions[name] + seen if name in versions else seen
        shed += part.shed
        fell_back = fell_back or part.fell_back
    return Observations(
        revision=first.revision, cells=first.cells, versions=versions, shed=shed, fell_back=fell_back
    )


def count_times(seconds: Sequence[float]) -> Array:
    """Count times by cell, shape ``(TIME_CELLS,)``: cell ``i`` begins at ``FIRST_SECONDS * TIME_GROWTH**i``."""
    values = np.maximum(np.asarray(seconds, dtype=np.float64), FIRST_SECONDS)
    cells = np.floor(np.log(values / FIRST_SECONDS) / math.log(TIME_GROWTH)).astype(np.int64)
    return np.bincount(np.minimum(cells, TIME_CELLS - 1), minlength=TIME_CELLS)


def time_quantile(times: Sequence[int], share: float) -> float:
    """Give the time within which a share of the requests was answered, in seconds: the end of its cell.

    >>> round(time_quantile(count_times([0.001, 0.002, 0.004]).tolist(), 1.0), 4)
    0.004

    :raises ValueError: there are no requests.
    """
    counts = np.asarray(times)
    if counts.sum() == 0:
        raise ValueError("no request: there is no time to tell")
    cell = int(np.searchsorted(np.cumsum(counts), share * counts.sum()))
    return float(FIRST_SECONDS * TIME_GROWTH ** (min(cell, len(counts) - 1) + 1))


def _added(one: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, ...]:
    if not one or not other:
        return one or other
    return tuple(a + b for a, b in zip(one, other, strict=True))
