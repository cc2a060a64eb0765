"""Shapley values: a row's score shared out among its inputs, against rows that stand for not knowing them."""

from __future__ import annotations

from dataclasses import dataclass
from math import comb
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from collections.abc import Iterator

    from airflow_mlops.core.model.explanation import Score, Table

Floats = NDArray[np.float64]

#: Made-up rows that the model is asked about in one call: enough that the call is cheap, few enough that building them holds
#: nobody up.
ROWS_AT_ONCE = 2_048

#: Inputs from which on coalitions are drawn, however many evaluations are allowed.
_MOST_EXACT = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Contributions:
    """Scores shared out among inputs: each is the base value plus the contributions of its row.

    :param scores: what the model gives; shape ``(rows,)``.
    :param base_value: mean score of the background rows.
    :param values: contributions; shape ``(rows, inputs)``, in the order of the columns.
    :param standard_errors: how far they may be off because permutations were drawn; shape ``(rows, inputs)``. Zero where nothing
        was drawn, NaN where too little was drawn to tell.
    """

    scores: Floats
    base_value: float
    values: Floats
    standard_errors: Floats


class _Asked(NamedTuple):
    """Rows to make up: cells of the explained row where ``own``, of a background row elsewhere.

    :param own: shape ``(rows, inputs)``.
    :param background: number of the background row; shape ``(rows,)``.
    """

    own: NDArray[np.bool_]
    background: NDArray[np.intp]


class _Plan(Protocol):
    """Which rows to make up for an explanation, and how to share out what the model says to them."""

    size: int

    def asked(self, numbers: NDArray[np.intp]) -> _Asked:
        """Give some of the rows to make up, by their numbers below ``size``."""
        ...

    def shared(self, inside: Floats, *, bottoms: Floats, top: float) -> tuple[Floats, Floats]:
        """Give contributions and their standard errors, of shape ``(inputs,)``.

        :param inside: scores of the rows that were made up.
        :param bottoms: scores of the background rows.
        :param top: score of the explained row.
        """
        ...


