"""Label consistency: what models that have not seen a row would have called it, within its partition and from others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import polars as pl

Array = NDArray[Any]

#: Folds within a partition, and groups of partitions.
FOLDS, GROUPS = 4, 5
#: Rows a model of other partitions learns from, at most.
_ROWS = 10_000


def own_answers(
    features: Array, labels: Array, compared: Array, *, classes: int | None, seed: int = 0
) -> Array:
    """Answer for every row of a partition by models of other rows of it.

    Time should be among the features: labels that a concept change has made others, from some moment on, are then no noise.

    :param features: shape ``(rows, features)``, NaN for missing.
    :param labels: class numbers, or numbers where ``classes`` is ``None``.
    :param compared: positions of the rows that models learn from, as many in each partition that is compared.
    :returns: probabilities, shape ``(rows, classes)``, or numbers, shape ``(rows,)``.
    """
    folds = np.random.default_rng(seed).permutation(len(labels)) % FOLDS
    answers = np.zeros((len(labels), classes) if classes else len(labels))
    for fold in range(FOLDS):
        learn = compared[folds[compared] != fold]
        answers[folds == fold] = _answers(
            features[learn], labels[learn], features[folds == fold], classes, seed
        )
    return answers


def others_answers(
    features: Sequence[Array], labels: Sequence[Array], *, classes: int | None, seed: int = 0
) -> list[Array]:
    """Answer for the rows of every partition by models of other partitions, in groups; each partition is treated alike."""
    groups = np.random.default_rng(seed).permutation(len(features)) % GROUPS
    answers: list[Array] = [np.zeros(0)] * len(features)
    for group in range(GROUPS):
        mine = np.flatnonzero(groups == group).tolist()
        others = np.flatnonzero(groups != group).tolist()
        if not mine or not others:
            continue
        rows, truth = (np.concatenate([side[index] for index in others]) for side in (features, labels))
        learn = np.linspace(0, len(truth) - 1, min(len(truth), _ROWS)).astype(int)
        asked = np.concatenate([features[index] for index in mine])
        given = _answers(rows[learn], truth[learn], asked, classes, seed)
        ends = np.cumsum([len(labels[index]) for index in mine])[:-1]
        for index, part in zip(mine, np.split(given, ends), strict=True):
            answers[index] = part
    return answers


def as_numbers(rows: pl.DataFrame) -> Array:
    """Give features as numbers: times as seconds, text as its frequency's rank, missing as NaN.

    :raises ValueError: a column of lists or structures.
    """
    import polars as pl

    columns = []
    for name in rows.columns:
        column = rows[name]
        if column.dtype.is_nested():
            raise ValueError(
                f"{name} is {column.dtype}, and features of a screen are numbers, text, truth values or times: name those it is to look at as features"
            )
        if column.dtype.is_temporal():
            column = column.cast(pl.Datetime("us")).to_physical() / 1e6
        elif not (column.dtype.is_numeric() or column.dtype == pl.Boolean):
            # Under a name of its own: a feature may be called count.
            counts = column.drop_nulls().alias("value").value_counts()
            counts = counts.sort(["count", "value"], descending=[True, False])
            ranks = {value: float(rank) for rank, value in enumerate(counts["value"].to_list())}
            column = column.replace_strict(ranks, default=None, return_dtype=pl.Float64)
        values = column.cast(pl.Float64).to_numpy()
        columns.append(np.where(np.isfinite(values), values, np.nan))
    return np.column_stack(columns)


def _answers(features: Array, labels: Array, asked: Array, classes: int | None, seed: int) -> Array:
    from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor

    settings: dict[str, Any] = {
        "max_iter": 30,
        "learning_rate": 0.15,
        "max_leaf_nodes": 15,
        "min_samples_leaf": 10,
        "early_stopping": False,
        "random_state": seed,
    }
    there = ~np.isnan(features).all(axis=0)  # of a feature that no row has they can't learn
    features, asked = (
        side[:, there] if there.any() else np.zeros((len(side), 1)) for side in (features, asked)
    )
    if classes is None:
        return np.asarray(HistGradientBoostingRegressor(**settings).fit(features, labels).predict(asked))
    known = np.unique(labels)
    answers = np.zeros((len(asked), classes))
    if len(known) == 1:
        answers[:, known[0]] = 1.0
        return answers
    model = HistGradientBoostingClassifier(**settings).fit(features, labels)
    answers[:, known] = model.predict_proba(asked)
    return answers
