"""Deciders beside each other, killed, or woken in a blackout: what one has decided counts for the next."""

from __future__ import annotations

import threading
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, ClassVar

import pytest

from airflow_mlops.core.decision.retraining import decide_retraining
from airflow_mlops.ledger import EntryKind, Ledger, LedgerEntry
from airflow_mlops.services import Services
from airflow_mlops.steps.base import run_step
from tests.histories import START, window


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/ledger.db"


def write(
    ledger: Ledger, kind: EntryKind, at: datetime, *, index: int | None = None, **payload: Any
) -> LedgerEntry:
    entry = LedgerEntry(
        kind=kind,
        key=f"m|{window(index).key}" if index is not None else f"m|{at}",
        model_name="m",
        window=window(index) if index is not None else None,
        subject=None,
        summary=str(kind),
        payload=payload,
        actor="test",
        recorded_at=at,
    )
    return ledger.record(entry).entry


def check(ledger: Ledger, index: int) -> None:
    """A window in which the champion was bad."""
    grade = {"measured": True, "degraded": True, "reason": "graded", "row_count": 5000}
    drift = {"drifted": False, "headline": "inputs", "row_count": 5000}
    write(ledger, EntryKind.PERFORMANCE_CHECK, window(index).end, index=index, **grade)
    write(ledger, EntryKind.DRIFT_CHECK, window(index).end, index=index, **drift)


def decide(url: str, now: datetime, *, actor: str = "a", **more: Any) -> dict[str, Any]:
    spec = {"model_name": "m", "actor": actor, "now": now.isoformat(), **more}
    return run_step("retraining", spec, Services(ledger_url=url))


class TestTwoAtOnce:
    """The second one has read two windows when the first, which saw one, writes."""

    first_has_read, second_has_read, first_is_done = (threading.Event() for _ in range(3))

    @classmethod
    def first(cls, *args: Any, **more: Any) -> Any:
        found = decide_retraining(*args, **more)
        cls.first_has_read.set()
        assert cls.second_has_read.wait(30)
        return found

    @classmethod
    def second(cls, *args: Any, **more: Any) -> Any:
        found = decide_retraining(*args, **more)
        cls.second_has_read.set()
        assert cls.first_is_done.wait(30)
        return found

    @pytest.mark.parametrize(
        ("policy", "why"),
        [
            ({"budget": 1, "budget_days": 365}, "the budget of 1"),
            ({"cool_down_days": 100}, "it is cooling down"),
        ],
    )
    def test_what_the_faster_one_decided_counts(self, url: str, policy: dict[str, Any], why: str) -> None:
        for event in (self.first_has_read, self.second_has_read, self.first_is_done):
            event.clear()

        def run_first() -> None:
            decide(url, window(3).end, actor="first", policy=policy, decide=f"{__name__}:first")
            self.first_is_done.set()

        with Ledger.open(url) as ledger:
            check(ledger, 0)
            thread = threading.Thread(target=run_first)
            thread.start()
            assert self.first_has_read.wait(30)
            check(ledger, 1)
            told = decide(url, window(3).end, actor="second", policy=policy, decide=f"{__name__}:second")
            thread.join(30)
            made = ledger.entries(kind=EntryKind.RETRAINING_DECISION, newest_first=False)
        assert [(entry.actor, entry.payload["outcome"]) for entry in made] == [
            ("first", "retrain"),
            ("second", "alert"),
        ]
        assert why in made[1].payload["reason"]
        assert [item["outcome"] for item in told["decisions"]] == ["alert"]
        assert told["decision_key"] == made[0].key  # what is open is the first one's


first, second = TestTwoAtOnce.first, TestTwoAtOnce.second


