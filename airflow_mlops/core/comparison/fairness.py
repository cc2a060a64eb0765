"""Fairness: whether a model treats groups of people alike."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupRates:
    """One group.

    :param group: its value of the column.
    :param row_count: its rows.
    :param mean_loss: mean loss per row.
    :param selection_rate: share that is given the positive label; ``None`` for numbers.
    :param true_positive_rate: share of the truly positive that is given it; ``None`` when there are none.
    :param false_positive_rate: share of the truly negative that is given it; ``None`` when there are none.
    """

    group: str
    row_count: int
    mean_loss: float
    selection_rate: float | None = None
    true_positive_rate: float | None = None
    false_positive_rate: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class FairnessReport:
    """The groups of one column, and how far apart they are.

    Source: Feldman et al., "Certifying and removing disparate impact", KDD 2015 (ratio of selection rates, the "four
    fifths rule"); Hardt, Price and Srebro, "Equality of opportunity in supervised learning", NeurIPS 2016 (equalized
    odds).

    :param column: what the groups are of.
    :param positive: label that counts as positive; ``None`` for numbers.
    :param groups: groups with enough rows, the largest ones.
    :param demographic_parity_difference: largest less smallest selection rate, in ``[0, 1]``.
    :param demographic_parity_ratio: smallest over largest selection rate; below 0.8 is commonly taken for a warning.
    :param equalized_odds_difference: the larger of the spreads of true and of false positive rates, in ``[0, 1]``.
    :param loss_ratio: largest over smallest mean loss; ``None`` where that means nothing: of gains, or of a single group.
    :param loss: what the loss is called, such as ``rmse``.
    """

    column: str
    positive: str | None
    groups: tuple[GroupRates, ...]
    demographic_parity_difference: float | None = None
    demographic_parity_ratio: float | None = None
    equalized_odds_difference: float | None = None
    loss_ratio: float | None = None
    loss: str = "mean loss"

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
