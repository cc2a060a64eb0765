"""Fairness: whether a model treats groups of people alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from airflow_mlops.core.comparison.predictions import spelled_as, text_codes

Array = NDArray[Any]

#: A rate of fewer rows is mostly chance.
MINIMUM_ROWS = 50
#: Groups a report shows; all are judged.
MOST_GROUPS = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupRates:
    """One group.

    :param group: its value of the column.
    :param row_count: its rows.
    :param mean_loss: mean loss per row.
    :param selection_rate: share that is given the positive label; ``None`` for numbers.
    :param true_positive_rate: share of the truly positive that is given it; ``None`` when there are too few.
    :param false_positive_rate: share of the truly negative that is given it; ``None`` when there are too few.
    """

    group: str
    row_count: int
    mean_loss: float
    selection_rate: float | None = None
    true_positive_rate: float | None = None
    false_positive_rate: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class UnmeasuredGroup:
    """A group with too few rows, or one rate of it.

    :param group: its value of the column.
    :param row_count: its rows, or those the rate is a share of.
    :param rate: such as ``true positive rate of yes``; ``None`` where nothing of the group was measured.
    """

    group: str
    row_count: int
    rate: str | None = None

    def __str__(self) -> str:
        what = f"the {self.rate} in {self.group}" if self.rate else self.group
        return f"{what} ({self.row_count} row{'' if self.row_count == 1 else 's'})"


@dataclass(frozen=True, kw_only=True, slots=True)
class FairnessReport:
    """The groups of one column, and how far apart they are.

    Source: Feldman et al., "Certifying and removing disparate impact", KDD 2015 (ratio of selection rates, the "four
    fifths rule"); Hardt, Price and Srebro, "Equality of opportunity in supervised learning", NeurIPS 2016 (equalized
    odds).

    :param column: what the groups are of.
    :param positive: label that counts as positive; ``None`` for numbers.
    :param groups: those furthest apart, and the largest others; 20 in all.
    :param demographic_parity_difference: largest less smallest selection rate, in ``[0, 1]``.
    :param demographic_parity_ratio: smallest over largest selection rate; below 0.8 is commonly taken for a warning.
    :param equalized_odds_difference: the larger of the spreads of true and of false positive rates, in ``[0, 1]``.
    :param loss_ratio: largest over smallest mean loss; ``None`` where that means nothing: of gains, or of a single group.
    :param loss: what the loss is called, such as ``rmse``.
    :param group_count: groups that were measured.
    :param minimum_rows: rows a group, or a rate of it, is measured from.
    :param unmeasured: what was left out for having fewer, at most 20; whole groups first, then the largest.
    :param unmeasured_count: all that was left out.
    """

    column: str
    positive: str | None
    groups: tuple[GroupRates, ...]
    demographic_parity_difference: float | None = None
    demographic_parity_ratio: float | None = None
    equalized_odds_difference: float | None = None
    loss_ratio: float | None = None
    loss: str = "mean loss"
    group_count: int = 0
    minimum_rows: int = MINIMUM_ROWS
    unmeasured: tuple[UnmeasuredGroup, ...] = ()
    unmeasured_count: int = 0

    @property
    def largest_difference(self) -> float | None:
        """The larger of both differences; for numbers, how much more the worst group loses than the best, as a share of it."""
        if self.positive is None:
            return self.loss_ratio - 1.0 if self.loss_ratio is not None else None
        known = [
            value
            for value in (self.demographic_parity_difference, self.equalized_odds_difference)
            if value is not None
        ]
        return max(known, default=None)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Rates:
    """Of every group and label, shape ``(groups, labels)``; NaN where it is of too few rows.

    :param positives: rows that truly have the label.
    """

    selection: Array
    true_positive: Array
    false_positive: Array
    positives: Array


def compare_groups(
    column: str,
    groups: Array,
    *,
    target: Array,
    predicted: Array,
    losses: Array,
    labels: Sequence[str],
    loss: str = "mean loss",
    of_mean: Callable[[float], float] | None = None,
    minimum_rows: int = MINIMUM_ROWS,
) -> FairnessReport:
    """Measure each group.

    Of two labels the rates of the positive, last one are compared; of more, those of the label that is given most differently.

    :param column: name of the column.
    :param groups: group of each row, shape ``(n,)``.
    :param target: what turned out, shape ``(n,)``.
    :param predicted: what was answered, shape ``(n,)``.
    :param losses: per row, shape ``(n,)``.
    :param labels: of the model, in its order; empty for numbers.
    :param loss: what is told of the losses is called.
    :param of_mean: turns a mean of losses into what is told; default as it is.
    :param minimum_rows: a group of fewer is not measured, nor is a rate that is a share of fewer.
    """
    texts, numbers = text_codes(groups)
    names = [name or "(empty)" for name in texts]
    rows = np.bincount(numbers, minlength=len(names))
    means = np.bincount(numbers, weights=losses, minlength=len(names)) / np.maximum(rows, 1)
    measured = np.flatnonzero(rows >= minimum_rows)
    compared = list(labels[-1:] if len(labels) == 2 else labels)
    rates = _rates(numbers, rows, target, predicted, compared, minimum_rows)
    found = _furthest(rates, measured)
    unmeasured, unmeasured_count = _unmeasured(names, rows, rates, compared, minimum_rows)
    least_loss = float(losses.min()) if len(losses) else 0.0
    return FairnessReport(
        column=column,
        positive=compared[found] if compared else None,
        groups=tuple(
            GroupRates(
                group=names[group],
                row_count=int(rows[group]),
                mean_loss=float(means[group]),
                selection_rate=_at(rates.selection, group, found),
                true_positive_rate=_at(rates.true_positive, group, found),
                false_positive_rate=_at(rates.false_positive, group, found),
            )
            for group in _shown(measured, rows, means, rates, found)
        ),
        demographic_parity_difference=_number(_spread(rates.selection, measured)[found])
        if compared
        else None,
        demographic_parity_ratio=_ratio(rates.selection[measured, found]) if compared else None,
        equalized_odds_difference=_number(_odds(rates, measured)[found]) if compared else None,
        # Only of sizes from zero on is one so many times the other.
        loss_ratio=None
        if len(measured) < 2 or least_loss < 0.0
        else _loss_ratio(means[measured], of_mean or float),
        loss=loss,
        group_count=len(measured),
        minimum_rows=minimum_rows,
        unmeasured=tuple(unmeasured),
        unmeasured_count=unmeasured_count,
    )


def _rates(
    numbers: Array,
    rows: Array,
    target: Array,
    predicted: Array,
    compared: Sequence[str],
    minimum_rows: int,
) -> _Rates:
    """Count rows by group and label once, and take all rates from the counts."""
    truth, answers = (_codes(labels, compared) for labels in (target, predicted))
    shape = (len(rows), len(compared))

    def count(labels: Array, among: Array) -> Array:
        cells = numbers[among] * len(compared) + labels[among]
        return np.bincount(cells, minlength=shape[0] * shape[1]).reshape(shape)

    positives, given = count(truth, truth >= 0), count(answers, answers >= 0)
    hits = count(truth, (truth >= 0) & (truth == answers))
    everyone = np.broadcast_to(rows[:, None], shape)
    return _Rates(
        selection=_share(given, everyone, minimum_rows),
        true_positive=_share(hits, positives, minimum_rows),
        false_positive=_share(given - hits, everyone - positives, minimum_rows),
        positives=positives,
    )


def _codes(values: Array, labels: Sequence[str]) -> Array:
    """Give the number of each value's label, however it is spelled there; -1 for any other label."""
    if not labels:
        return np.full(len(values), -1)
    texts, places = text_codes(values)
    spelled, number = spelled_as(texts, labels), {label: place for place, label in enumerate(labels)}
    return np.array([number.get(spelled[text], -1) for text in texts], dtype=np.int64)[places]