class Shapley:
    """Share scores out among the inputs of a row.

    What is played for is the mean score over the background rows, with the inputs that are known taken from the explained row and
    the others from the background row. Contributions are Shapley values of that game: they add up to the score minus the base value,
    inputs that play the same part get the same, and one that changes no answer gets nothing.

    With few inputs every coalition is asked for. With many, each background row is turned into the explained one input by input, in
    an order that is drawn, and in the opposite order: so contributions add up whatever was drawn, and are exact where no more
    than two inputs act together. The same rows are explained the same way every time.

    Source: Štrumbelj and Kononenko, "Explaining prediction models and individual predictions with feature contributions", Knowledge
    and Information Systems 41, 2014 (one background row for each order); Castro, Gómez and Tejada, "Polynomial calculation of the
    Shapley value based on sampling", Computers & Operations Research 36, 2009 (orders, and the error of their mean); Mitchell, Cooper,
    Frank and Holmes, "Sampling permutations for Shapley value estimation", JMLR 23, 2022 (opposite orders).

    >>> import numpy as np
    >>> background = {"a": np.array([0.0, 2.0]), "b": np.array([1.0, 1.0])}
    >>> found = Shapley(background).explain(
    ...     lambda rows: 3.0 * rows["a"] + rows["b"], {"a": np.array([5.0]), "b": np.array([4.0])}
    ... )
    >>> found.base_value, found.values.tolist()  # 3 * (5 - 1) and 4 - 1
    (4.0, [[12.0, 3.0]])

    :param background: rows that "not knowing" is drawn from, in any order; with very many inputs only the first are used.
    :param evaluations: rows made up for one explained row, at most; never less than one order and its opposite.
    :param seed: of the orders.
    :ivar exact: whether every coalition is asked for.
    """

    def __init__(self, background: Table, *, evaluations: int = 20_000, seed: int = 0) -> None:
        inputs, rows = len(background), len(next(iter(background.values())))
        self.exact = inputs <= _MOST_EXACT and rows * (2**inputs - 2) <= evaluations
        self._plan: _Plan
        if self.exact:
            self._plan = _Coalitions(inputs, rows)
        else:
            # Two orders for each background row tell how much orders differ.
            rows = min(rows, max(1, evaluations // (4 * (inputs - 1))))
            pairs = max(1, evaluations // (2 * (inputs - 1) * rows))
            self._plan = _Walks(inputs, rows, pairs, seed)
        self.background = {name: column[:rows] for name, column in background.items()}

    def explain(self, score: Score, rows: Table) -> Contributions:
        """Explain rows.

        :param score: of the model; asked in calls of at most 2,048 rows.
        :param rows: rows to explain: the background's columns, of the same types.
        """
        tops = _scores(score, rows)
        bottoms = _scores(score, self.background)
        shared = [
            self._plan.shared(
                self._inside(score, {name: rows[name][number] for name in self.background}),
                bottoms=bottoms,
                top=float(top),
            )
            for number, top in enumerate(tops)
        ]
        return Contributions(
            scores=tops,
            base_value=float(bottoms.mean()),
            values=np.array([values for values, _ in shared]),
            standard_errors=np.array([errors for _, errors in shared]),
        )

    def _inside(self, score: Score, row: dict[str, Any]) -> Floats:
        """Ask for the rows that are made up for a row."""
        parts = [_scores(score, self._made_up(row, numbers)) for numbers in _parts(self._plan.size)]
        return np.concatenate(parts) if parts else np.empty(0)

    def _made_up(self, row: dict[str, Any], numbers: NDArray[np.intp]) -> dict[str, NDArray[Any]]:
        asked = self._plan.asked(numbers)
        table = {}
        for place, (name, column) in enumerate(self.background.items()):
            cells = column[asked.background]
            cells[asked.own[:, place]] = row[name]
            table[name] = cells
        return table


class _Coalitions:
    """All coalitions but the empty and the whole one, against each background row."""

    def __init__(self, inputs: int, rows: int) -> None:
        self._inputs, self._rows = inputs, rows
        self.size = rows * (2**inputs - 2)

    def asked(self, numbers: NDArray[np.intp]) -> _Asked:
        coalitions, background = 1 + numbers // self._rows, numbers % self._rows
        return _Asked(self._members(coalitions), background)

    def shared(self, inside: Floats, *, bottoms: Floats, top: float) -> tuple[Floats, Floats]:
        inputs = self._inputs
        worth = np.array([bottoms.mean(), *inside.reshape(-1, self._rows).mean(axis=1), top])
        coalitions = np.arange(2**inputs)
        members = self._members(coalitions)
        weights = np.array([1.0 / (inputs * comb(inputs - 1, size)) for size in range(inputs)])
        values = np.empty(inputs)
        for place in range(inputs):
            others = coalitions[~members[:, place]]
            gained = worth[others | 1 << place] - worth[others]
            values[place] = np.sum(weights[members[others].sum(axis=1)] * gained)
        return values, np.zeros(inputs)

    def _members(self, coalitions: NDArray[np.intp]) -> NDArray[np.bool_]:
        return (coalitions[:, np.newaxis] >> np.arange(self._inputs) & 1).astype(bool)


class _Walks:
    """From each background row to the explained one, in orders that are drawn and their opposites."""

    def __init__(self, inputs: int, rows: int, pairs: int, seed: int) -> None:
        self._shape = (rows, pairs, inputs)
        self._steps = inputs - 1
        self.size = 2 * rows * pairs * self._steps
        drawn = np.random.default_rng(seed).permuted(np.tile(np.arange(inputs), (rows * pairs, 1)), axis=1)
        # When each input changes: walk 2i is drawn, walk 2i + 1 its opposite.
        self._turns = np.stack([drawn, inputs - 1 - drawn], axis=1).reshape(-1, inputs)
        self._background = np.repeat(np.arange(rows), 2 * pairs)

    def asked(self, numbers: NDArray[np.intp]) -> _Asked:
        walks, steps = numbers // self._steps, numbers % self._steps
        return _Asked(self._turns[walks] <= steps[:, np.newaxis], self._background[walks])

    def shared(self, inside: Floats, *, bottoms: Floats, top: float) -> tuple[Floats, Floats]:
        rows, pairs, inputs = self._shape
        starts = bottoms[self._background][:, np.newaxis]
        met = np.hstack([starts, inside.reshape(-1, self._steps), np.full_like(starts, top)])
        gained = np.take_along_axis(np.diff(met, axis=1), self._turns, axis=1)
        by_pair = gained.reshape(rows, pairs, 2, inputs).mean(axis=2)
        values = by_pair.mean(axis=(0, 1))
        if pairs == 1:
            return values, np.full(inputs, np.nan)
        # The background rows are all there: only the orders were drawn.
        variances = by_pair.var(axis=1, ddof=1) / pairs
        return values, np.sqrt(variances.sum(axis=0)) / rows


def _parts(size: int) -> Iterator[NDArray[np.intp]]:
    return (np.arange(start, min(start + ROWS_AT_ONCE, size)) for start in range(0, size, ROWS_AT_ONCE))


def _scores(score: Score, table: Table) -> Floats:
    return np.asarray(score(table), dtype=np.float64)
