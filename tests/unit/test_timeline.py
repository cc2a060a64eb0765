from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from airflow_mlops.cli import main
from airflow_mlops.core.codec import from_dict, to_dict
from airflow_mlops.core.decision.challengers import ChallengerCheck, Contender
from airflow_mlops.core.decision.retraining import Outcome, RetrainingDecision, recipe_rows
from airflow_mlops.ledger import EntryKind, Ledger, LedgerEntry
from airflow_mlops.ledger.tables import entries
from airflow_mlops.ledger.timeline import read_overview, read_timeline
from airflow_mlops.ledger.timeline_values import ModelState, Timeline
from airflow_mlops.steps.challengers import ChallengersResult
from airflow_mlops.steps.drift import DriftResult
from airflow_mlops.steps.performance import PerformanceResult
from tests.unit.test_ledger import START, entry, move, url, window

__all__ = ["url"]


def grade(index: int, *, key: str | None = None, at: datetime | None = None, **other: Any) -> LedgerEntry:
    result = PerformanceResult(
        **{
            "model_name": "m",
            "window": window(index),
            "model_version": "1",
            "model_versions": ("1",),
            "metric": "mae",
            "value": 2.0,
            "reference_value": 1.5,
            "relative_change": 1 / 3,
            "labelled_share": 1.0,
            "row_count": 400,
            "measured": True,
            "awaits_labels": False,
            "final": True,
            "degraded": False,
            "reason": "as promised",
            "report": {},
            "loss_mean": 2.0,
            "loss_deviation": 1.0,
            "effective_rows": 100.0,
        }
        | other
    )
    checked = entry(EntryKind.PERFORMANCE_CHECK, key or f"m|{window(index).key}", index=index)
    return replace(checked, payload=to_dict(result), recorded_at=at or window(index).end)


def drift(index: int, *, drifted: bool = True) -> LedgerEntry:
    features = [
        {
            "feature": name,
            "drifted": drifted and share > 0.2,
            "share_of_shift": share,
            "sentence": f"{name} moved",
        }
        for name, share in [("distance", 0.7), ("hour", 0.2), *((f"x{place}", 0.01) for place in range(8))]
    ]
    result = DriftResult(
        model_name="m",
        window=window(index),
        row_count=400,
        drifted=drifted,
        drifted_count=int(drifted),
        feature_count=10,
        headline="1 of 10 inputs drifted",
        features=tuple(features),
        report_url=None,
        prediction={"drifted": False},
    )
    checked = entry(EntryKind.DRIFT_CHECK, f"m|{window(index).key}", index=index)
    return replace(checked, payload=to_dict(result), recorded_at=window(index).end)


def compared(index: int) -> LedgerEntry:
    contenders = (
        Contender(version="1", recipe=None, trained_until=START, loss=2.0),
        Contender(version="5", recipe="recent", trained_until=START, loss=1.5),
    )
    check = ChallengerCheck(
        window=window(index), row_count=400, champion="1", simple_loss=4.0, contenders=contenders, gaps=()
    )
    result = ChallengersResult(
        model_name="m", window=window(index), metric="mae", check=check, reason="side by side"
    )
    written = entry(EntryKind.CHALLENGER_CHECK, f"m|{window(index).key}", index=index)
    return replace(written, payload=to_dict(result), recorded_at=window(index).end)


def decided(index: int, outcome: Outcome = Outcome.NOTHING) -> LedgerEntry:
    training = recipe_rows("all", window(index), START) if outcome is Outcome.RETRAIN else None
    made = RetrainingDecision(window=window(index), outcome=outcome, reason="because", training=training)
    written = entry(EntryKind.RETRAINING_DECISION, f"m|{window(index).key}", index=index)
    return replace(written, payload=to_dict(made), recorded_at=window(index).end)


def event(kind: EntryKind, key: str, at: datetime, **payload: Any) -> LedgerEntry:
    return replace(entry(kind, key, **payload), recorded_at=at)


@contextmanager
def counted(ledger: Ledger) -> Iterator[list[str]]:
    """Collect the queries, as the database gets them."""
    seen: list[str] = []

    def note(connection: Any, cursor: Any, statement: str, *rest: Any) -> None:
        if not statement.startswith("BEGIN"):
            seen.append(statement)

    sa.event.listen(ledger._engine, "before_cursor_execute", note)
    yield seen
    sa.event.remove(ledger._engine, "before_cursor_execute", note)


