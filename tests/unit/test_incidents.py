"""When an incident opens, gets worse and is over; and that nobody is told twice."""

from __future__ import annotations

import math
import random
import tempfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from airflow_mlops.core.codec import from_dict, to_dict
from airflow_mlops.core.monitoring.incident_findings import (
    Retraining,
    count_overdue,
    finding_of_drift,
    findings_of_grade,
    findings_of_retrainings,
)
from airflow_mlops.core.monitoring.incidents import (
    Cause,
    EventKind,
    Finding,
    IncidentEvent,
    IncidentPolicy,
    compose_message,
    next_events,
    open_incidents,
    untold,
)
from airflow_mlops.core.windows import Window
from airflow_mlops.ledger import EntryKind, Ledger, LedgerEntry, Recorded
from airflow_mlops.services import Services
from airflow_mlops.steps.base import run_step
from airflow_mlops.steps.incidents import IncidentsSpec, _bring_up_to_date, read_story

START = datetime(2024, 1, 1, tzinfo=UTC)
POLICY = IncidentPolicy()
OPENED, WORSENED, REMINDED, RECOVERED = EventKind
ALERTS = {OPENED, WORSENED, REMINDED}


def window(index: int, days: float = 1) -> Window:
    return Window(start=START + index * timedelta(days=days), end=START + (index + 1) * timedelta(days=days))


def finding(index: int, bad: bool, level: float | None = None, cause: Cause = Cause.INPUTS) -> Finding:
    return Finding(cause=cause, window=window(index), bad=bad, level=level, reason=f"window {index}")


def history(levels: str | Sequence[float | None], cause: Cause = Cause.INPUTS) -> list[Finding]:
    """A digit is a bad window with so many tenths, a dot a clean one, a blank one that was not measured."""
    return [
        finding(index, mark != ".", None if mark == "." else float(mark) / 10, cause)
        for index, mark in enumerate(levels)
        if mark != " "
    ]


def story(levels: str, policy: IncidentPolicy = POLICY, cause: Cause = Cause.INPUTS) -> dict[int, str]:
    events = next_events("m", cause, history(levels, cause), [], policy)
    return {(event.window.start - START).days: str(event.kind) for event in events}


