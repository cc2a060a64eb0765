"""What a policy did on a stream, window by window."""

from __future__ import annotations

from dataclasses import dataclass

from airflow_mlops.core.windows import Window


@dataclass(frozen=True, kw_only=True, slots=True)
class LivedWindow:
    """What happened in one window.

    :param window: the window.
    :param row_count: predictions.
    :param model_version: that gave them.
    :param value: metric of its predictions.
    :param first_value: metric of the first model's predictions for the same rows.
    :param outcome: what was decided after it.
    :param reason: why.
    :param promoted: version that was promoted after it; ``None``: none was.
    :param taken_back: version that was on trial in it and did worse than the one before; ``None``: none.
    :param trainings: models trained after it.
    :param seconds: wall time of all of it.
    """

    window: Window
    row_count: int
    model_version: str
    value: float
    first_value: float
    outcome: str
    reason: str
    promoted: str | None
    taken_back: str | None
    trainings: int
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplayResult:
    """What a policy did on a stream.

    :param stream: its name.
    :param policy: its name.
    :param metric: what is reported.
    :param windows: what happened, oldest first.
    """

    stream: str
    policy: str
    metric: str
    windows: tuple[LivedWindow, ...]

    @property
    def value(self) -> float:
        """Mean of the metric, a window counting as many times as it has rows."""
        return _mean([(item.value, item.row_count) for item in self.windows])

    @property
    def first_value(self) -> float:
        """The same of the first model, had nobody ever retrained."""
        return _mean([(item.first_value, item.row_count) for item in self.windows])

    @property
    def promotions(self) -> int:
        """Number of promotions after the first model's."""
        return sum(item.promoted is not None for item in self.windows)

    @property
    def trainings(self) -> int:
        """Number of trainings, also of models that were never promoted."""
        return sum(item.trainings for item in self.windows)


def _mean(values: list[tuple[float, int]]) -> float:
    return sum(value * rows for value, rows in values) / sum(rows for _, rows in values)