def lived(ledger: Ledger) -> None:
    """Three windows: fine; late labels, moved inputs and a retraining that was promoted; not graded yet."""
    move(ledger, "1", None)
    ledger.record_all([grade(0), drift(0, drifted=False), decided(0)])
    late = grade(
        1, key="first look", measured=False, awaits_labels=True, final=False, value=None, labelled_share=0.1
    )
    guessed = {"estimated_value": 3.0, "estimate_interval": (2.5, 3.5), "estimate_trusted": True}
    late = replace(late, payload=late.payload | guessed | {"estimator": {"reason": "9 of 10 held"}})
    ledger.record_all([late, drift(1), compared(1), grade(1, degraded=True, value=3.0, loss_mean=3.0)])
    retrain = ledger.record(decided(1, Outcome.RETRAIN)).entry
    promotion = event(
        EntryKind.PROMOTION, "m|champion|1|2", window(2).start, alias="champion", model_version="2"
    )
    ledger.move_alias(
        model_name="m",
        alias="champion",
        model_version="2",
        expected_version="1",
        entry=replace(
            promotion, payload=promotion.payload | {"decision_key": retrain.key, "previous_version": "1"}
        ),
    )
    ledger.record(event(EntryKind.DEPLOYMENT, "d", window(2).start + timedelta(hours=1), model_version="2"))
    ledger.record(
        event(EntryKind.RETRAINING_OUTCOME, retrain.key, window(2).start, outcome="promoted", reason="better")
    )
    ledger.record(drift(2, drifted=False))


def test_answers_that_could_not_be_compared_are_not_called_steady(url: str) -> None:
    compared, unmeasured, nothing = drift(0), drift(1), drift(2)
    unmeasured.payload["prediction"] = {"measured": False, "drifted": False, "sentence": "too few rows"}
    nothing.payload["prediction"] = None
    with Ledger.open(url) as ledger:
        ledger.record_all([compared, unmeasured, nothing])
        windows = read_timeline(ledger, "m").windows
    assert [item.drift.prediction_drifted for item in windows if item.drift] == [False, None, None]


def test_a_window_tells_all_that_is_known(url: str) -> None:
    with Ledger.open(url) as ledger:
        lived(ledger)
        told = read_timeline(ledger, "m")
        standing = {grade.window: grade.entry.payload["value"] for grade in ledger.grades("m")}
    assert [item.window for item in told.windows] == [window(0), window(1), window(2)]
    first, second, third = told.windows
    assert first.realized is not None
    assert first.realized.interval == pytest.approx((2.0 - 0.196, 2.0 + 0.196), abs=1e-4)
    assert (first.drift is not None, first.estimated, first.challengers) == (True, None, ())
    assert first.decision is not None
    assert (first.decision.outcome, first.decision.result) == ("nothing", None)
    assert second.realized is not None
    assert (second.realized.value, second.realized.degraded, second.realized.grades) == (3.0, True, 2)
    assert second.realized.value == standing[window(1)]
    assert second.drift is not None
    assert [(item.column, item.share_of_shift) for item in second.drift.columns[:2]] == [
        ("distance", 0.7),
        ("hour", 0.2),
    ]
    assert len(second.drift.columns) == 5
    assert [(one.model_version, one.champion) for one in second.challengers] == [("5", False), ("1", True)]
    assert second.decision is not None
    assert (second.decision.result, second.decision.promoted_version) == ("promoted", "2")
    assert (second.decision.training_start, second.decision.training_end) == (START, window(1).end)
    assert (third.champion, third.realized, third.decision) == ("2", None, None)
    assert [(item.kind, item.model_version) for item in told.events] == [
        (EntryKind.PROMOTION, "1"),
        (EntryKind.PROMOTION, "2"),
        (EntryKind.DEPLOYMENT, "2"),
    ]


def test_the_grade_that_stands_is_the_one_the_loop_acts_on(url: str) -> None:
    """Whatever the order in which grades came: the newest that measured, else the newest."""
    short = {"measured": False, "awaits_labels": True, "final": False}
    with Ledger.open(url) as ledger:
        ledger.record_all(
            [grade(0, key="a", value=1.0), grade(0, key="b", value=2.0), grade(0, key="c", **short)]
        )
        ledger.record_all([grade(1, key="d", value=4.0, **short), grade(1, key="e", value=5.0, **short)])
        stand = [item.entry.payload["value"] for item in ledger.grades("m")]
        told = read_timeline(ledger, "m").windows
    assert [item.realized.value for item in told if item.realized] == stand == [2.0, 5.0]


