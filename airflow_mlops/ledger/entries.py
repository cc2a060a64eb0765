"""What one line of the ledger is."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any

from airflow_mlops.core.windows import Window

#: Outcomes of a retraining decision that may put another version in the champion's place.
ACTING = ("retrain", "bring_back")


class EntryKind(StrEnum):
    """What an entry is about."""

    DATASET = "dataset"
    VALIDATION = "validation"
    SCREENING = "screening"
    TRAINING = "training"
    PACKAGE = "package"
    SELECTION = "selection"
    EVALUATION = "evaluation"
    EXPLANATION = "explanation"
    REGISTRATION = "registration"
    APPROVAL = "approval"
    PROMOTION = "promotion"
    ROLLBACK = "rollback"
    BUILD = "build"
    ROLLOUT = "rollout"
    DEPLOYMENT = "deployment"
    SCORING = "scoring"
    SKEW_CHECK = "skew_check"
    DRIFT_CHECK = "drift_check"
    PERFORMANCE_CHECK = "performance_check"
    CHALLENGER_CHECK = "challenger_check"
    RETRAINING_DECISION = "retraining_decision"
    RETRAINING_OUTCOME = "retraining_outcome"
    INCIDENT = "incident"
    NOTIFICATION = "notification"
    ATTESTATION = "attestation"


@dataclass(frozen=True, kw_only=True, slots=True)
class LedgerEntry:
    """Something that was seen or decided.

    :param kind: what it is about.
    :param key: with ``kind`` unique: the same thing written twice is one entry.
    :param model_name: registered model; ``None`` for what concerns no model.
    :param window: window it concerns.
    :param subject: what it is about within the model, such as a version.
    :param summary: one sentence for people.
    :param payload: the facts, JSON.
    :param actor: who wrote it: ``dag_id/dag_run_id/task_id``, or a person.
    :param recorded_at: when; naive values are taken as UTC.
    :param entry_id: position in the ledger; ``None`` before it is written.
    """

    kind: EntryKind
    key: str
    model_name: str | None
    window: Window | None
    subject: str | None
    summary: str
    payload: dict[str, Any]
    actor: str
    recorded_at: datetime
    entry_id: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Recorded:
    """An entry as it stands in the ledger, and whether this call wrote it."""

    entry: LedgerEntry
    created: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class ChampionPeriod:
    """A stretch of time in which one version had an alias.

    :param model_name: registered model.
    :param model_version: the version.
    :param since: when it got the alias.
    :param until: when another one did; ``None``: it still has it.
    :param actor: who gave it the alias.
    :param summary: and why, in a sentence.
    """

    model_name: str
    model_version: str
    since: datetime
    until: datetime | None
    actor: str
    summary: str


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowChecks:
    """The checks of a window that stand.

    :param checks: one of each kind that there is: the newest, of performance checks the newest that measured something.
    :param first_checked_at: when it was first looked at, by any check of these kinds.
    """

    window: Window
    checks: tuple[LedgerEntry, ...]
    first_checked_at: datetime


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowGrade:
    """The performance check of a window that stands: the newest that measured something, else the newest.

    :param window: the window.
    :param entry: the check.
    :param first_checked_at: when the window's performance was first looked at.
    """

    window: Window
    entry: LedgerEntry
    first_checked_at: datetime

    @property
    def measured(self) -> bool:
        """Whether realized performance is known."""
        return bool(self.entry.payload.get("measured"))

    @property
    def final(self) -> bool:
        """Whether no label is awaited any more."""
        settled = self.measured or not self.entry.payload.get("awaits_labels", True)
        return bool(self.entry.payload.get("final", settled))
