"""SHAP: how much each feature contributed to each answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from airflow_mlops.core.model.explanation import Score, Table

#: How often the model is asked about a row at least, each time with all of the background.
_EVALUATIONS = 500

#: Cells of the table that SHAP makes of one row at most: of one permutation, with each row of the background.
_CELLS = 25_000_000


def explain_rows(
    score: Score, rows: Table, background: Table, *, seed: int = 0
) -> tuple[NDArray[Any], float]:
    """Share each row's score out among its features, against what the model answers on average.

    Works with any model that can be asked: both serving forms are explained as they are served.

    Source: Lundberg and Lee, "A unified approach to interpreting model predictions", NeurIPS 2017; permutation
    sampling as in Štrumbelj and Kononenko, "Explaining prediction models and individual predictions with feature
    contributions", Knowledge and Information Systems 41, 2014.

    :param score: of the model.
    :param rows: rows to explain, ``n`` of them.
    :param background: rows that stand for "not knowing the feature"; fifty do. Of more than 500 features fewer are drawn, as
        what has to be in memory at once grows with the square of the features.
    :returns: contributions of shape ``(n, features)``, and the mean score on the background: a row's score is the
        mean plus its contributions.
    """
    import shap

    coder = _Coder(rows, background)
    # One permutation there and back asks twice per feature and once for none; with fewer SHAP refuses.
    once = 2 * len(rows) + 1
    known = min(len(next(iter(background.values()))), max(1, _CELLS // (once * len(rows))))
    explainer = shap.explainers.Permutation(
        lambda coded: np.asarray(score(coder.decode(coded)), dtype=np.float64),
        shap.maskers.Independent(coder.encode(background), max_samples=known),
        seed=seed,
    )
    found = explainer(coder.encode(rows), max_evals=max(_EVALUATIONS, once), silent=True)
    return np.asarray(found.values), float(np.mean(found.base_values))


class _Coder:
    """Tables to matrices of numbers and back: SHAP swaps cells of matrices, models take named columns."""

    def __init__(self, *tables: Table) -> None:
        self._names = list(tables[0])
        self._kinds = {name: tables[0][name].dtype for name in self._names}
        self._words = {
            name: sorted({str(value) for table in tables for value in table[name].tolist()})
            for name in self._names
            if self._kinds[name].kind != "f"
        }

    def encode(self, table: Table) -> NDArray[np.float64]:
        columns = []
        for name in self._names:
            if name in self._words:
                place = {word: number for number, word in enumerate(self._words[name])}
                columns.append(
                    np.array([place[str(value)] for value in table[name].tolist()], dtype=np.float64)
                )
            else:
                columns.append(np.asarray(table[name], dtype=np.float64))
        return np.column_stack(columns)

    def decode(self, coded: NDArray[np.float64]) -> dict[str, NDArray[Any]]:
        table: dict[str, NDArray[Any]] = {}
        for number, name in enumerate(self._names):
            column = coded[:, number]
            if name in self._words:
                table[name] = np.array(self._words[name], dtype=object)[column.astype(int)]
            else:
                table[name] = column.astype(self._kinds[name])
        return table
