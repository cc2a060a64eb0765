"""What a team sets about retraining: when, on what, how often and at which cost."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from airflow_mlops.core.decision.blackouts import Blackout
from airflow_mlops.core.decision.challengers import ChallengerPolicy
from airflow_mlops.core.windows import find_time_zone

#: More days than anybody means; times further back have no date.
_MOST_DAYS = 36_525


@dataclass(frozen=True, kw_only=True, slots=True)
class RetrainingPolicy:
    """When to retrain, and on what.

    :param minimum_training_rows: rows after a change that suffice to train on them alone (rule of thumb).
    :param trailing_days: training window otherwise, back from the end of the decided window.
    :param half_life_days: weight of a row halves with this age in the trailing window; ``None``: equal weights.
    :param retrain_on_drift: retrain when only the inputs moved; by default that is an alert.
    :param retrain_on_estimate: retrain when labels are awaited and a trusted estimate says that performance fell; by default
        the window waits for its labels.
    :param maximum_age_days: retrain when nobody has for so long, whatever the checks found; ``None``: age is no reason.
    :param patience_days: how long a window waits for labels that are late, and for the comparison of challengers on them, from
        its first check on; then it is decided without them. 0: there are no labels to wait for.
    :param missing_check_days: how long it waits for a check that needs no labels and is missing, as its task failed; not shorter
        than ``patience_days``.
    :param challengers: when a fresh model is worth a promotion, where challengers are compared.
    :param cost: what a training and its rollout cost, in units of the loss summed over predictions (where a dollar of error
        in a fare costs 10 cents and a rollout 50 dollars: 500); no retraining that has to win back more. ``None``: the shares
        in ``challengers`` stand for it.
    :param cool_down_days: time after a retraining in which only alerts are given.
    :param time_zone: whose days the cool-down counts, such as ``Europe/Berlin``: seven of them are a week also where summer time
        begins. All other days are of 24 hours.
    :param minimum_new_rows: labelled rows since the last retraining that the next one needs.
    :param budget: retrainings in any ``budget_days``; ``None``: no limit.
    :param budget_days: 30: a month.
    :param blackouts: times in which nothing is retrained: a window that wants it is decided when they are over.
    :param bring_back: whether an earlier champion that does much better again than all models of today takes their place.
    :param rejections_before_pause: after so many retrainings in a row that did not beat the champion the next one waits for
        2, 4, and at most 8 windows.
    """

    minimum_training_rows: int = 2000
    trailing_days: float = 92.0
    half_life_days: float | None = 30.0
    retrain_on_drift: bool = False
    retrain_on_estimate: bool = False
    maximum_age_days: float | None = None
    patience_days: float = 45.0
    missing_check_days: float = 45.0
    challengers: ChallengerPolicy = field(default_factory=ChallengerPolicy)
    cost: float | None = None
    cool_down_days: float = 0.0
    minimum_new_rows: int = 0
    budget: int | None = None
    budget_days: float = 30.0
    blackouts: tuple[Blackout, ...] = ()
    bring_back: bool = True
    rejections_before_pause: int = 2
    time_zone: str = "UTC"

    def __post_init__(self) -> None:
        for name in (
            "minimum_training_rows",
            "minimum_new_rows",
            "patience_days",
            "missing_check_days",
            "cool_down_days",
        ):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it can't be below zero")
        for name in ("trailing_days", "budget_days", "maximum_age_days", "half_life_days", "cost"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} is {value}; it must be a number above zero")
        for name in (
            "trailing_days",
            "patience_days",
            "missing_check_days",
            "cool_down_days",
            "budget_days",
            "maximum_age_days",
        ):
            if (getattr(self, name) or 0) > _MOST_DAYS:
                raise ValueError(
                    f"{name} is {getattr(self, name):g}; give at most {_MOST_DAYS:,}, a hundred years"
                )
        if self.budget is not None and self.budget < 1:
            raise ValueError(
                f"budget is {self.budget}: no retraining would ever start; give 1 or more, or None"
            )
        find_time_zone(self.time_zone)
        if self.rejections_before_pause < 1:
            raise ValueError(
                f"rejections_before_pause is {self.rejections_before_pause}; it must be 1 or more"
            )
