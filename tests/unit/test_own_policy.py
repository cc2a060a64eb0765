"""A policy of the user's own: what it gives is seen to be sound before it is in the ledger, where it would stand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from airflow_mlops.core.decision.evidence import WindowEvidence
from airflow_mlops.core.decision.retraining import Outcome, RetrainingDecision, TrainingChoice
from airflow_mlops.ledger import EntryKind, Ledger, LedgerEntry
from airflow_mlops.replay.what_if import policy_of, what_if
from airflow_mlops.services import Services
from airflow_mlops.steps.base import run_step
from tests.histories import LATE, window


@pytest.fixture
def url(tmp_path: Path) -> str:
    """A ledger with one checked window."""
    url = f"sqlite:///{tmp_path}/ledger.db"
    grade = {"measured": True, "degraded": True, "reason": "graded", "row_count": 5000, "value": 2.0}
    drift = {"drifted": False, "headline": "inputs", "row_count": 5000}
    with Ledger.open(url) as ledger:
        for kind, payload in ((EntryKind.PERFORMANCE_CHECK, grade), (EntryKind.DRIFT_CHECK, drift)):
            ledger.record(
                LedgerEntry(
                    kind=kind,
                    key=f"m|{window(0).key}",
                    model_name="m",
                    window=window(0),
                    subject=None,
                    summary="checked",
                    payload=payload,
                    actor="monitor",
                    recorded_at=window(0).end,
                )
            )
    return url


def decide(url: str, policy: str) -> dict[str, Any]:
    spec = {"model_name": "m", "actor": "test", "now": LATE.isoformat(), "decide": policy}
    return run_step("retraining", spec, Services(ledger_url=url))


Evidence = Sequence[WindowEvidence]


def sound(evidence: Evidence, *_: Any, **__: Any) -> list[RetrainingDecision]:
    return [
        RetrainingDecision(
            window=item.window,
            outcome=Outcome.RETRAIN,
            reason="always",
            training=TrainingChoice(
                start=item.window.start, end=item.window.end, half_life_days=None, why="all"
            ),
        )
        for item in evidence
    ]


def _changed(evidence: Evidence, **changes: Any) -> list[RetrainingDecision]:
    return [replace(decision, **changes) for decision in sound(evidence)]


def _trained(evidence: Evidence, **changes: Any) -> list[RetrainingDecision]:
    (decision,) = sound(evidence)
    assert decision.training is not None
    return [replace(decision, training=replace(decision.training, **changes))]


def nothing_at_all(evidence: Evidence, *_: Any, **__: Any) -> Any:
    return None


def raises(evidence: Evidence, *_: Any, **__: Any) -> Any:
    return 1 / 0


def takes_too_little(evidence: Evidence) -> Any:
    return sound(evidence)


def plain_dicts(evidence: Evidence, *_: Any, **__: Any) -> Any:
    return [{"window": item.window, "outcome": "nothing", "reason": ""} for item in evidence]


def too_many(evidence: Evidence, *_: Any, **__: Any) -> Any:
    return 2 * sound(evidence)


def no_training(evidence: Evidence, *_: Any, **__: Any) -> Any:
    return _changed(evidence, training=None)


def no_such_outcome(evidence: Evidence, *_: Any, **__: Any) -> Any:
    return _changed(evidence, outcome="perhaps")


def no_reason(evidence: Evidence, *_: Any, **__: Any) -> Any:
    return _changed(evidence, reason=None)


def no_such_ground(evidence: Evidence, *_: Any, **__: Any) -> Any:
    return _changed(evidence, promote_on="a whim")


def nobody_to_beat(evidence: Evidence, *_: Any, **__: Any) -> Any:
    return _changed(evidence, promote_on="predecessors")


def no_rows(evidence: Evidence, *_: Any, **__: Any) -> Any:
    return _trained(evidence, start=window(0).end)


def no_time_zone(evidence: Evidence, *_: Any, **__: Any) -> Any:
    return _trained(evidence, change=datetime(2024, 1, 1))


def grows_with_age(evidence: Evidence, *_: Any, **__: Any) -> Any:
    return _trained(evidence, half_life_days=-3.0)


def held_out_later(evidence: Evidence, *_: Any, **__: Any) -> Any:
    return _trained(evidence, holdout_start=window(0).end + timedelta(days=1))


def in_text(evidence: Evidence, *_: Any, **__: Any) -> Any:
    return _changed(evidence, outcome="nothing", training=None)


def has_it_in_hand(evidence: Evidence, *_: Any, **__: Any) -> Any:
    for item in evidence:
        assert item.performance is not None
        item.performance["value"] = 0.0
    return sound(evidence)


@pytest.mark.parametrize(
    ("policy", "why"),
    [
        (nothing_at_all, "failed, so nothing was decided: TypeError"),
        (raises, "failed, so nothing was decided: ZeroDivisionError: division by zero"),
        (takes_too_little, r"It is called as decide\(evidence, history, policy, previous_checks=...\)"),
        (plain_dicts, "give RetrainingDecision objects"),
        (too_many, "was asked about 1 windows and gave 2 decisions"),
        (no_training, "does not say on what: give its training"),
        (no_such_outcome, "outcome: Input should be 'retrain'"),
        (no_reason, "reason: Input should be a valid string"),
        (no_such_ground, "promote_on: Input should be 'held_out'"),
        (nobody_to_beat, "needs the recipe that was compared, and champion_version"),
        (no_rows, "its training has no rows"),
        (no_time_zone, "change of its training has no time zone"),
        (grows_with_age, "half_life_days of its training is -3.0"),
        (held_out_later, "holds out rows from 2024-01-12"),
    ],
)
def test_what_can_not_be_carried_out_is_refused_before_it_stands(url: str, policy: Any, why: str) -> None:
    path = f"{__name__}:{policy.__name__}"
    with pytest.raises(ValueError, match=why) as caught:
        decide(url, path)
    assert f"policy {path}" in str(caught.value)
    with Ledger.open(url) as ledger:
        assert ledger.entries(kind=EntryKind.RETRAINING_DECISION) == []
    assert decide(url, f"{__name__}:sound")["retrain"]  # the window is still there for a better policy
    with Ledger.open(url) as ledger, pytest.raises(ValueError, match=why):
        what_if(ledger, "m", policy_of([]), decide=path)


def test_an_outcome_in_text_is_an_outcome(url: str) -> None:
    assert decide(url, f"{__name__}:in_text")["decisions"][0]["outcome"] == "nothing"


def test_the_figures_in_the_ledger_are_those_of_the_checks(url: str) -> None:
    decide(url, f"{__name__}:has_it_in_hand")
    with Ledger.open(url) as ledger:
        (decision,) = ledger.entries(kind=EntryKind.RETRAINING_DECISION)
    assert decision.payload["evidence"]["performance"]["value"] == 2.0
