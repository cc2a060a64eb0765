"""When a column, and when a window counts as drifted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from airflow_mlops.core.comparison.resampling import require_level

Rule = Literal["tested", "evidently"]
Correction = Literal["holm", "benjamini_hochberg", "none"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DriftPolicy:
    """When a column, and when a window counts as drifted.

    :param rule: ``tested``: a column has drifted when its distance reaches the threshold *and* the difference is no accident
        of the sample. ``evidently``: the verdict Evidently's ``DataDriftPreset`` gives.
    :param significance: of the tests of all columns of a window together, in ``(0, 1)``. With Holm's correction this bounds
        the share of windows in which any column is called drifted by accident.
    :param correction: for testing many columns: ``holm`` bounds the chance of any false alarm, however columns depend on each
        other; ``benjamini_hochberg`` bounds the share of false ones among the alarms and finds more; ``none``.
    :param minimum_rows: fewer values of a column, on either side, can't be judged (rule of thumb).
    :param share_threshold: share of drifted columns among those that were judged, from which the window counts as drifted.
    :raises ValueError: naming the field and what it takes.
    """

    rule: Rule = "tested"
    significance: float = 0.01
    correction: Correction = "holm"
    minimum_rows: int = 30
    share_threshold: float = 0.5

    def __post_init__(self) -> None:
        require_level("significance", self.significance)
        for name, kinds in (("rule", Rule), ("correction", Correction)):
            if getattr(self, name) not in get_args(kinds):
                raise ValueError(f"{name} is {getattr(self, name)!r}: choose {' or '.join(get_args(kinds))}")
        if self.minimum_rows < 1:
            raise ValueError(f"minimum_rows is {self.minimum_rows}: give a number of rows from 1 on")
        if not 0.0 <= self.share_threshold <= 1.0:
            raise ValueError(
                f"share_threshold is {self.share_threshold}: give a share of the inputs, such as 0.5 for half"
            )
