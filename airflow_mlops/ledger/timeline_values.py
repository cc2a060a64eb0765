"""What a timeline tells: windows, what was measured and decided in them, events, and how a model stands."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from airflow_mlops.core.windows import Window
from airflow_mlops.ledger.entries import EntryKind


@dataclass(frozen=True, kw_only=True, slots=True)
class RealizedMetric:
    """The grade of a window that stands: the newest that measured something, else the newest.

    :param metric: what was measured.
    :param value: on the labelled rows; ``None``: there are none.
    :param interval: holds the true value with a probability of 95 %, by the normal approximation with neighboring rows taken
        as related; ``None`` for a metric that has no loss per row.
    :param promised: the metric on rows held out at training.
    :param relative_change: worsening against ``promised``, above zero is worse; ``None`` when not measured.
    :param measured: whether there was enough to judge.
    :param degraded: the verdict.
    :param labelled_share: share of the champion's answers that have a label, in ``[0, 1]``.
    :param row_count: labelled rows.
    :param final: no label is awaited any more.
    :param reason: the verdict in a sentence.
    :param graded_at: when.
    :param grades: how often the window was graded.
    """

    metric: str
    value: float | None
    interval: tuple[float, float] | None
    promised: float | None
    relative_change: float | None
    measured: bool
    degraded: bool
    labelled_share: float
    row_count: int
    final: bool
    reason: str
    graded_at: datetime
    grades: int


@dataclass(frozen=True, kw_only=True, slots=True)
class EstimatedMetric:
    """What the metric was thought to be before labels came.

    :param value: the estimate.
    :param interval: is to hold the realized value with a probability of 95 %.
    :param trusted: whether earlier estimates turned out well enough to act on this one.
    :param why: what that rests on.
    :param degraded: worse than tolerated by a trusted estimate, while nothing is measured.
    """

    value: float
    interval: tuple[float, float] | None
    trusted: bool
    why: str
    degraded: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class ColumnShift:
    """One column's part in the drift of a window.

    :param share_of_shift: its part in the whole shift, in ``[0, 1]``.
    :param sentence: what moved.
    """

    column: str
    drifted: bool
    share_of_shift: float
    sentence: str


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowDrift:
    """Whether the inputs moved.

    :param columns: at most five, the drifted ones first, largest part in the shift first.
    :param prediction_drifted: whether the answers moved; ``None`` when that was not measured.
    :param report_url: page that explains it; ``None`` when none was drawn.
    """

    drifted: bool
    drifted_count: int
    feature_count: int
    headline: str
    columns: tuple[ColumnShift, ...]
    prediction_drifted: bool | None
    report_url: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class ContenderLoss:
    """A model's mean loss in a window that it had not seen.

    :param recipe: how it was made; ``None`` for one made in another way.
    :param champion: whether it was the champion.
    """

    model_version: str
    recipe: str | None
    champion: bool
    trained_until: datetime
    loss: float


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowDecision:
    """What was decided for a window, and what became of it.

    :param outcome: ``retrain``, ``alert``, ``nothing`` or ``covered``.
    :param reason: in a sentence.
    :param training_start: first instant of the rows to train on; ``None``: with the first row, or no training at all.
    :param training_end: first instant after them; ``None``: there is no training.
    :param recipe: how the model is made; ``None``: by no recipe.
    :param decided_at: when.
    :param actor: by whom.
    :param key: ledger key of the decision.
    :param result: how the retraining ended: ``promoted``, ``reject`` and the like; ``None``: it has not, or there is none.
    :param result_reason: why, in a sentence.
    :param promoted_version: the version that was promoted for it.
    """

    outcome: str
    reason: str
    training_start: datetime | None
    training_end: datetime | None
    recipe: str | None
    decided_at: datetime
    actor: str
    key: str
    result: str | None
    result_reason: str | None
    promoted_version: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class TimelineWindow:
    """All that is known of one window; ``None`` where nobody looked.

    :param champion: the version whose answers were graded; before anybody graded, the one that was champion when the window
        ended; ``None``: there was none.
    :param served: all versions that answered.
    :param challengers: losses, best first; empty when none were compared.
    """

    window: Window
    champion: str | None
    served: tuple[str, ...]
    realized: RealizedMetric | None
    estimated: EstimatedMetric | None
    drift: WindowDrift | None
    challengers: tuple[ContenderLoss, ...]
    decision: WindowDecision | None


@dataclass(frozen=True, kw_only=True, slots=True)
class TimelineEvent:
    """A promotion, rollback, deployment or approval, at the time it was written down.

    :param alias: which alias moved; ``None`` where none did.
    :param model_version: the version it is about.
    :param previous_version: the one before; ``None``: there was none.
    """

    kind: EntryKind
    at: datetime
    alias: str | None
    model_version: str | None
    previous_version: str | None
    summary: str
    actor: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Timeline:
    """A page of a model's history.

    :param windows: oldest first.
    :param events: oldest first; those since the first window of the page, up to the next page's. Pages put together hold each
        event once.
    :param older: what to pass as ``before`` for the page before this one; ``None``: this is the first.
    """

    model_name: str
    windows: tuple[TimelineWindow, ...]
    events: tuple[TimelineEvent, ...]
    older: Window | None


class ModelState(StrEnum):
    """How a model stands; of several the first here."""

    NO_CHAMPION = "no_champion"
    RETRAINING = "retraining"
    DEPLOYING = "deploying"
    DEGRADED = "degraded"
    DRIFTED = "drifted"
    UNMEASURED = "unmeasured"
    HEALTHY = "healthy"


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenRetraining:
    """A retraining that was decided and has not ended.

    :param promoted_version: the version promoted for it, which does not serve yet; ``None``: there is none yet.
    """

    key: str
    window: Window | None
    decided_at: datetime
    reason: str
    promoted_version: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelOverview:
    """One model in a line.

    :param champion: version; ``None``: the ledger knows of none.
    :param champion_since: when it was promoted.
    :param last: the newest window anybody looked at.
    :param state: see :class:`ModelState`; ``unmeasured``: nobody knows how good the newest window's answers were.
    :param open_retraining: ``None``: there is none.
    :param last_entry_at: when anything was written about the model.
    """

    model_name: str
    champion: str | None
    champion_since: datetime | None
    last: TimelineWindow | None
    state: ModelState
    open_retraining: OpenRetraining | None
    last_entry_at: datetime