class TestRipe:
    """When a window can be decided: not before what needs no labels is here, and not after it where no labels are waited for."""

    WITHOUT_LABELS: ClassVar = {
        "measured": False,
        "awaits_labels": True,
        "estimate_degraded": True,
        "reason": "estimated worse",
        "row_count": 0,
    }
    REQUIRED: ClassVar = ["performance_check", "drift_check", "challenger_check"]

    def drift(self, ledger: Ledger, **more: Any) -> None:
        payload = {"drifted": False, "headline": "inputs", "row_count": 5000} | more
        write(ledger, EntryKind.DRIFT_CHECK, window(0).end, index=0, **payload)

    @pytest.mark.parametrize("required", [REQUIRED, REQUIRED[:2]])
    def test_without_labels_the_estimate_is_waited_for(self, url: str, required: list[str]) -> None:
        policy = {"patience_days": 0, "retrain_on_estimate": True}
        with Ledger.open(url) as ledger:
            self.drift(ledger)
            early = decide(url, window(0).end, policy=policy, required_checks=required)
            assert (early["decisions"], early["waiting"]) == ([], [])
            write(ledger, EntryKind.PERFORMANCE_CHECK, window(0).end, index=0, **self.WITHOUT_LABELS)
        assert decide(url, window(0).end, policy=policy, required_checks=required)["retrain"]

    def test_a_check_that_never_comes_is_given_up(self, url: str) -> None:
        with Ledger.open(url) as ledger:
            self.drift(ledger, drifted=True)
        policy = {"patience_days": 0, "missing_check_days": 7}
        assert not decide(url, window(0).end + timedelta(days=6), policy=policy)["decisions"]
        (decision,) = decide(url, window(0).end + timedelta(days=8), policy=policy)["decisions"]
        assert decision["outcome"] == "alert"

    def test_a_degraded_estimate_does_not_wait_for_challengers(self, url: str) -> None:
        with Ledger.open(url) as ledger:
            self.drift(ledger)
            write(ledger, EntryKind.PERFORMANCE_CHECK, window(0).end, index=0, **self.WITHOUT_LABELS)
        day = window(0).end + timedelta(days=1)
        assert not decide(url, day, required_checks=self.REQUIRED)["decisions"]
        policy = {"retrain_on_estimate": True}
        assert decide(url, day, required_checks=self.REQUIRED, policy=policy)["retrain"]

    def test_however_often_labels_were_counted_patience_ends(self, url: str) -> None:
        with Ledger.open(url) as ledger:
            self.drift(ledger, drifted=True)
            for hour in range(1, 24 * 46):
                at = window(0).end + timedelta(hours=hour)
                key = f"m|{window(0).key}|{hour} labelled"
                look = self.WITHOUT_LABELS | {"row_count": hour, "estimate_degraded": False}
                ledger.record(
                    LedgerEntry(
                        kind=EntryKind.PERFORMANCE_CHECK, key=key, model_name="m", window=window(0), subject="1",
                        summary="", payload=look, actor="test", recorded_at=at,
                    )
                )  # fmt: skip
        told = decide(url, window(0).end + timedelta(days=46), policy={"retrain_on_drift": True})
        assert told["retrain"]

    def test_a_late_window_is_decided_in_the_light_of_newer_ones(self, url: str) -> None:
        healthy = {"measured": True, "degraded": False, "reason": "as promised", "row_count": 5000}
        with Ledger.open(url) as ledger:
            for index in (1, 2):
                write(ledger, EntryKind.PERFORMANCE_CHECK, window(index).end, index=index, **healthy)
            assert len(decide(url, window(3).end, required_checks=["performance_check"])["decisions"]) == 2
            check(ledger, 0)
        told = decide(url, window(4).end)
        assert [item["outcome"] for item in told["decisions"]] == ["covered"]
        assert "[2024-01-21, 2024-01-31) is not degraded" in told["decisions"][0]["reason"]


def test_of_thousands_of_windows_the_newest_are_in_the_result(url: str) -> None:
    with Ledger.open(url) as ledger:
        for index in range(130):
            check(ledger, index)
    told = decide(url, window(131).end)
    assert (told["decision_count"], len(told["decisions"])) == (130, 100)
    assert told["decisions"][-1]["window"] == window(129).key
    with Ledger.open(url) as ledger:
        assert len(ledger.entries(kind=EntryKind.RETRAINING_DECISION, limit=200)) == 130


