"""Random histories of a model: checks, wake-ups, crashes and clocks as they come in practice."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from airflow_mlops.core.codec import from_dict
from airflow_mlops.core.decision.retraining import RetrainingPolicy
from airflow_mlops.core.windows import Window
from airflow_mlops.ledger import EntryKind, Ledger, LedgerEntry
from airflow_mlops.services import Services
from airflow_mlops.steps.base import run_step

START = datetime(2024, 1, 1, tzinfo=UTC)
DAYS = 10

#: Long after everything: labels, patience and blackouts are over by then.
LATE = START + timedelta(days=3000)


def window(index: int) -> Window:
    start = START + timedelta(days=DAYS * index)
    return Window(start=start, end=start + timedelta(days=DAYS))


def random_policy(chance: random.Random) -> dict[str, Any]:
    freeze = START + timedelta(days=chance.uniform(0, 80))
    return {
        "cool_down_days": chance.choice([0, 0, 15]),
        "budget": chance.choice([None, 1, 2]),
        "patience_days": chance.choice([0, 5, 25]),
        "missing_check_days": chance.choice([3, 45]),
        "retrain_on_drift": chance.random() < 0.3,
        "retrain_on_estimate": chance.random() < 0.3,
        "maximum_age_days": chance.choice([None, 35]),
        "minimum_new_rows": chance.choice([0, 6000]),
        "blackouts": []
        if chance.random() < 0.5
        else [
            {"start": freeze.isoformat(), "end": (freeze + timedelta(days=12)).isoformat(), "repeat": "never"}
        ],
    }


@dataclass
class History:
    """One model's life.

    :param fates: what happened, counted.
    """

    ledger: Ledger
    url: str
    model: str
    chance: random.Random
    policy: dict[str, Any]
    required: list[str] = field(default_factory=lambda: ["performance_check", "drift_check"])
    checked: set[Window] = field(default_factory=set)
    fates: Counter[str] = field(default_factory=Counter)
    told: int = 0

    def live(self) -> None:
        """Windows are checked in any order, labels come late; deciders are woken too often, late or never, and get killed."""
        plan = self._plan(self.chance.randint(1, 5))
        self.required += ["challenger_check"] if self.chance.random() < 0.5 else []
        paused = False
        for now, index, labelled in sorted(plan, key=lambda item: item[0]):
            self._check(now, index, labelled=labelled)
            if self.chance.random() < 0.15:
                paused = not paused
            wakes = {"lost": 0, "sent": 1, "twice": 2, "late": 1}
            fate = "paused" if paused else self.chance.choice(list(wakes))
            self.fates[fate] += 1
            delay = timedelta(days=self.chance.uniform(1, 9) if fate == "late" else 0)
            for _ in range(wakes.get(fate, 0)):
                self.wake(now + delay)
        for days in (0, 1):  # the clock wakes it once a day, for as long as it takes
            self.wake(LATE + timedelta(days=days), skew=False)

    def wake(self, now: datetime, *, skew: bool = True) -> None:
        """Let one of two schedulers' tasks decide, by its own clock, and perhaps be killed on the way."""
        clock = now + timedelta(days=self.chance.choice([-2, -0.1, 0, 0.1, 2]) if skew else 0)
        spec = {
            "model_name": self.model,
            "actor": self.chance.choice(["scheduler a", "scheduler b"]),
            "now": clock.isoformat(),
            "policy": self.policy,
            "required_checks": self.required,
        }
        result = run_step("retraining", spec, Services(ledger_url=self.url))
        self.told += len(result["decisions"])
        opened = self.ledger.open_retraining(self.model)
        assert (result["retrain"] or result["deploy"]) <= (opened is not None)
        if opened is not None and result["retrain"]:
            assert result["decision_key"] == opened.key
            self._carry_out(opened, clock)

    def _carry_out(self, decision: LedgerEntry, now: datetime) -> None:
        fate = self.chance.choice(["promoted", "promoted", "reject", "killed"])
        self.fates[fate] += 1
        if fate == "promoted":
            self._write(
                EntryKind.PROMOTION,
                f"{decision.key}|{now}",
                now,
                None,
                decision_key=decision.key,
                alias="champion",
                model_version="2",
            )
        if fate != "killed":
            self._write(EntryKind.RETRAINING_OUTCOME, decision.key, now, None, outcome=fate)

    def decisions(self) -> list[LedgerEntry]:
        return self.ledger.entries(
            kind=EntryKind.RETRAINING_DECISION, model_name=self.model, limit=1000, newest_first=False
        )

    def _plan(self, count: int) -> list[tuple[datetime, int, bool]]:
        """Say when each window is checked: after its end, often in another order, first with too few labels or not."""
        plan = []
        for index in range(count):
            first = window(index).end + timedelta(
                days=self.chance.choice([0.2, 0.5, self.chance.uniform(0, 40)])
            )
            late = self.chance.random() < 0.4
            plan.append((first, index, not late))
            if late and self.chance.random() < 0.8:
                plan.append((first + timedelta(days=self.chance.uniform(1, 60)), index, True))
        return plan

    def _check(self, now: datetime, index: int, *, labelled: bool) -> None:
        grade = {
            "measured": labelled,
            "awaits_labels": not labelled,
            "degraded": labelled and self.chance.random() < 0.5,
            "estimate_degraded": not labelled and self.chance.random() < 0.3,
            "reason": "graded",
            "row_count": 5000 if labelled else 0,
        }
        drift = {"drifted": self.chance.random() < 0.3, "headline": "inputs", "row_count": 5000}
        stage = "" if labelled else "|early"
        self._write(EntryKind.PERFORMANCE_CHECK, f"{window(index).key}{stage}", now, index, **grade)
        if self.chance.random() < 0.9:  # or it failed
            self._write(EntryKind.DRIFT_CHECK, window(index).key, now, index, **drift)
        if labelled and self.chance.random() < 0.9:  # without labels nothing can be compared
            self._write(EntryKind.CHALLENGER_CHECK, window(index).key, now, index, check=None)
        self.checked.add(window(index))

    def _write(self, kind: EntryKind, key: str, now: datetime, index: int | None, **payload: Any) -> None:
        self.ledger.record(
            LedgerEntry(
                kind=kind,
                key=key if key.startswith(self.model) else f"{self.model}|{key}",
                model_name=self.model,
                window=window(index) if index is not None else None,
                subject=None,
                summary=str(kind),
                payload=payload,
                actor="test",
                recorded_at=now,
            )
        )

    def require_sound(self) -> None:
        """See that what must hold in every history did in this one."""
        decisions, policy = self.decisions(), from_dict(RetrainingPolicy, self.policy)
        assert Counter(entry.window for entry in decisions) == Counter(self.checked)
        assert self.told == len(decisions)  # nobody claims a decision that another one took
        retrainings = [entry for entry in decisions if entry.payload["outcome"] == "retrain"]
        for place, entry in enumerate(retrainings):
            earlier, now = retrainings[:place], entry.recorded_at
            assert entry.window is not None
            assert all(blackout.until(now) is None for blackout in policy.blackouts)
            recent = [one for one in earlier if one.recorded_at > now - timedelta(days=policy.budget_days)]
            assert policy.budget is None or len(recent) < policy.budget
            ends = [one.window.end for one in earlier if one.window]
            assert not ends or entry.window.end > max(ends)
            assert not ends or entry.window.end >= max(ends) + timedelta(days=policy.cool_down_days)
            assert entry.payload["evidence"]["row_count"] in {0, 5000}
            before = [one for one in decisions if self._decided_before(one, entry) and one.window]
            measured = [one.window for one in before if one.payload["evidence"]["row_count"]]
            assert all(one < entry.window for one in measured), "newer windows were decided: it is too late"

    @staticmethod
    def _decided_before(one: LedgerEntry, other: LedgerEntry) -> bool:
        together = (one.actor, one.recorded_at) == (other.actor, other.recorded_at)
        return not together and (one.entry_id or 0) < (other.entry_id or 0)