def _share(part: Array, whole: Array, minimum_rows: int) -> Array:
    return np.where(whole >= max(1, minimum_rows), part / np.maximum(whole, 1), np.nan)


def _spread(rates: Array, measured: Array) -> Array:
    """Give per label how far apart the groups are; -inf where fewer than two are known."""
    known = rates[measured]
    several = np.isfinite(known).sum(axis=0) >= 2
    low = np.where(np.isnan(known), np.inf, known).min(axis=0, initial=np.inf)
    high = np.where(np.isnan(known), -np.inf, known).max(axis=0, initial=-np.inf)
    return np.where(several, high - low, -np.inf)


def _odds(rates: _Rates, measured: Array) -> Array:
    return np.maximum(_spread(rates.true_positive, measured), _spread(rates.false_positive, measured))


def _furthest(rates: _Rates, measured: Array) -> int:
    """Give the number of the label whose rates are furthest apart; the last one where nothing can be compared."""
    apart = np.maximum(_spread(rates.selection, measured), _odds(rates, measured))
    if not np.isfinite(apart).any():
        return len(apart) - 1
    return int(np.argmax(apart))


def _shown(measured: Array, rows: Array, means: Array, rates: _Rates, found: int) -> list[int]:
    """Give the groups furthest apart, whatever their size, and the largest others; largest first."""
    kept: dict[int, None] = {}
    figures = [means] if not rates.selection.shape[1] else []
    figures += [
        rate[:, found]
        for rate in (rates.selection, rates.true_positive, rates.false_positive)
        if rate.shape[1]
    ]
    for figure in figures:
        known = measured[np.isfinite(figure[measured])]
        if len(known):
            kept |= dict.fromkeys((int(known[figure[known].argmin()]), int(known[figure[known].argmax()])))
    by_size = measured[np.argsort(-rows[measured], kind="stable")]
    kept |= dict.fromkeys(by_size.tolist())
    return sorted(list(kept)[:MOST_GROUPS], key=lambda group: -int(rows[group]))


