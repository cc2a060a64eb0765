"""fairlearn: rates per group of people, and how far apart they are."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from airflow_mlops.core.comparison.fairness import FairnessReport, GroupRates
from airflow_mlops.core.comparison.predictions import spelled_as, text_codes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

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
    labels: Sequence[str],
    loss: str = "mean loss",
    of_mean: Callable[[float], float] | None = None,
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
    :raises ValueError: fairlearn is not installed.
    """
    import numpy as np

    _require_fairlearn(column)

    names, numbers = text_codes(groups)
    counts = np.bincount(numbers)
    large = np.argsort(-counts, kind="stable")[:MOST_GROUPS]
    judged = np.isin(numbers, large[counts[large] >= MINIMUM_ROWS])
    compared: list[str | None] = [None] if not labels else list(labels[-1:] if len(labels) == 2 else labels)
    if not judged.any():
        return FairnessReport(column=column, positive=compared[-1], groups=())
    reports = [
        _compare(
            column,
            np.array(names, dtype=object)[numbers[judged]],
            target=target[judged],
            predicted=predicted[judged],
            losses=losses[judged],
            positive=label,
            loss=loss,
            of_mean=of_mean or float,
        )
        for label in compared
    ]
    return max(reports, key=lambda report: report.largest_difference or 0.0)


def _compare(
    column: str,
    groups: NDArray[Any],
    *,
    target: NDArray[Any],
    predicted: NDArray[Any],
    losses: NDArray[Any],
    positive: str | None,
    loss: str,
    of_mean: Callable[[float], float],
) -> FairnessReport:
    frame = _frame(groups, target=target, predicted=predicted, losses=losses, positive=positive)
    rates = frame.by_group.to_dict(orient="index")
    spread, ratio = frame.difference(), frame.ratio()
    odds = [_number(spread[name]) for name in ("true_positive_rate", "false_positive_rate") if name in spread]
    known = [value for value in odds if value is not None]
    alone = len(rates) < 2
    means = [float(row["mean_loss"]) for row in rates.values()]
    return FairnessReport(
        column=column,
        positive=positive,
        groups=tuple(_rates(str(name), row) for name, row in rates.items()),
        demographic_parity_difference=None if alone else _number(spread.get("selection_rate")),
        demographic_parity_ratio=None if alone else _number(ratio.get("selection_rate")),
        equalized_odds_difference=None if alone else max(known, default=None),
        # Only of sizes from zero on is one so many times the other.
        loss_ratio=None
        if alone or losses.min() < 0.0
        else _loss_ratio(of_mean(min(means)), of_mean(max(means))),
        loss=loss,
    )


def _loss_ratio(least: float, most: float) -> float:
    if least == most:
        return 1.0
    return most / least if least > 0.0 else math.inf


def _require_fairlearn(column: str) -> None:
    try:
        import fairlearn  # noqa: F401
    except ImportError as err:
        raise ValueError(
            f"to compare groups by {column!r} fairlearn is needed: install airflow-mlops[fairness], or leave groups out"
        ) from err


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
        truth, answers = (_are(positive, labels) for labels in (target, predicted))
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


def _are(label: str, labels: NDArray[Any]) -> NDArray[Any]:
    """Tell which rows have a label, however it is spelled there."""
    import numpy as np

    texts, places = text_codes(labels)
    spelled = spelled_as(texts, (label,))
    return np.array([int(spelled[text] == label) for text in texts])[places]


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
