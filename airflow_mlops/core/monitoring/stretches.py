"""Stretches of held-out rows, in time order: each is checked with what was learned on the others."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

#: Pieces of the held-out rows, in time order, that check the estimator against each other; and rows each needs.
FOLDS, ROWS_PER_FOLD = 8, 40
#: Fewer pieces tell nothing about an error.
FEWEST_FOLDS = 3


def stretches(row_count: int) -> list[tuple[Array, Array]]:
    """Cut held-out rows to check an estimator: numbers of the rows to learn on and of those to check, per stretch.

    :returns: empty when there are too few rows.
    """
    folds = min(FOLDS, row_count // ROWS_PER_FOLD)
    return left_out(row_count, folds) if folds >= FEWEST_FOLDS else []


def left_out(row_count: int, folds: int) -> list[tuple[Array, Array]]:
    """Cut rows into stretches; each is checked with what was learned on the others."""
    rows = np.arange(row_count)
    return [(np.setdiff1d(rows, check), check) for check in np.array_split(rows, folds)]