class TestStory:
    def test_an_incident_opens_once_and_is_over_after_two_clean_windows(self) -> None:
        assert story(".33..") == {1: "opened", 4: "recovered"}

    def test_one_clean_window_is_no_recovery(self) -> None:
        assert story("3.3.3.") == {0: "opened"}

    def test_what_was_not_measured_is_neither_bad_nor_clean(self) -> None:
        assert story("3  .") == {0: "opened"}
        assert story("3 . .") == {0: "opened", 4: "recovered"}

    def test_it_is_told_again_when_it_is_worse_by_half_than_the_worst_that_was_told(self) -> None:
        assert story("3346668") == {0: "opened", 3: "worsened"}  # .4 is not half as bad again, .8 not than .6
        assert story("359") == {0: "opened", 1: "worsened", 2: "worsened"}

    def test_a_small_number_that_doubles_is_not_worse(self) -> None:
        near = [finding(index, True, level) for index, level in enumerate((0.02, 0.06, 0.11))]
        assert [event.kind for event in next_events("m", Cause.INPUTS, near, [], POLICY)] == [OPENED]

    def test_it_is_brought_to_mind_after_a_week(self) -> None:
        assert story("3" * 16) == {0: "opened", 7: "reminded", 14: "reminded"}

    def test_long_windows_are_not_all_reminders(self) -> None:
        monthly = [
            Finding(cause=Cause.INPUTS, window=window(index, days=30), bad=True, level=0.5, reason="x")
            for index in range(7)
        ]
        kinds = [event.kind for event in next_events("m", Cause.INPUTS, monthly, [], POLICY)]
        assert kinds == [OPENED, REMINDED, REMINDED]

    def test_the_next_bad_window_after_a_recovery_is_another_incident(self) -> None:
        events = next_events("m", Cause.INPUTS, history("3..3"), [], POLICY)
        assert [event.kind for event in events] == [OPENED, RECOVERED, OPENED]
        assert [event.number for event in events] == [1, 2, 3]
        assert events[0].incident == events[1].incident != events[2].incident

    def test_a_verdict_that_late_labels_turned_is_taken_back(self) -> None:
        told = next_events("m", Cause.PERFORMANCE, history("5", Cause.PERFORMANCE), [], POLICY)
        turned = history("..", Cause.PERFORMANCE)
        (event,) = next_events("m", Cause.PERFORMANCE, turned, told, POLICY)
        assert (event.kind, event.window) == (RECOVERED, window(1))

    def test_an_older_window_that_comes_late_is_no_news(self) -> None:
        told = next_events("m", Cause.INPUTS, [finding(3, True, 0.5)], [], POLICY)
        assert next_events("m", Cause.INPUTS, history("99.5"), told, POLICY) == []

    def test_causes_that_do_not_scatter_are_over_at_once(self) -> None:
        overdue = [finding(0, True, 1.0, Cause.LABELS)]
        told = next_events("m", Cause.LABELS, overdue, [], POLICY)
        (over,) = next_events("m", Cause.LABELS, [finding(0, False, None, Cause.LABELS)], told, POLICY)
        assert (over.kind, over.window) == (RECOVERED, window(0))
        assert next_events("m", Cause.LABELS, overdue, [*told, over], POLICY) == []  # told once is told

    def test_two_schedules_of_one_model_are_one_incident(self) -> None:
        """Hours that are clean say little about the day they are in, or about the day after it."""

        def hour(number: int) -> Window:
            return Window(start=START + timedelta(hours=number), end=START + timedelta(hours=number + 1))

        found, told, days = [], [], 7
        for number in range(24 * days):
            found.append(Finding(cause=Cause.INPUTS, window=hour(number), bad=False, reason="few rows"))
            told += next_events("m", Cause.INPUTS, found, told, POLICY)  # before the day's own check
            if number % 24 == 23:
                found.append(finding(number // 24, bad=True))
                told += next_events("m", Cause.INPUTS, found, told, POLICY)
        assert [(event.kind, event.window) for event in told] == [(OPENED, window(0))]
        later = [replace(found[0], window=hour(24 * days + number)) for number in range(48)]
        (over,) = next_events("m", Cause.INPUTS, [*found, *later], told, POLICY)
        assert (over.kind, over.window) == (RECOVERED, later[-1].window)

    def test_days_of_work_and_weekends_count_alike(self) -> None:
        weekend = Window(start=START, end=START + timedelta(days=3))
        bad = Finding(cause=Cause.INPUTS, window=weekend, bad=True, reason="")
        told = next_events("m", Cause.INPUTS, [bad, *(finding(day, False) for day in (3, 4))], [], POLICY)
        assert [event.kind for event in told] == [OPENED, RECOVERED]

    def test_sentences(self) -> None:
        opened, worse, over = next_events(
            "fare", Cause.PERFORMANCE, history("39..", Cause.PERFORMANCE), [], POLICY
        )
        assert opened.title == "fare: realized performance is degraded"
        assert worse.title == "fare: realized performance is degraded, and it got worse"
        assert over.title == "fare: realized performance is good again"
        assert over.reason == (
            "2 measured windows in a row are clean, the newest [2024-01-04, 2024-01-05): window 3"
        )

    @pytest.mark.parametrize("wrong", [{"clean_windows": 0}, {"worse_factor": 0.5}, {"worse_by": -1.0}])
    def test_a_policy_that_makes_no_sense(self, wrong: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match="at least 1"):
            IncidentPolicy(**wrong)

    @pytest.mark.parametrize("name", ["reminder_days", "labels_overdue_days", "unfinished_days"])
    @pytest.mark.parametrize("value", [-1.0, math.nan])
    def test_a_time_below_zero_is_none(self, name: str, value: float) -> None:
        with pytest.raises(ValueError, match=f"{name}=.* is no time"):
            IncidentPolicy(**{name: value})

    def test_the_name_of_an_incident_fits_whatever_the_model_is_called(self) -> None:
        names = set()
        for ending in "ab":
            (event,) = next_events("m" * 240 + ending, Cause.INPUTS, history("3"), [], POLICY)
            assert len(event.incident) <= 250
            names.add(event.incident)
        assert len(names) == 2


MARKS = st.lists(st.sampled_from([None, 0.0, 0.1, 0.3, 0.5, 0.8, 1.6]), min_size=1, max_size=25)


def as_findings(marks: list[float | None], cause: Cause = Cause.INPUTS) -> list[Finding]:
    """None was not measured, nought is clean, the rest bad."""
    return [
        finding(index, bool(level), level or None, cause)
        for index, level in enumerate(marks)
        if level is not None
    ]


def require_sound(events: list[IncidentEvent]) -> None:
    """What must hold of any story."""
    assert [event.number for event in events] == list(range(1, len(events) + 1))
    alerts = Counter(event.window for event in events if event.kind in ALERTS)
    assert max(alerts.values(), default=1) == 1, "a window is told once"
    is_open, opened = False, set()
    for before, event in zip([None, *events], events, strict=False):
        assert is_open == (event.kind is not OPENED), "never two open, and nothing is told of what is over"
        assert before is None or event.window >= before.window
        is_open = event.is_open
        if event.kind is OPENED:
            assert event.incident not in opened
            opened.add(event.incident)
        assert event.incident in opened
    assert len(open_incidents(events)) == int(is_open)


@given(marks=MARKS, clean=st.integers(1, 3), seed=st.integers(0, 2**16))
@settings(max_examples=300)
def test_windows_in_any_order_and_twice(marks: list[float | None], clean: int, seed: int) -> None:
    policy = IncidentPolicy(clean_windows=clean)
    findings = as_findings(marks)
    arrivals = [*findings, *findings]
    random.Random(seed).shuffle(arrivals)
    events: list[IncidentEvent] = []
    known: list[Finding] = []
    for arrived in arrivals:
        known.append(arrived)
        events += next_events("m", Cause.INPUTS, known, events, policy)
        require_sound(events)
    for again in (findings, findings[::-1], known):
        assert next_events("m", Cause.INPUTS, again, events, policy) == []
    if sum(item.bad for item in findings) == 0:
        assert events == []
    in_order = next_events("m", Cause.INPUTS, findings, [], policy)
    assert bool(in_order) == bool(events), "somebody hears of it, whatever comes first"


@given(
    marks=MARKS, turns=st.lists(st.tuples(st.integers(0, 24), st.sampled_from([0.0, 0.4, 0.9])), max_size=12)
)
@settings(max_examples=300)
def test_verdicts_that_turn(marks: list[float | None], turns: list[tuple[int, float]]) -> None:
    events = next_events("m", Cause.ESTIMATE, as_findings(marks, Cause.ESTIMATE), [], POLICY)
    for index, level in turns:
        if index < len(marks):
            marks[index] = level
        findings = as_findings(marks, Cause.ESTIMATE)
        events += next_events("m", Cause.ESTIMATE, findings, events, POLICY)
        require_sound(events)
        assert next_events("m", Cause.ESTIMATE, findings, events, POLICY) == []


@given(marks=MARKS, looks=st.lists(st.integers(0, 60), max_size=8))
@settings(max_examples=300)
def test_whoever_listens_now_and_then_knows_what_is_open(marks: list[float | None], looks: list[int]) -> None:
    """A channel that was down, or is new, hears where things stand, and of no incident twice the same."""
    events = next_events("m", Cause.INPUTS, as_findings(marks), [], POLICY)
    told: list[IncidentEvent] = []
    for upto in [*sorted(looks), len(events)]:
        heard = untold(events[:upto], {event.key for event in told})
        assert len({event.incident for event in heard}) == len(heard) <= len(events)
        told += heard
        believed = {event.incident: event for event in told}
        standing = open_incidents(events[:upto])
        assert {event.incident for event in believed.values() if event.is_open} == {
            event.incident for event in standing
        }
    assert len({event.key for event in told}) == len(told)
    assert untold(events, {event.key for event in told}) == []


GRADE = {
    "measured": True,
    "degraded": True,
    "relative_change": 0.4,
    "labelled_share": 1.0,
    "reason": "MAE 2.8 against 2.0",
    "awaits_labels": False,
    "estimated_value": 2.8,
    "reference_value": 2.0,
    "estimate_trusted": True,
    "estimate_degraded": True,
}


def causes_of(grade: dict[str, Any], waited_days: float = 0.0) -> dict[Cause, bool]:
    found = findings_of_grade(window(0), grade, waited_days=waited_days, policy=POLICY)
    return {item.cause: item.bad for item in found}


def test_labels_have_the_last_word_over_an_estimate() -> None:
    assert causes_of(GRADE) == {Cause.PERFORMANCE: True, Cause.ESTIMATE: False, Cause.LABELS: False}


def test_an_estimate_counts_where_it_is_trusted() -> None:
    waiting = GRADE | {"measured": False, "awaits_labels": True, "labelled_share": 0.1}
    assert causes_of(waiting) == {Cause.ESTIMATE: True}
    assert causes_of(waiting | {"estimate_trusted": False}) == {}
    (found,) = findings_of_grade(window(0), waiting, waited_days=0.0, policy=POLICY)
    assert found.level == pytest.approx(0.4)


def test_labels_are_overdue_after_two_weeks_unless_there_are_none_to_come() -> None:
    waiting = GRADE | {
        "measured": False,
        "awaits_labels": True,
        "labelled_share": 0.1,
        "estimate_trusted": False,
    }
    assert causes_of(waiting, waited_days=14.0) == {}
    assert causes_of(waiting, waited_days=14.1) == {Cause.LABELS: True}
    assert causes_of(waiting | {"awaits_labels": False}, waited_days=99.0) == {}


def test_labels_that_are_lost_for_good_end_their_incident() -> None:
    story: list[IncidentEvent] = []
    told = []
    for now in range(1, 140):
        lost = GRADE | {"measured": False, "labelled_share": 0.1, "estimate_trusted": False}
        found = []
        for index in range(now):
            waited = float(now - index)
            final = waited >= 90.0
            grade = lost | {"awaits_labels": not final, "final": final} if index == 3 else GRADE
            found += findings_of_grade(window(index), grade, waited_days=waited, policy=POLICY)
        overdue = count_overdue(finding for finding in found if finding.cause is Cause.LABELS)
        new = next_events("m", Cause.LABELS, overdue, story, POLICY)
        story += new
        told += [(now, str(event.kind), event.reason.split(": ", 1)[1]) for event in new]
    assert told == [
        (18, "opened", "10% labelled 15 days after the first check"),
        (93, "recovered", "given up: the time for labels is over with 10% of them"),
    ]


def test_who_gave_no_answers_has_no_labels_to_give_up() -> None:
    settled = {"measured": False, "awaits_labels": False, "final": True, "labelled_share": 0.0}
    assert causes_of(settled | {"answer_count": 0}, waited_days=99.0) == {}
    assert causes_of(settled | {"answer_count": 9, "labels": None}, waited_days=99.0) == {}


def test_more_windows_without_labels_are_worse() -> None:
    overdue = [finding(index, index > 1, None, Cause.LABELS) for index in range(5)]
    assert [item.level for item in count_overdue(overdue)] == [None, None, 1.0, 2.0, 3.0]


def test_labels_are_not_here_again_while_an_older_window_waits_for_its_own() -> None:
    story: list[IncidentEvent] = []

    def look(*late: bool) -> list[str]:
        found = count_overdue(
            finding(index, bad, None, Cause.LABELS) for index, bad in enumerate(late, start=1)
        )
        new = next_events("m", Cause.LABELS, found, story, POLICY)
        story.extend(new)
        return [f"{event.kind} {event.window.start:%d}" for event in new]

    assert look(True, True, True) == ["opened 02", "worsened 03", "worsened 04"]
    assert look(True, True, False) == []
    assert look(True, False, False, False) == []
    assert look(False, False, False, False) == ["recovered 04"]


def test_drift_is_as_bad_as_its_share_of_inputs() -> None:
    check = {
        "drifted": True,
        "drifted_count": 3,
        "feature_count": 6,
        "headline": "x",
        "report_url": "http://r",
    }
    found = finding_of_drift(window(0), check)
    assert (found.level, found.links) == (0.5, {"Drift report": "http://r"})


def retraining(index: int, outcome: str | None = None, **more: Any) -> Retraining:
    return Retraining(window=window(index), outcome=outcome, reason=f"reason {index}", **more)


def test_retrainings_that_end_in_vain_again_and_again() -> None:
    tries = [retraining(index, "reject") for index in range(4)] + [retraining(4, "promoted")]
    found = [
        item for item in findings_of_retrainings(tries, POLICY) if item.cause is Cause.REJECTED_RETRAININGS
    ]
    assert [(item.window, item.bad, item.level) for item in found] == [
        (window(2), True, 3.0),
        (window(3), True, 4.0),
        (window(4), False, 0.0),
    ]


@pytest.mark.parametrize(
    ("item", "found"),
    [
        (retraining(0, waited_days=1.9), {}),
        (retraining(0, waited_days=2.1), {Cause.UNFINISHED_RETRAINING: True}),
        (retraining(0, waited_days=2.1, superseded=True), {}),
        (
            retraining(0, promoted_version="3", current_version="3", waited_days=2.1),
            {Cause.UNFINISHED_RETRAINING: False, Cause.DEPLOYMENT: True},
        ),
        (
            retraining(0, promoted_version="3", current_version="4", waited_days=2.1),
            {Cause.UNFINISHED_RETRAINING: False, Cause.DEPLOYMENT: False},
        ),
        (retraining(0, "reject", waited_days=9.0), {Cause.UNFINISHED_RETRAINING: False}),
    ],
)
def test_what_a_retraining_owes(item: Retraining, found: dict[Cause, bool]) -> None:
    assert {each.cause: each.bad for each in findings_of_retrainings([item], POLICY)} == found


def test_an_event_survives_the_ledger() -> None:
    for event in next_events("m", Cause.INPUTS, history("39.."), [], POLICY):
        assert from_dict(IncidentEvent, to_dict(event)) == event


class TestMessage:
    def test_what_channels_read_is_escaped_as_each_needs_it(self) -> None:
        (event,) = next_events(
            "<b>&", Cause.INPUTS, [replace(finding(0, True), reason="a < b & c")], [], POLICY
        )
        message = compose_message(event, {"Airflow run": "http://a/?x=1&y=2", "Nothing": ""})
        assert "<p>[2024-01-01, 2024-01-02): a &lt; b &amp; c.</p>" in message["html"]
        assert '<a href="http://a/?x=1&amp;y=2">Airflow run</a>' in message["html"]
        assert "<b>&lt;b&gt;&amp;: inputs drifted</b>" in message["html"]
        assert message["slack"].startswith("*&lt;b&gt;&amp;: inputs drifted*")
        assert "<http://a/?x=1&amp;y=2|Airflow run>" in message["slack"]
        assert "Nothing" not in message["text"]
        assert "a < b & c" in message["text"]

    def test_a_recovery_resolves_what_the_opening_triggered(self) -> None:
        opened, over = (
            compose_message(event) for event in next_events("m", Cause.INPUTS, history("3.."), [], POLICY)
        )
        assert opened["dedup_key"] == over["dedup_key"]
        assert (opened["action"], over["action"]) == ("trigger", "resolve")
        assert "It was so since 2024-01-01 00:00 UTC." in over["text"]


def check(
    kind: EntryKind, index: int, *, key: str = "", subject: str | None = None, **payload: Any
) -> LedgerEntry:
    return LedgerEntry(
        kind=kind,
        key=f"m|{window(index).key}{key}",
        model_name="m",
        window=window(index),
        subject=subject,
        summary="x",
        payload=payload,
        actor="monitor/run/check",
        recorded_at=window(index).end,
    )


def drift(index: int, drifted: bool, **more: Any) -> LedgerEntry:
    found = {
        "drifted": drifted,
        "drifted_count": int(drifted),
        "feature_count": 2,
        "headline": "1 of 2 drifted",
    }
    return check(EntryKind.DRIFT_CHECK, index, **found, report_url=None, **more)


def decision(index: int) -> LedgerEntry:
    return check(EntryKind.RETRAINING_DECISION, index, outcome="retrain", reason="degraded", training=None)


def rejected(index: int) -> LedgerEntry:
    ended = check(EntryKind.RETRAINING_OUTCOME, index, outcome="reject", reason="no better than the champion")
    return replace(ended, window=None)


@pytest.fixture
def services(tmp_path: Path) -> Services:
    return Services(ledger_url=f"sqlite:///{tmp_path / 'ledger.db'}")


def write(services: Services, *entries: LedgerEntry) -> None:
    with Ledger.open(services.require("ledger_url")) as ledger:
        ledger.record_all(entries)


def look(services: Services, day: float = 30) -> dict[str, Any]:
    now = (START + timedelta(days=day)).isoformat()
    return run_step("incidents", {"model_name": "m", "actor": "a", "now": now}, services)


def read_events(services: Services) -> list[IncidentEvent]:
    with Ledger.open(services.require("ledger_url")) as ledger:
        return read_story(ledger, "m")


def test_the_step_writes_what_is_new_once(services: Services) -> None:
    page = {"version_url": "http://mlflow/#/models/m/versions/3"}
    registration = check(EntryKind.REGISTRATION, 0, subject="3", **page)
    grade = check(EntryKind.PERFORMANCE_CHECK, 0, subject="3", **GRADE)
    write(services, registration, drift(0, True), grade, decision(0), decision(1), decision(2))
    write(services, rejected(0), rejected(1), rejected(2))
    first = look(services)
    assert [event["cause"] for event in first["events"]] == ["performance", "inputs", "rejected_retrainings"]
    assert first["events"][0]["links"] == {"Version 3": page["version_url"]}
    assert first["events"][0]["found_by"] == "monitor/run/check"
    assert [event["cause"] for event in first["open"]] == ["performance", "inputs", "rejected_retrainings"]
    again = look(services)
    assert (again["events"], again["event_count"], again["open"]) == ([], 0, first["open"])
    with Ledger.open(services.require("ledger_url")) as ledger:
        assert len(ledger.entries(kind=EntryKind.INCIDENT, model_name="m")) == 3


def test_labels_of_short_windows_are_overdue_as_well(services: Services) -> None:
    """Two weeks are more windows of an hour than are looked back on."""
    hour = 1 / 24
    waits = GRADE | {
        "measured": False,
        "awaits_labels": True,
        "labelled_share": 0.0,
        "estimate_trusted": False,
    }

    def hourly(index: int, suffix: str = "", **payload: Any) -> LedgerEntry:
        one = check(EntryKind.PERFORMANCE_CHECK, index, key=suffix, **waits | {"final": False} | payload)
        of = window(index, hour)
        return replace(one, key=f"m|{of.key}{suffix}", window=of, recorded_at=of.end)

    write(services, *(hourly(index) for index in range(24 * 20)))
    (opened,) = look(services, 20)["open"]
    assert opened["cause"] == "labels"
    assert "0% labelled 20 days after the first check" in read_events(services)[0].reason
    came = {"measured": True, "awaits_labels": False, "labelled_share": 1.0, "final": True, "degraded": False}
    write(services, *(hourly(index, "|labels", **came) for index in range(24 * 8)))
    told = look(services, 20.5)
    assert [(event["cause"], event["kind"]) for event in told["events"]] == [("labels", "recovered")]
    assert told["open"] == []


def test_a_report_that_was_drawn_later_is_linked(services: Services) -> None:
    plain = drift(0, True)
    drawn = replace(plain, key=f"{plain.key}|report", payload=plain.payload | {"report_url": "http://r"})
    write(services, plain, drawn)
    (event,) = look(services)["events"]
    assert event["links"] == {"Drift report": "http://r"}


def test_a_promoted_version_that_does_not_serve(services: Services) -> None:
    write(services, decision(0))
    with Ledger.open(services.require("ledger_url")) as ledger:
        ledger.move_alias(
            model_name="m",
            alias="champion",
            model_version="4",
            expected_version=None,
            entry=replace(
                check(
                    EntryKind.PROMOTION, 1, subject="4", alias="champion", model_version="4", reason="better"
                ),
                window=None,
                payload={
                    "alias": "champion",
                    "model_version": "4",
                    "reason": "better",
                    "decision_key": decision(0).key,
                },
            ),
        )
    (event,) = look(services, day=5)["events"]
    assert event["title"] == "m: a promoted version does not serve"
    assert "version 4 was promoted 3 days ago and was never deployed" in event["reason"]
    write(services, replace(rejected(0), payload={"outcome": "promoted", "reason": "better"}))
    (over,) = look(services, day=6)["events"]
    assert (over["cause"], over["kind"]) == ("deployment", "recovered")


def test_a_long_history_fits_into_the_result(services: Services) -> None:
    long = "x" * 3000
    entries = [drift(index, index % 3 == 0) for index in range(90)]
    write(services, *(replace(item, payload=item.payload | {"headline": long}) for item in entries))
    result = look(services)
    assert result["event_count"] == 60
    assert len(result["events"]) == 10
    assert result["open"] == []


def test_schedulers_that_look_at_once_write_each_event_once(services: Services) -> None:
    entries = [drift(index, index % 3 == 0) for index in range(24)]
    write(services, *entries)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: look(services), range(4)))
    assert sum(result["event_count"] for result in results) == 16
    require_sound(read_events(services))


