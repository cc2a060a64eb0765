"""Evidence: what a retraining decision rests on, of one window and of what happened before."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from airflow_mlops.core.comparison.grades import labels_given_up
from airflow_mlops.core.decision.challengers import ChallengerCheck
from airflow_mlops.core.windows import Window

_PERFORMANCE_FIGURES = (
    "model_version",
    "metric",
    "value",
    "reference_value",
    "labelled_share",
    "degraded",
    "estimated_value",
    "estimate_interval",
    "estimate_trusted",
    "estimate_degraded",
)
_DRIFT_FIGURES = ("model_version", "drifted", "headline")


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowEvidence:
    """What the checks of one window found.

    :param window: the window.
    :param performance: payload of its performance check; ``None`` when there was none.
    :param drift: payload of its drift check; ``None`` when there was none.
    :param challengers: models side by side on it; ``None`` when none were compared.
    :param row_count: labelled rows in the window.
    :param waited_days: time since its first check.
    """

    window: Window
    performance: dict[str, Any] | None
    drift: dict[str, Any] | None
    challengers: ChallengerCheck | None = None
    row_count: int
    waited_days: float = 0.0

    @property
    def measured(self) -> bool:
        """Whether realized performance is known."""
        return bool(self.performance and self.performance.get("measured"))

    @property
    def awaits_labels(self) -> bool:
        """Whether realized performance is unknown and labels may still come."""
        return not self.measured and (self.performance or {}).get("awaits_labels", True)

    @property
    def labels_given_up(self) -> bool:
        """Whether realized performance will never be known, though there were answers that labels could have come for."""
        return bool(self.performance and labels_given_up(self.performance))

    @property
    def degraded(self) -> bool:
        """Whether realized performance fell behind what was promised."""
        return bool(self.measured and self.performance and self.performance.get("degraded"))

    @property
    def estimate_degraded(self) -> bool:
        """Whether performance is unknown, and an estimate that has proved itself says that it fell."""
        return bool(
            not self.measured and self.performance and self.performance.get("estimate_degraded", False)
        )

    @property
    def drifted(self) -> bool:
        """Whether the inputs moved."""
        return bool(self.drift and self.drift.get("drifted"))

    def figures(self) -> dict[str, Any]:
        """Give what a decision rests on, in figures, for whoever asks later."""
        performance = {name: (self.performance or {}).get(name) for name in _PERFORMANCE_FIGURES}
        drift = {name: (self.drift or {}).get(name) for name in _DRIFT_FIGURES}
        compared = self.challengers
        return {
            "row_count": self.row_count,
            "waited_days": round(self.waited_days, 3),
            "performance": performance if self.performance is not None else None,
            "drift": drift if self.drift is not None else None,
            "challengers": None
            if compared is None
            else {
                "champion": compared.champion,
                "loss": {one.version: one.loss for one in compared.contenders},
                "recipe": {one.version: one.recipe for one in compared.contenders},
            },
        }

    @property
    def lost(self) -> float | None:
        """Loss of the window beyond what was promised, summed over its rows; ``None`` where the metric is no mean loss."""
        found = self.performance or {}
        if not self.measured or found.get("loss_mean") is None or found.get("reference_loss_mean") is None:
            return None
        return float((found["loss_mean"] - found["reference_loss_mean"]) * found["row_count"])


@dataclass(frozen=True, kw_only=True, slots=True)
class RetrainingHistory:
    """What happened before.

    :param now: time of the decision.
    :param retrained_at: when retrainings were decided, newest first.
    :param last_retraining_window_end: end of the newest window a retraining was decided for.
    :param last_return_window_end: end of the newest window for which it was decided that an earlier champion comes back.
    :param champion_version: the champion now; ``None``: not known.
    :param champion_since: when a champion was promoted last; one that only came back is no younger for it.
    :param recent_outcomes: outcomes of retrainings, newest first.
    :param world_since: when the world last changed, as far as a promoted model was trained on what came after alone;
        ``None``: it never has.
    """

    now: datetime | None = None
    retrained_at: tuple[datetime, ...] = ()
    last_retraining_window_end: datetime | None = None
    last_return_window_end: datetime | None = None
    champion_version: str | None = None
    champion_since: datetime | None = None
    recent_outcomes: tuple[str, ...] = ()
    world_since: datetime | None = None

    @property
    def rejections(self) -> int:
        """How many retrainings in a row, up to now, did not beat the champion."""
        return next(
            (count for count, outcome in enumerate(self.recent_outcomes) if outcome == "promoted"),
            len(self.recent_outcomes),
        )

    @property
    def age_days(self) -> float | None:
        """Days since a new champion was promoted, or a retraining last tried to replace it; ``None`` when not known."""
        known = [time for time in (self.champion_since, *self.retrained_at[:1]) if time is not None]
        if self.now is None or not known:
            return None
        return (self.now - max(known)) / timedelta(days=1)
