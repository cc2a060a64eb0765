"""Explanation: what a model pays attention to, how its answer moves, and what would have to be different."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
#: Columns by name, all of one length.
Table = Mapping[str, Array]
#: ``score(table) -> (n,)``: the number that is explained; a prediction, or the probability of a label.
Score = Callable[[Table], Array]
#: ``loss(table) -> float``: how wrong the model is on rows, smaller is better.
Loss = Callable[[Table], float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Importance:
    """How much worse the model gets without a feature.

    :param name: feature.
    :param increase: mean increase of the loss when the feature's values are shuffled between rows.
    :param standard_deviation: of the increase over the shuffles.
    """

    name: str
    increase: float
    standard_deviation: float


@dataclass(frozen=True, kw_only=True, slots=True)
class PartialDependence:
    """How the answer moves with one feature, all others as they are.

    :param name: feature.
    :param values: numbers at evenly spaced quantiles, or categories by frequency.
    :param scores: mean score with the feature set to the value in every row.
    """

    name: str
    values: tuple[float | str, ...]
    scores: tuple[float, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Counterfactual:
    """The smallest change found that would have led to another answer.

    :param changes: feature to its value before and after.
    :param score_before: score of the row.
    :param score_after: score of the changed row.
    :param answer_before: what the model answers the row; ``None`` where only scores are known.
    :param answer_after: what it answers the changed row.
    """

    changes: dict[str, tuple[Any, Any]]
    score_before: float
    score_after: float
    answer_before: float | str | None = None
    answer_after: float | str | None = None


def permutation_importance(
    loss: Loss, table: Table, *, repeats: int = 5, seed: int = 0
) -> tuple[Importance, ...]:
    """Shuffle one feature after the other and see how much worse the model gets.

    Features that say the same thing share their importance: either can stand in for the other.

    Source: Breiman, "Random forests", Machine Learning 45, 2001, section 10; Fisher, Rudin and Dominici, "All models
    are wrong, but many are useful", JMLR 20, 2019, equation 2.

    :param loss: of the model on a table of the same rows.
    :param table: rows the model was not trained on.
    :param repeats: shuffles per feature.
    :param seed: of the shuffles.
    :returns: most important first.
    """
    rng = np.random.default_rng(seed)
    whole = loss(table)
    found = []
    for name, column in table.items():
        increases = [loss({**table, name: rng.permutation(column)}) - whole for _ in range(repeats)]
        found.append(
            Importance(
                name=name,
                increase=float(np.mean(increases)),
                standard_deviation=float(np.std(increases, ddof=1)) if repeats > 1 else 0.0,
            )
        )
    return tuple(sorted(found, key=lambda item: -item.increase))


def partial_dependence(score: Score, table: Table, name: str, *, points: int = 20) -> PartialDependence:
    """Set one feature to a value in every row, and average the answers.

    Source: Friedman, "Greedy function approximation: a gradient boosting machine", Annals of Statistics 29, 2001,
    section 8.2.

    :param score: of the model.
    :param table: rows to average over; a few hundred do.
    :param name: feature.
    :param points: values to try at most.
    """
    column = table[name]
    values = _grid(column, points)
    size = len(column)
    # One call for all values: models answer many rows faster than many calls.
    stacked = {key: np.tile(other, len(values)) for key, other in table.items()}
    stacked[name] = np.repeat(np.array(values, dtype=column.dtype), size)
    scores = np.asarray(score(stacked), dtype=np.float64).reshape(len(values), size).mean(axis=1)
    return PartialDependence(name=name, values=tuple(values), scores=tuple(float(value) for value in scores))


def find_counterfactual(
    score: Score,
    row: Mapping[str, Any],
    pool: Table,
    wanted: Callable[[Array], NDArray[np.bool_]],
    *,
    pool_scores: Array | None = None,
) -> Counterfactual | None:
    """Find few changes after which the model answers as wanted, made of values that occur.

    The nearest row of the pool with the wanted answer is the start; then every feature goes back to the row's own
    value, largest distance first, as long as the answer stays the wanted one.

    Source: Brughmans, Leyman and Martens, "NICE: an algorithm for nearest instance counterfactual explanations", Data
    Mining and Knowledge Discovery 38, 2024 (the sparse variant, run backwards).

    :param score: of the model.
    :param row: the row to explain.
    :param pool: real rows.
    :param wanted: scores in, whether each is as wanted out.
    :param pool_scores: scores of the pool, where they are known already.
    :returns: ``None`` when no row of the pool has the wanted answer, or the row itself has it.
    """
    own = {name: np.array([row[name]], dtype=column.dtype) for name, column in pool.items()}
    before = float(score(own)[0])
    good = wanted(np.asarray(score(pool) if pool_scores is None else pool_scores))
    if bool(wanted(np.array([before]))[0]) or not good.any():
        return None
    distances = {name: _distances(column, own[name][0]) for name, column in pool.items()}
    total = np.where(good, np.sum(list(distances.values()), axis=0), np.inf)
    nearest = int(np.argmin(total))
    changed = {name: column[nearest : nearest + 1] for name, column in pool.items()}
    for name in sorted(pool, key=lambda key: -float(distances[key][nearest])):
        attempt = {**changed, name: own[name]}
        if bool(wanted(np.asarray(score(attempt)))[0]):
            changed = attempt
    return Counterfactual(
        changes={
            name: (_plain(own[name][0]), _plain(changed[name][0]))
            for name in pool
            if not _same(own[name][0], changed[name][0])
        },
        score_before=before,
        score_after=float(score(changed)[0]),
    )


def _grid(column: Array, points: int) -> list[Any]:
    if column.dtype.kind == "f":
        finite = column[np.isfinite(column)]
        if not finite.size:
            return [float("nan")]
        return [float(value) for value in np.unique(np.quantile(finite, np.linspace(0.0, 1.0, points)))]
    values, counts = np.unique(column.astype(str), return_counts=True)
    return [str(values[place]) for place in np.argsort(-counts, kind="stable")[:points]]


def _distances(column: Array, value: Any) -> Array:
    """Distance per feature: numbers by the spread of the pool, at most 1; categories 0 or 1. Missing is 1 from all else."""
    if column.dtype.kind != "f":
        return np.asarray(column != value, dtype=np.float64)
    finite = column[np.isfinite(column)]
    spread = float(np.ptp(finite)) if finite.size else 0.0
    if not np.isfinite(value):
        return np.asarray(np.isfinite(column), dtype=np.float64)
    apart = np.abs(np.nan_to_num(column, nan=np.inf) - value)
    return np.asarray(np.minimum(apart / spread if spread else (apart > 0.0), 1.0), dtype=np.float64)


def _same(first: Any, second: Any) -> bool:
    return bool(first == second) or (first != first and second != second)


def _plain(value: Any) -> Any:
    plain = value.item() if hasattr(value, "item") else value
    return None if plain != plain else plain


def rank_contributions(names: Sequence[str], contributions: Array) -> tuple[tuple[str, float], ...]:
    """Sum up contributions of many rows: mean size per feature, largest first.

    :param names: features, in the order of the columns.
    :param contributions: shape ``(rows, features)``.
    """
    sizes = np.abs(contributions).mean(axis=0)
    return tuple((names[place], float(sizes[place])) for place in np.argsort(-sizes, kind="stable"))