def test_new_rows_count_in_however_many_windows_they_came(url: str) -> None:
    """An hour with ten labels at a time, a hundred hours since the last retraining."""
    policy, few = {"minimum_new_rows": 900}, {"measured": True, "reason": "graded", "row_count": 10}
    with Ledger.open(url) as ledger:
        check(ledger, 0)
        first = decide(url, window(1).end, policy=policy)
        outcome = {"outcome": "rejected", "reason": "no better", "model_version": "2"}
        write(ledger, EntryKind.RETRAINING_OUTCOME, window(1).end, index=0, **outcome)
        for index in range(1, 101):
            grade = few | {"degraded": index == 100}
            write(ledger, EntryKind.PERFORMANCE_CHECK, window(index).end, index=index, **grade)
            told = decide(url, window(index).end, policy=policy, required_checks=["performance_check"])
    assert (first["retrain"], told["retrain"]) == (True, True), told["reason"]
    assert datetime.fromisoformat(told["plan"]["window"]["end"]) == window(100).end


class TestBlackout:
    FREEZE: ClassVar = {
        "blackouts": [
            {
                "start": window(2).start.isoformat(),
                "end": window(3).start.isoformat(),
                "why": "year's end",
            }
        ]
    }
    BEFORE, INSIDE, AFTER = window(1).start, window(2).start + timedelta(days=1), window(3).start

    def test_a_retraining_decided_before_is_not_taken_up_inside(self, url: str) -> None:
        with Ledger.open(url) as ledger:
            check(ledger, 0)
        assert decide(url, self.BEFORE, policy=self.FREEZE)["retrain"]
        inside = decide(url, self.INSIDE, policy=self.FREEZE)
        assert not inside["retrain"]
        assert inside["reason"].endswith(
            "[2024-01-01, 2024-01-11) has to wait until 2024-01-31 00:00 UTC: year's end"
        )
        after = decide(url, self.AFTER, policy=self.FREEZE)
        assert (after["retrain"], after["resumed"]) == (True, True)

    def test_nor_is_what_was_promoted_before_deployed_inside(self, url: str) -> None:
        with Ledger.open(url) as ledger:
            check(ledger, 0)
            key = decide(url, self.BEFORE, policy=self.FREEZE)["decision_key"]
            promotion = LedgerEntry(
                kind=EntryKind.PROMOTION,
                key="p",
                model_name="m",
                window=None,
                subject="2",
                summary="promoted",
                payload={"alias": "champion", "model_version": "2", "decision_key": key},
                actor="test",
                recorded_at=self.BEFORE,
            )
            ledger.move_alias(
                model_name="m", alias="champion", model_version="2", expected_version=None, entry=promotion
            )
        assert not decide(url, self.INSIDE, policy=self.FREEZE)["deploy"]
        assert decide(url, self.AFTER, policy=self.FREEZE)["deploy"]

    def test_a_postponed_window_does_not_wait_for_labels(self, url: str) -> None:
        with Ledger.open(url) as ledger:
            check(ledger, 0)
        assert decide(url, self.INSIDE, policy=self.FREEZE)["reason"].startswith(
            "[2024-01-01, 2024-01-11) is postponed: graded"
        )


def test_a_promotion_that_was_never_deployed_is_no_defeat(url: str) -> None:
    """Two retrainings lost, the third won and its deployment failed: the fourth has no reason to pause."""
    with Ledger.open(url) as ledger:
        for index in range(4):
            check(ledger, index)
            told = decide(url, window(index).end, policy={"rejections_before_pause": 3})
            assert told["retrain"], told["reason"]
            key = told["decision_key"]
            payload = {"alias": "champion", "model_version": "2", "decision_key": key}
            if index == 2:
                write(ledger, EntryKind.PROMOTION, window(index).end, **payload)
                continue
            lost = LedgerEntry(
                kind=EntryKind.RETRAINING_OUTCOME,
                key=key,
                model_name="m",
                window=None,
                subject=None,
                summary="",
                payload={"outcome": "reject"},
                actor="test",
                recorded_at=window(index).end,
            )
            ledger.record(lost)
        check(ledger, 4)
    assert decide(url, window(4).end, policy={"rejections_before_pause": 3})["retrain"]


