"""Fairness: whether a model treats groups of people alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupRates:
    """One group.

    :param group: its value of the column.
    :param row_count: its rows.
    :param selection_rate: share that gets the positive label; ``None`` for numbers.
    :param true_positive_rate: share of the truly positive that gets it; ``None`` when there are none.
    :param false_positive_rate: share of the truly negative that gets it; ``None`` when there are none.
    :param mean_loss: mean loss per row.
    """

    group: str
    row_count: int
    selection_rate: float | None
    true_positive_rate: float | None
    false_positive_rate: float | None
    mean_loss: float


@dataclass(frozen=True, kw_only=True, slots=True)
class FairnessReport:
    """All groups of one column, and how far apart they are.

    Source: Hardt, Price and Srebro, "Equality of opportunity in supervised learning", NeurIPS 2016 (equalized odds);
    Feldman et al., "Certifying and removing disparate impact", KDD 2015 (ratio of selection rates).

    :param column: what the groups are of.
    :param groups: groups with enough rows.
    :param demographic_parity_difference: largest less smallest selection rate.
    :param demographic_parity_ratio: smallest over largest selection rate; below 0.8 is the "four fifths" warning.
    :param equalized_odds_difference: the larger of the spreads of true and false positive rates.
    :param loss_ratio: largest over smallest mean loss.
    """

    column: str
    groups: tuple[GroupRates, ...]
    demographic_parity_difference: float | None
    demographic_parity_ratio: float | None
    equalized_odds_difference: float | None
    loss_ratio: float | None


def compare_groups(
    column: str,
    groups: Array,
    *,
    target: Array,
    predicted: Array,
    losses: Array,
    positive: str | None,
    minimum_rows: int = 50,
) -> FairnessReport:
    """Measure each group.

    :param column: name of the column.
    :param groups: group of each row, shape ``(n,)``.
    :param target: what turned out, shape ``(n,)``.
    :param predicted: what was answered, shape ``(n,)``.
    :param losses: per row, shape ``(n,)``.
    :param positive: label that is good to get; ``None`` for numbers.
    :param minimum_rows: smaller groups are left out.
    """
    names, numbers = np.unique(groups.astype(str), return_inverse=True)
    rates = []
    for number, name in enumerate(names):
        inside = numbers == number
        if inside.sum() < minimum_rows:
            continue
        chosen = predicted[inside].astype(str) == positive if positive is not None else None
        truly = target[inside].astype(str) == positive if positive is not None else None
        rates.append(
            GroupRates(
                group=str(name) or "(empty)",
                row_count=int(inside.sum()),
                selection_rate=_share(chosen),
                true_positive_rate=_share(chosen[truly]) if chosen is not None else None,
                false_positive_rate=_share(chosen[~truly]) if chosen is not None and truly is not None else None,
                mean_loss=float(losses[inside].mean()),
            )
        )
    selection = _known([group.selection_rate for group in rates])
    odds = [
        _spread(_known([group.true_positive_rate for group in rates])),
        _spread(_known([group.false_positive_rate for group in rates])),
    ]
    known_odds = [value for value in odds if value is not None]
    means = [group.mean_loss for group in rates]
    return FairnessReport(
        column=column,
        groups=tuple(rates),
        demographic_parity_difference=_spread(selection),
        demographic_parity_ratio=min(selection) / max(selection) if selection and max(selection) > 0 else None,
        equalized_odds_difference=max(known_odds) if known_odds else None,
        loss_ratio=max(means) / min(means) if means and min(means) > 0 else None,
    )


def _share(chosen: Array | None) -> float | None:
    return float(chosen.mean()) if chosen is not None and chosen.size else None


def _known(values: list[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _spread(values: list[float]) -> float | None:
    return max(values) - min(values) if values else None
