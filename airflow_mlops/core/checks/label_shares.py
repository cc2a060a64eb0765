"""Label shares: how the labels of partitions are distributed, how far one is from the others, and what overwriting does to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

#: Parts that numbers are cut in, as many of all partitions' labels in each.
_PARTS = 10
#: Shares of overwritten labels that are tried, and partitions they are tried on.
_TRIED, _ON = np.linspace(0.0, 1.0, 201), 9


def label_shares(labels: Sequence[Array], *, classes: int | None) -> Array:
    """Give the share of each class, or of numbers that of each tenth of all partitions' labels.

    :param labels: per partition class numbers, or numbers on one scale.
    :returns: shape ``(partitions, classes or parts)``; each row adds up to one.
    """
    if classes is not None:
        return np.array([np.bincount(truth, minlength=classes) / len(truth) for truth in labels])
    inner = np.linspace(0.0, 1.0, _PARTS + 1)[1:-1]
    edges = np.unique(np.quantile(np.concatenate(labels), inner))
    return np.array(
        [np.bincount(np.digitize(truth, edges), minlength=len(edges) + 1) / len(truth) for truth in labels]
    )


def distances(shares: Array, others: Array) -> Array:
    """Give the Hellinger distances of distributions; a rare class weighs in it by how surely its share is known.

    :returns: in ``[0, 1]``, shape ``(len(shares), len(others))``.
    """
    gaps = np.sqrt(shares)[:, None] - np.sqrt(others)[None]
    return np.asarray(np.sqrt((gaps**2).sum(axis=2) / 2.0))


def nearest_distances(shares: Array) -> Array:
    """Tell how far each partition is from the one most like it: what comes back each year or stays after a step is near to one.

    >>> nearest_distances(np.array([[0.5, 0.5], [0.48, 0.52], [1.0, 0.0]])).round(2).tolist()
    [0.01, 0.01, 0.54]
    """
    apart = distances(shares, shares)
    np.fill_diagonal(apart, np.inf)
    return np.asarray(apart.min(axis=1))


def overwritten(shares: Array, part: int, wrong: float) -> Array:
    """Give the shares after a share of all labels was overwritten with one class, at random among the others.

    >>> overwritten(np.array([0.6, 0.3, 0.1]), 2, 0.3).round(2).tolist()
    [0.4, 0.2, 0.4]
    """
    others = 1.0 - shares[part]
    left = np.zeros_like(shares) if others <= 0 else shares * max(0.0, 1.0 - wrong / others)
    left[part] = min(1.0, shares[part] + wrong)
    return np.asarray(left)


def restored(shares: Array, part: int, wrong: float) -> Array:
    """Undo :func:`overwritten`, where what was overwritten had the classes that the others have.

    >>> restored(np.array([0.4, 0.2, 0.4]), 2, 0.3).round(2).tolist()
    [0.6, 0.3, 0.1]
    """
    others = 1.0 - shares[part]
    back = (
        shares * (1.0 + wrong / others)
        if others > 0
        else np.full_like(shares, wrong / max(len(shares) - 1, 1))
    )
    back[part] = shares[part] - wrong
    return np.asarray(back)


def visible_overwriting(trusted: Array, part: int, limit: float) -> float:
    """Find the share of labels that, overwritten with one class, takes half of the trusted partitions beyond a distance from all others.

    :returns: 1 where no share does.
    """
    found = []
    for index in np.unique(np.linspace(0, len(trusted) - 1, _ON).astype(int)).tolist():
        tried = _TRIED[1.0 - trusted[index, part] >= _TRIED]
        changed = np.array([overwritten(trusted[index], part, wrong) for wrong in tried])
        beyond = distances(changed, np.delete(trusted, index, axis=0)).min(axis=1) > limit
        found.append(float(tried[beyond.argmax()]) if beyond.any() else 1.0)
    return float(np.median(found))


def possible_overwriting(new: Array, trusted: Array, part: int, limit: float) -> float:
    """Find the largest share of labels that may have been overwritten with one class, where what was there before was like trusted ones."""
    tried = _TRIED[new[part] >= _TRIED]
    before = np.array([restored(new, part, wrong) for wrong in tried])
    like = np.flatnonzero(distances(before, trusted).min(axis=1) <= limit)
    # Of labels that are far from all trusted ones whatever is undone nothing can be told.
    return float(tried[like[-1]]) if like.size else 1.0
