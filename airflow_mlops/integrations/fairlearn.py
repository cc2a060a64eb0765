"""fairlearn: rates per group of people, and how far apart they are."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from airflow_mlops.core.fairness import FairnessReport, GroupRates

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Smaller groups are left out: their rates are mostly chance.
MINIMUM_ROWS = 50
#: Groups a report shows, the largest ones.
MOST_GROUPS = 20


def compare_groups(
    column: str,
    groups: NDArray[Any],
    *,
    target: NDArray[Any],
    predicted: NDArray[Any],
    losses: NDArray[Any],
    positive: str | None,
) -> FairnessReport:
    """Measure each group.

    :param column: name of the column.
    :param groups: group of each row, shape ``(n,)``.
    :param target: what turned out, shape ``(n,)``.
    :param predicted: what was answered, shape ``(n,)``.
    :param losses: per row, shape ``(n,)``.
    :param positive: label whose rates are compared; ``None`` for numbers.
    :raises ImportError: fairlearn is not installed.
    """
    import numpy as np

    names, numbers, counts = np.unique(groups.astype(str), return_inverse=True, return_counts=True)
    large = np.argsort(-counts, kind="stable")[:MOST_GROUPS]
    judged = np.isin(numbers, large[counts[large] >= MINIMUM_ROWS])
    if not judged.any():
        return FairnessReport(column=column, positive=positive, groups=())
    frame = _frame(
        names[numbers[judged]],
        target=target[judged],
        predicted=predicted[judged],
        losses=losses[judged],
        positive=positive,
    )
    rates = frame.by_group.to_dict(orient="index")
    spread, ratio = frame.difference(), frame.ratio()
    odds = [_number(spread[name]) for name in ("true_positive_rate", "false_positive_rate") if name in spread]
    known = [value for value in odds if value is not None]
    alone = len(rates) < 2
    losses_apart = _number(ratio["mean_loss"])
    return FairnessReport(
        column=column,
        positive=positive,
        groups=tuple(_rates(str(name), row) for name, row in rates.items()),
        demographic_parity_difference=None if alone else _number(spread.get("selection_rate")),
        demographic_parity_ratio=None if alone else _number(ratio.get("selection_rate")),
        equalized_odds_difference=None if alone else max(known, default=None),
        loss_ratio=1.0 / losses_apart if losses_apart and not alone else None,
    )


def _frame(
    groups: NDArray[Any],
    *,
    target: NDArray[Any],
    predicted: NDArray[Any],
    losses: NDArray[Any],
    positive: str | None,
) -> Any:
    import numpy as np
    from fairlearn import metrics

    if positive is None:
        truth = answers = np.zeros(len(groups), dtype=int)
        rates: dict[str, Any] = {}
    else:
        truth, answers = (
            np.asarray(labels.astype(str) == positive, dtype=int) for labels in (target, predicted)
        )
        rates = {
            "selection_rate": metrics.selection_rate,
            "true_positive_rate": _where(1),
            "false_positive_rate": _where(0),
        }
    return metrics.MetricFrame(
        metrics={"row_count": metrics.count, "mean_loss": _mean_loss, **rates},
        y_true=truth,
        y_pred=answers,
        sensitive_features=np.where(groups == "", "(empty)", groups),
        sample_params={"mean_loss": {"losses": losses}},
    )


def _mean_loss(_truth: Any, _answers: Any, *, losses: Any) -> float:
    return float(losses.mean())


def _where(truth_is: int) -> Any:
    """Share that is answered 1 among the rows whose truth is this; not a number when there are none."""

    def rate(truth: Any, answers: Any) -> float:
        chosen = answers[truth == truth_is]
        return float(chosen.mean()) if len(chosen) else math.nan

    return rate


def _rates(name: str, row: dict[str, Any]) -> GroupRates:
    return GroupRates(
        group=name,
        row_count=int(row["row_count"]),
        mean_loss=float(row["mean_loss"]),
        selection_rate=_number(row.get("selection_rate")),
        true_positive_rate=_number(row.get("true_positive_rate")),
        false_positive_rate=_number(row.get("false_positive_rate")),
    )


def _number(value: Any) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)