def _unmeasured(
    names: Sequence[str], rows: Array, rates: _Rates, compared: Sequence[str], minimum_rows: int
) -> tuple[list[UnmeasuredGroup], int]:
    """Give the groups with too few rows, then the rates with too few, and how many they are in all.

    Of several labels, one that nobody truly has is not asked for.
    """
    small, count = _largest((rows < minimum_rows)[:, None], rows[:, None])
    groups = [UnmeasuredGroup(group=names[group], row_count=int(rows[group])) for group, _ in small]
    asked = rates.positives.any(axis=0) | (len(compared) == 1)
    few = []
    for rate, of, name in (
        (rates.true_positive, rates.positives, "true positive rate"),
        (rates.false_positive, rows[:, None] - rates.positives, "false positive rate"),
    ):
        found, number = _largest(np.isnan(rate) & (rows >= minimum_rows)[:, None] & asked, of)
        count += number
        few += [
            UnmeasuredGroup(
                group=names[group], row_count=int(of[group, label]), rate=f"{name} of {compared[label]}"
            )
            for group, label in found
        ]
    few.sort(key=lambda item: -item.row_count)
    return [*groups, *few][:MOST_GROUPS], count


def _largest(chosen: Array, counts: Array) -> tuple[list[list[int]], int]:
    """Give the places of the chosen with the largest counts, at most as many as are shown, and how many are chosen."""
    places = np.argwhere(chosen)
    order = np.argsort(-counts[chosen], kind="stable")[:MOST_GROUPS]
    return places[order].tolist(), len(places)


def _loss_ratio(means: Array, of_mean: Callable[[float], float]) -> float:
    least, most = of_mean(float(means.min())), of_mean(float(means.max()))
    if least == most:
        return 1.0
    return most / least if least > 0.0 else math.inf


def _ratio(rates: Array) -> float | None:
    if len(rates) < 2 or not rates.max() > 0.0:
        return None
    return float(rates.min() / rates.max())


def _at(rates: Array, group: int, label: int) -> float | None:
    return _number(rates[group, label]) if rates.shape[1] else None


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
