"""Root cause: which columns carry the shift, and what happened to them in a sentence."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import numpy as np

from airflow_mlops.core.figures import figures
from airflow_mlops.core.profiles.profile_columns import CategoricalProfile, ColumnProfile, NumericProfile

if TYPE_CHECKING:
    from collections.abc import Sequence

#: An effect counts for no more than so many thresholds: one column that went infinitely far leaves others visible.
LARGEST_EFFECT = 100.0
#: Change of the share of nulls or infinite values that is worth a word.
NULLS_WORTH_A_WORD = 0.02
#: Change of mean and standard deviation, in standard deviations, below which neither is what moved.
_SAME_MOMENT = 0.05
#: Where one of the sides has no values there is nothing else to say; less would be shown as no change.
_ANY_CHANGE = 0.0005


def shares_of_shift(effects: Sequence[float]) -> list[float]:
    """Split the shift among columns by the squares of their effects, as a variance is split among its causes.

    Squares keep a hundred columns that only tremble from outweighing the one that moved.

    :param effects: distance of each column in units of its threshold.
    :returns: shares that sum to 1; zeros when nothing moved.

    >>> [round(share, 2) for share in shares_of_shift([3.0, 1.0, 0.0])]
    [0.9, 0.1, 0.0]
    """
    squares = np.square(
        np.minimum(np.nan_to_num(np.asarray(effects, dtype=float), posinf=LARGEST_EFFECT), LARGEST_EFFECT)
    )
    total = float(squares.sum())
    return (squares / total).tolist() if total else [0.0] * len(squares)


def describe(reference: ColumnProfile, current: ColumnProfile) -> str:
    """Say what moved: the mean or the spread of numbers, or where else they went, the widest category, the pair, nulls and infinite values."""
    sides = (reference, current)
    parts = [_moved(reference, current)] if reference.count and current.count else []
    missing = {
        "nulls": [side.null_count / max(side.row_count, 1) for side in sides],
        "infinite": [getattr(side, "infinite_count", 0) / max(side.row_count, 1) for side in sides],
    }
    parts += [
        f"{what} {before:.1%} → {now:.1%}"
        for what, (before, now) in missing.items()
        if abs(now - before) >= (NULLS_WORTH_A_WORD if parts else _ANY_CHANGE)
    ]
    return f"{current.name}: {', '.join(parts) or 'no values'}"


def _moved(reference: ColumnProfile, current: ColumnProfile) -> str:
    if isinstance(reference, NumericProfile) and isinstance(current, NumericProfile):
        return _numbers_moved(reference, current)
    if isinstance(reference, CategoricalProfile) and isinstance(current, CategoricalProfile):
        return _categories_moved(reference, current)
    return "the columns go together differently"


def _numbers_moved(reference: NumericProfile, current: NumericProfile) -> str:
    means, spreads = (
        (reference.mean, current.mean),
        (reference.standard_deviation, current.standard_deviation),
    )
    kind = current.layout.kind
    if kind == "datetime":
        return f"mean {_instant(means[0])} → {_instant(means[1])}"
    what = "length" if kind == "text" else ""
    if max(abs(now - before) for before, now in (means, spreads)) < _SAME_MOMENT * max(spreads):
        return f"{what}{' ' if what else ''}{_shape_moved(reference, current)}"
    if abs(means[1] - means[0]) >= abs(spreads[1] - spreads[0]):
        return f"mean {what}{' ' if what else ''}{' → '.join(figures(*means))}"
    return f"standard deviation{' of ' if what else ''}{what} {' → '.join(figures(*spreads))}"


def _shape_moved(reference: NumericProfile, current: NumericProfile) -> str:
    """Say where both distributions are furthest apart: mean and spread are those they were."""
    shares = [np.cumsum(side.counts)[:-1] / side.count for side in (reference, current)]
    if not len(reference.edges):
        return "as it was"
    place = int(np.argmax(np.abs(shares[1] - shares[0])))
    before, now = (float(share[place]) for share in shares)
    return f"below {figures(float(reference.edges[place]))[0]}: {before:.1%} → {now:.1%}"


def _categories_moved(reference: CategoricalProfile, current: CategoricalProfile) -> str:
    names = [*reference.layout.categories, *sorted({*reference.unseen, *current.unseen})]
    sides = [
        np.array([(side.named_counts | side.unseen).get(name, 0) / max(side.count, 1) for name in names])
        for side in (reference, current)
    ]
    p, q = sides
    if not names:
        return "no categories"
    widest = int(np.argmax(np.abs(q - p)))
    new = "" if widest < len(reference.layout.categories) else "new "
    return f"{new}{names[widest]!r} {p[widest]:.1%} → {q[widest]:.1%}"


def _instant(microseconds: float) -> str:
    return f"{datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=microseconds):%Y-%m-%d}"