def test_an_estimate_is_told_beside_the_grade(url: str) -> None:
    guessed = {
        "estimated": True,
        "estimated_value": 3.0,
        "estimate_interval": (2.5, 3.5),
        "estimate_trusted": True,
    }
    with Ledger.open(url) as ledger:
        ledger.record(grade(0, measured=False, value=None, estimator={"reason": "9 of 10 held"}, **guessed))
        (told,) = read_timeline(ledger, "m").windows
    assert told.estimated is not None
    assert (told.estimated.value, told.estimated.interval) == (3.0, (2.5, 3.5))
    assert (told.estimated.trusted, told.estimated.why) == (True, "9 of 10 held")


@pytest.mark.parametrize(
    ("metric", "value", "mean", "expected"),
    [
        ("rmse", 2.0, 4.0, (1.9504, 2.0484)),  # roots of 4 -+ 0.196
        ("accuracy", 0.9, 0.1, (0.9 - 0.196, 0.9 + 0.196)),
        ("shop.metrics:lost_money", 7.0, 7.0, (7.0 - 0.196, 7.0 + 0.196)),  # not imported for this
        ("roc_auc", 0.9, None, None),
    ],
)
def test_intervals_are_in_units_of_the_metric(
    url: str, metric: str, value: float, mean: float | None, expected: tuple[float, float] | None
) -> None:
    with Ledger.open(url) as ledger:
        ledger.record(grade(0, metric=metric, value=value, loss_mean=mean))
        (told,) = read_timeline(ledger, "m").windows
    assert told.realized is not None
    assert told.realized.interval == (pytest.approx(expected, abs=1e-3) if expected else None)


def test_json_and_back(url: str) -> None:
    with Ledger.open(url) as ledger:
        lived(ledger)
        told = read_timeline(ledger, "m")
    assert from_dict(Timeline, json.loads(json.dumps(to_dict(told)))) == told


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 20])
def test_pages_put_together_are_the_whole(url: str, limit: int) -> None:
    with Ledger.open(url) as ledger:
        lived(ledger)
        ledger.record_all([grade(index) for index in range(3, 9)])
        ledger.record(event(EntryKind.DEPLOYMENT, "early", START - timedelta(days=9), model_version="0"))
        ledger.record(event(EntryKind.DEPLOYMENT, "late", START + timedelta(days=900), model_version="9"))
        whole = read_timeline(ledger, "m")
        pages = [read_timeline(ledger, "m", limit=limit)]
        while pages[0].older is not None:
            pages.insert(0, read_timeline(ledger, "m", limit=limit, before=pages[0].older))
    assert whole.older is None
    assert [item for page in pages for item in page.windows] == list(whole.windows)
    assert sorted(item.at for page in pages for item in page.events) == sorted(
        item.at for item in whole.events
    )
    assert {len(page.windows) for page in pages[1:]} <= {limit}


def test_a_range_is_half_open(url: str) -> None:
    with Ledger.open(url) as ledger:
        ledger.record_all([grade(index) for index in range(5)])
        told = read_timeline(ledger, "m", since=window(1).start, until=window(3).start)
        assert [item.window for item in told.windows] == [window(1), window(2)]
        assert read_timeline(ledger, "m", since=window(9).start).windows == ()
        assert read_timeline(ledger, "other").windows == ()
        with pytest.raises(ValueError, match="limit=0"):
            read_timeline(ledger, "m", limit=0)


def test_as_many_queries_however_long_the_range(url: str) -> None:
    with Ledger.open(url) as ledger:
        lived(ledger)
        with counted(ledger) as few:
            read_timeline(ledger, "m")
            read_overview(ledger)
        ledger.record_all(
            [made(index) for index in range(3, 300) for made in (grade, drift, compared, decided)]
        )
        with counted(ledger) as many:
            assert len(read_timeline(ledger, "m").windows) == 300
            read_overview(ledger)
    assert len(few) == len(many) == 5 + 6


def rows(made: list[LedgerEntry]) -> list[dict[str, Any]]:
    """As the table takes them: thousands at once are written faster than one by one."""
    return [
        {
            "kind": str(one.kind),
            "key": one.key,
            "model_name": one.model_name,
            "window_start": one.window and one.window.start,
            "window_end": one.window and one.window.end,
            "summary": one.summary,
            "payload": one.payload,
            "actor": one.actor,
            "recorded_at": one.recorded_at,
        }
        for one in made
    ]


