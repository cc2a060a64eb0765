"""Observations of an endpoint: what each version did while several were served, as counts that add up over workers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from airflow_mlops.core.rollouts.drawn_requests import DrawnRequests, merge_drawn

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

    def of(self, answers: Sequence[Any]) -> Array:
        """Give the number of each answer's cell, shape ``(n,)``."""
        if self.labels:
            numbers = {label: number for number, label in enumerate(self.labels)}
            return np.array([numbers.get(answer, len(numbers)) for answer in answers], dtype=np.int64)
        values = np.asarray(answers, dtype=np.float64)
        return np.searchsorted(np.asarray(self.edges), values, side="right").astype(np.int64)

    def counts(self, answers: Sequence[Any]) -> Array:
        """Count answers, shape ``(count,)``."""
        return np.bincount(self.of(answers), minlength=self.count)


@dataclass(frozen=True, kw_only=True, slots=True)
class VersionObservations:
    """What one version did.

    :param requests: that it was asked to answer.
    :param failed: of these, how many it failed on: an exception, or no finite number.
    :param refused: requests beside these that were drawn for it and refused for what the caller sent: they tell how traffic was split, and
        nothing else.
    :param rows: that it answered.
    :param times: requests by the time they took, by cell; see :func:`time_cells`.
    :param answers: answered requests by the answer to one of their rows, by cell of :class:`AnswerCells`; see :func:`draw_answers`.
    :param sums: sum and sum of squares of all answers, where they are numbers.
    :param pairs: rows that it answered as a mirror, beside the answer that was returned.
    :param differing: of these, rows with another label.
    :param absolute_difference: sum over them of the distance between two numbers.
    """

    requests: int = 0
    failed: int = 0
    refused: int = 0
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
            refused=self.refused + other.refused,
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
    :param drawn: one request of each caller, where callers stay with their version.
    :param shed: answers that the mirror had no time to compare.
    :param fell_back: why the stable version answers everything, though something else was asked for.
    :param died: workers that died while they computed answers, each by the versions whose answers these were; over all phases of the
        rollout.
    """

    revision: int
    cells: AnswerCells = AnswerCells()
    versions: Mapping[str, VersionObservations] = field(default_factory=dict)
    drawn: DrawnRequests | None = None
    shed: int = 0
    fell_back: str | None = None
    died: tuple[tuple[str, ...], ...] = ()

    def of(self, model_version: str) -> VersionObservations:
        """Give what a version did; nothing, where it was not seen."""
        return self.versions.get(model_version, VersionObservations())

    def of_callers(self, model_version: str) -> VersionObservations:
        """Give what a version did on one request of each caller: each of them was drawn by lot once, however often he asks."""
        if self.drawn is None:
            return VersionObservations()
        requests, times, answers = self.drawn.of(model_version)
        return VersionObservations(
            requests=requests,
            failed=requests - len(times),
            refused=self.drawn.refused(model_version),
            rows=len(answers),
            times=_counted(times, TIME_CELLS),
            answers=_counted(answers, self.cells.count),
        )


def merge_observations(parts: Iterable[Observations]) -> Observations:
    """Add up what several workers saw under the same desired state.

    :raises ValueError: none is given, or they are of different states.
    """
    first, *rest = parts
    versions, shed, fell_back = dict(first.versions), first.shed, first.fell_back
    drawn = [part.drawn for part in (first, *rest) if part.drawn is not None]
    for part in rest:
        if part.revision != first.revision or part.cells != first.cells:
            raise ValueError(f"observations of revisions {first.revision} and {part.revision} can't be added")
        for name, seen in part.versions.items():
            versions[name] = versions[name] + seen if name in versions else seen
        shed += part.shed
        fell_back = fell_back or part.fell_back
    return Observations(
        revision=first.revision,
        cells=first.cells,
        versions=versions,
        drawn=merge_drawn(drawn) if drawn else None,
        shed=shed,
        fell_back=fell_back,
    )


def draw_answers(requests: Iterable[Sequence[Any]], random: np.random.Generator) -> list[Any]:
    """Draw the answer to one row of each request: rows that were asked for together are alike, and would pass for more than they are.

    :param requests: the answers to each, one per row; to each there is one at least.
    """
    # One number for each is drawn at once, as this is many times as fast as to draw for each.
    answered = list(requests)
    points = random.random(len(answered)).tolist()
    return [
        answers[0] if len(answers) == 1 else answers[int(point * len(answers))]
        for answers, point in zip(answered, points, strict=True)
    ]


def time_cells(seconds: Sequence[float]) -> Array:
    """Give the number of each time's cell, shape ``(n,)``: cell ``i`` begins at ``FIRST_SECONDS * TIME_GROWTH**i``."""
    values = np.maximum(np.asarray(seconds, dtype=np.float64), FIRST_SECONDS)
    cells = np.floor(np.log(values / FIRST_SECONDS) / math.log(TIME_GROWTH)).astype(np.int64)
    return np.minimum(cells, TIME_CELLS - 1)


def count_times(seconds: Sequence[float]) -> Array:
    """Count times by cell, shape ``(TIME_CELLS,)``; see :func:`time_cells`."""
    return np.bincount(time_cells(seconds), minlength=TIME_CELLS)


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


def _counted(cells: Array, count: int) -> tuple[int, ...]:
    return tuple(np.bincount(cells, minlength=count).tolist()) if len(cells) else ()