def test_a_new_challenger_makes_the_champion_no_younger(url: str) -> None:
    with Ledger.open(url) as ledger:
        for days, alias in ((0, "champion"), (300, "shadow")):
            at = START + timedelta(days=days)
            entry = LedgerEntry(
                kind=EntryKind.PROMOTION,
                key=alias,
                model_name="m",
                window=None,
                subject="1",
                summary="",
                payload={"alias": alias, "model_version": "1"},
                actor="test",
                recorded_at=at,
            )
            ledger.move_alias(
                model_name="m", alias=alias, model_version="1", expected_version=None, entry=entry
            )
        grade = {"measured": True, "degraded": False, "reason": "graded", "row_count": 5000}
        write(ledger, EntryKind.PERFORMANCE_CHECK, window(30).end, index=30, **grade)
    policy = {"maximum_age_days": 92}
    told = decide(url, window(30).end, policy=policy, required_checks=["performance_check"])
    assert told["retrain"]
    assert "the last retraining was 310 days ago" in told["reason"]


class TestComesBack:
    """It was decided that version 1 comes back in place of 2."""

    @pytest.fixture(autouse=True)
    def decided(self, url: str) -> None:
        with Ledger.open(url) as ledger:
            self.promote(ledger, "2", None, day=0)
            payload = {
                "outcome": "bring_back",
                "version": "1",
                "champion_version": "2",
                "reason": "it is back",
            }
            write(ledger, EntryKind.RETRAINING_DECISION, window(0).end, index=0, **payload)

    def promote(self, ledger: Ledger, version: str, before: str | None, *, day: int, **payload: Any) -> None:
        entry = LedgerEntry(
            kind=EntryKind.PROMOTION,
            key=f"{version} {day}",
            model_name="m",
            window=None,
            subject=version,
            summary="",
            payload={"alias": "champion", "model_version": version, "previous_version": before} | payload,
            actor="test",
            recorded_at=START + timedelta(days=day),
        )
        ledger.move_alias(
            model_name="m", alias="champion", model_version=version, expected_version=before, entry=entry
        )

    def test_until_it_is_there(self, url: str) -> None:
        for _ in range(2):
            told = decide(url, window(0).end)
            asked = told["bring_back"], told["champion_version"], told["verdict"], told["retrain"]
            assert asked == ("1", "2", "promote", False)
        with Ledger.open(url) as ledger:
            self.promote(ledger, "1", "2", day=11, decision_key=told["decision_key"])
        told = decide(url, window(0).end)
        assert (told["bring_back"], told["deploy"]) == (None, True)  # killed before it was deployed

    def test_not_in_the_place_of_another_nor_when_that_one_has_gone_again(self, url: str) -> None:
        with Ledger.open(url) as ledger:
            self.promote(ledger, "3", "2", day=11)
            told = decide(url, window(1).end)
            assert told["bring_back"] is None
            assert "the champion is version 3 by now" in told["reason"]
            self.promote(ledger, "2", "3", day=12)
            assert decide(url, window(2).end)["bring_back"] is None
            assert ledger.open_retraining("m") is None

    def test_not_where_its_task_was_taken_out(self, url: str) -> None:
        told = decide(url, window(1).end, may_bring_back=False)
        assert told["bring_back"] is None
        assert "there is no task for it any more" in told["reason"]
        with Ledger.open(url) as ledger:
            assert ledger.open_retraining("m") is None

    def test_it_is_no_younger_for_it(self, url: str) -> None:
        key = decide(url, window(0).end)["decision_key"]
        with Ledger.open(url) as ledger:
            self.promote(ledger, "1", "2", day=300, decision_key=key)
            grade = {"measured": True, "degraded": False, "reason": "graded", "row_count": 5000}
            write(ledger, EntryKind.PERFORMANCE_CHECK, window(30).end, index=30, **grade)
        policy, checks = {"maximum_age_days": 92}, ["performance_check"]
        told = decide(url, window(30).end, policy=policy, required_checks=checks)
        assert "the last retraining was 310 days ago" in told["reason"]

    def test_what_was_before_is_covered(self, url: str) -> None:
        """Labels of an earlier window came later: it tells of a world that is over."""
        earlier = window(-1)
        grade = {"measured": True, "degraded": True, "reason": "graded", "row_count": 5000}
        with Ledger.open(url) as ledger:
            write(ledger, EntryKind.PERFORMANCE_CHECK, window(2).end, index=-1, **grade)
        told = decide(url, window(2).end, required_checks=["performance_check"])
        (decision,) = told["decisions"]
        assert (decision["window"], decision["outcome"]) == (earlier.key, "covered")
        assert told["bring_back"] == "1"