@given(
    drifted=st.lists(st.sampled_from([None, False, True]), min_size=1, max_size=12),
    seed=st.integers(0, 2**16),
    looks=st.sets(st.integers(0, 23)),
)
@settings(max_examples=25)
def test_checks_in_any_order_and_twice_through_the_ledger(
    drifted: list[bool | None], seed: int, looks: set[int]
) -> None:
    """Lost events, paused Dags, reruns: whenever somebody looks, and whatever is there by then."""
    with tempfile.TemporaryDirectory() as folder:
        services = Services(ledger_url=f"sqlite:///{folder}/ledger.db")
        checks = [drift(index, found) for index, found in enumerate(drifted) if found is not None]
        arrivals = [*checks, *checks]
        random.Random(seed).shuffle(arrivals)
        for position, arrived in enumerate(arrivals):
            write(services, arrived)
            if position in looks:
                look(services)
        last = look(services)
        again = look(services)
        assert (again["event_count"], again["open"]) == (0, last["open"])
        events = read_events(services)
        require_sound(events)
        assert bool(events) == any(drifted)


def test_schedulers_that_know_different_windows_do_not_open_two(services: Services) -> None:
    """One looks before an older window arrives, one after: there is one incident, and one next event."""
    write(services, drift(5, True))
    look(services)
    write(services, drift(2, True), drift(3, True))
    assert look(services)["event_count"] == 0


class Overtaken(Ledger):
    """A connection that another scheduler overtakes between its look and its first write."""

    overtake: Any = None

    def record(self, entry: LedgerEntry) -> Recorded:
        overtake, self.overtake = self.overtake, None
        if overtake is not None:
            overtake()
        return super().record(entry)


def test_who_is_overtaken_starts_again_from_what_the_winner_wrote(services: Services) -> None:
    """Both would write event 1; what the loser made of its own event 1 must not follow the winner's."""
    write(services, drift(5, True))
    spec = IncidentsSpec(model_name="m", actor="b", now=START)
    with Overtaken.open(services.require("ledger_url")) as ledger:
        assert isinstance(ledger, Overtaken)
        ledger.overtake = lambda: look(services)  # it knows window 5 only
        knows = history("3..3..", Cause.INPUTS)
        assert _bring_up_to_date(ledger, spec, Cause.INPUTS, knows) == []
    (event,) = read_events(services)
    assert (event.kind, event.window) == (OPENED, window(5))
