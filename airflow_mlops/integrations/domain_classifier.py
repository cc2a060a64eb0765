"""Domain classifier: whether a model can tell the rows of two windows apart, whichever columns together give them away."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from airflow_mlops.exceptions import InsufficientDataError

if TYPE_CHECKING:
    import polars as pl

#: Rows per side: enough for an AUC to within 0.01.
CLASSIFIER_ROWS = 5_000
#: Rows per side that a fold of the cross-validation needs (rule of thumb).
SMALLEST_SIDE = 50
FOLDS = 5
#: AUC from which rows count as told apart; Evidently's threshold for text, a rule of thumb.
AUC_THRESHOLD = 0.55


@dataclass(frozen=True, kw_only=True, slots=True)
class DomainVerdict:
    """How well both windows can be told apart.

    :param auc: cross-validated area under the ROC curve, in ``[0, 1]``; 0.5 is guessing.
    :param p_value: chance of such an area where the windows come from one distribution.
    :param threshold: area from which they count as different.
    :param drifted: whether they do: area and significance together.
    :param sentence: the same in words.
    """

    auc: float
    p_value: float
    threshold: float
    drifted: bool
    sentence: str


def tell_apart(
    reference: pl.DataFrame,
    current: pl.DataFrame,
    *,
    significance: float = 0.01,
    threshold: float = AUC_THRESHOLD,
    seed: int = 0,
) -> DomainVerdict:
    """Train gradient-boosted trees to tell the windows apart and judge them on rows they have not seen.

    Inside a fold the trees are fixed, so where nothing changed the area has the distribution of a Mann-Whitney statistic; the
    folds' areas are averaged. Two folds learn from each other, so what makes them look alike by chance counts in both: the
    variance of the mean is taken to be twice that of independent folds, which is the most it can be where areas add up the
    likeness of pairs of folds. Where the windows differ this finds what no single column shows, such as a broken correlation.

    Source: Lopez-Paz and Oquab, "Revisiting classifier two-sample tests", ICLR 2017; Mann and Whitney, Annals of Mathematical
    Statistics 18, 1947.

    :param reference: rows of the reference; numbers, everything else is taken as a category.
    :param current: rows of the window, the same columns.
    :raises InsufficientDataError: one of the sides has too few rows.
    """
    if min(reference.height, current.height) < SMALLEST_SIDE:
        raise InsufficientDataError(
            f"telling two windows apart needs {SMALLEST_SIDE} rows in each; they have {reference.height} and {current.height}"
        )
    sides = [side.sample(min(side.height, CLASSIFIER_ROWS), seed=seed) for side in (reference, current)]
    auc, variance = _cross_validated(*sides, seed=seed)
    from scipy import special

    p_value = float(special.ndtr(-(auc - 0.5) / np.sqrt(variance)))
    drifted = auc >= threshold and p_value <= significance
    return DomainVerdict(
        auc=auc,
        p_value=p_value,
        threshold=threshold,
        drifted=drifted,
        sentence=f"a classifier tells the windows apart with AUC {auc:.2f} (p = {p_value:.2g})",
    )


def _cross_validated(reference: pl.DataFrame, current: pl.DataFrame, *, seed: int) -> tuple[float, float]:
    """Give the mean area over the folds and its variance where nothing changed."""
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedKFold

    rows = _as_numbers(reference, current)
    labels = np.repeat([0, 1], [reference.height, current.height])
    areas, variances = [], []
    for learn, check in StratifiedKFold(FOLDS, shuffle=True, random_state=seed).split(rows, labels):
        model = HistGradientBoostingClassifier(
            max_iter=50, max_leaf_nodes=15, min_samples_leaf=20, early_stopping=False, random_state=seed
        )
        model.fit(rows[learn], labels[learn])
        areas.append(roc_auc_score(labels[check], model.predict_proba(rows[check])[:, 1]))
        ones = int(labels[check].sum())
        variances.append((len(check) + 1) / (12.0 * ones * (len(check) - ones)))
    return float(np.mean(areas)), 2.0 * float(np.sum(variances)) / FOLDS**2


def _as_numbers(
    reference: pl.DataFrame, current: pl.DataFrame
) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """Give the rows of both sides as numbers: categories by their frequency's rank, missing as NaN."""
    import polars as pl

    both = pl.concat([reference, current], how="vertical_relaxed")
    columns = []
    for name in both.columns:
        column = both[name]
        if not (column.dtype.is_numeric() or column.dtype == pl.Boolean):
            order = column.alias("value").value_counts(sort=True)["value"].to_list()
            ranks = {value: float(rank) for rank, value in enumerate(order) if value is not None}
            column = column.replace_strict(ranks, default=None, return_dtype=pl.Float64)
        columns.append(column.cast(pl.Float64).to_numpy())
    return np.column_stack(columns)