def test_ten_thousand_windows_are_read_in_seconds(url: str) -> None:
    """It takes 2 seconds on two cores; the bound is for a loaded machine."""
    made = [one(index) for index in range(10_000) for one in (grade, drift, compared, decided)]
    with Ledger.open(url) as ledger:
        with ledger._engine.begin() as connection:
            connection.execute(entries.insert(), rows(made))
        began = time.perf_counter()
        told = read_timeline(ledger, "m", limit=10_000)
        seconds = time.perf_counter() - began
    assert len(told.windows) == 10_000
    assert told.older is None
    assert all(item.realized and item.drift and item.challengers and item.decision for item in told.windows)
    assert seconds < 20


def test_the_overview_says_how_each_model_stands(url: str) -> None:
    with Ledger.open(url) as ledger:
        lived(ledger)
        for name, told_of in {
            "sick": [grade(3, degraded=True)],
            "moved": [grade(3), drift(3)],
            "unknown": [grade(3, measured=False)],
            "well": [grade(3), drift(3, drifted=False)],
            "waiting": [grade(3), decided(3, Outcome.RETRAIN)],
        }.items():
            ledger.record_all([replace(one, key=f"{name}|{one.key}", model_name=name) for one in told_of])
            promotion = event(EntryKind.PROMOTION, name, START, alias="champion", model_version="1")
            ledger.move_alias(
                model_name=name,
                alias="champion",
                model_version="1",
                expected_version=None,
                entry=replace(promotion, model_name=name),
            )
        ledger.record(replace(grade(0), key="new", model_name="new"))
        told = {item.model_name: item for item in read_overview(ledger)}
    assert {name: item.state for name, item in told.items()} == {
        "m": ModelState.UNMEASURED,
        "sick": ModelState.DEGRADED,
        "moved": ModelState.DRIFTED,
        "unknown": ModelState.UNMEASURED,
        "well": ModelState.HEALTHY,
        "waiting": ModelState.RETRAINING,
        "new": ModelState.NO_CHAMPION,
    }
    assert told["m"].champion == "2"
    assert told["m"].champion_since == window(2).start
    assert told["m"].last is not None
    assert (told["m"].last.window, told["m"].last.champion) == (window(2), "2")
    assert told["m"].open_retraining is None
    opened = told["waiting"].open_retraining
    assert opened is not None
    assert (opened.window, opened.promoted_version) == (window(3), None)


def test_a_promotion_that_does_not_serve_yet_is_told(url: str) -> None:
    with Ledger.open(url) as ledger:
        key = ledger.record(decided(0, Outcome.RETRAIN)).entry.key
        promotion = event(
            EntryKind.PROMOTION, "p", START, alias="champion", model_version="2", decision_key=key
        )
        ledger.move_alias(
            model_name="m", alias="champion", model_version="2", expected_version=None, entry=promotion
        )
        (told,) = read_overview(ledger)
        assert told.state is ModelState.DEPLOYING
        assert told.open_retraining is not None
        assert told.open_retraining.promoted_version == "2"


def test_the_command_prints_a_table(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    with Ledger.open(url) as ledger:
        lived(ledger)
    assert main(["timeline", "m", "--ledger", url]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == [
        "window",
        "champion",
        "metric",
        "promised",
        "grade",
        "estimated",
        "inputs",
        "decision",
    ]
    assert "mae 3 (2.804 to 3.196)" in lines[2]
    assert "degraded" in lines[2]
    assert "drifted, 1 of 10: distance 70%" in lines[2]
    assert lines[2].endswith("retrain: promoted version 2")
    assert main(["timeline", "m", "--ledger", url, "--limit", "1"]) == 0
    assert "There are older windows: --until 2024-01-03T00:00:00" in capsys.readouterr().out
    assert main(["timeline", "m", "--ledger", url, "--json", "--since", "2024-01-02"]) == 0
    assert len(json.loads(capsys.readouterr().out)["windows"]) == 2
    assert main(["timeline", "--ledger", url]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[:2] == ["m", "2"]
    assert main(["timeline", "--ledger", url, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["state"] == "unmeasured"
    assert main(["timeline", "nobody", "--ledger", url]) == 0
    assert "knows nothing of nobody" in capsys.readouterr().out


@pytest.mark.parametrize(
    "command", [["timeline"], ["timeline", "m"], ["what-if", "m"], ["who-was-champion", "m"], ["score", "m"]]
)
def test_who_asks_a_ledger_that_is_not_there_is_told_and_makes_none(
    tmp_path: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "typo" / "ledger.db"
    assert main([*command, "--ledger", f"sqlite:///{path}"]) == 1
    assert f"there is no ledger at {path}: check the URL" in capsys.readouterr().err
    assert main(["ledger", f"sqlite:///{path}"]) == 1
    assert not path.parent.exists()
