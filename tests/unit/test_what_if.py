"""Decisions taken again: with the same policy the same, with another one as that would have."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from airflow_mlops.cli import main
from airflow_mlops.core.codec import from_dict
from airflow_mlops.core.decision.retraining import (
    Outcome,
    RetrainingDecision,
    RetrainingPolicy,
    TrainingChoice,
)
from airflow_mlops.exceptions import InsufficientDataError
from airflow_mlops.ledger import ACTING, EntryKind, Ledger, LedgerEntry
from airflow_mlops.replay.what_if import policy_of, what_if, what_if_text
from airflow_mlops.services import Services
from airflow_mlops.steps.base import run_step
from tests.histories import History, random_policy, window

if TYPE_CHECKING:
    from airflow_mlops.core.decision.evidence import RetrainingHistory, WindowEvidence


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/ledger.db"


def test_the_same_policy_would_have_decided_the_same(url: str) -> None:
    chance, compared = random.Random(5), 0
    with Ledger.open(url) as ledger:
        for number in range(60):
            history = History(ledger, url, f"model-{number}", chance, random_policy(chance))
            history.live()
            if history.fates["killed"]:  # a retraining nobody carried out is taken to have given a champion
                continue
            found = what_if(ledger, history.model, from_dict(RetrainingPolicy, history.policy))
            assert [item for item in found.windows if item.differs] == []
            assert len(found.windows) == len(history.decisions())
            compared += len(found.windows)
    assert compared > 60


class TestAnotherPolicy:
    @pytest.fixture
    def ledger(self, url: str):
        chance = random.Random(11)
        with Ledger.open(url) as ledger:
            for number in range(20):
                history = History(ledger, url, f"model-{number}", chance, {"patience_days": 0})
                history.live()
            yield ledger

    def retrainings(self, ledger: Ledger, *settings: str) -> tuple[int, int]:
        policy = policy_of(["patience_days=0", *settings])
        counts = [what_if(ledger, f"model-{number}", policy).count(Outcome.RETRAIN) for number in range(20)]
        return sum(was for was, _ in counts), sum(would_be for _, would_be in counts)

    def test_a_stricter_one_retrains_less_and_a_looser_one_more(self, ledger: Ledger) -> None:
        was, less = self.retrainings(ledger, "cool_down_days=1000")
        _, more = self.retrainings(ledger, "retrain_on_drift=true", "rejections_before_pause=100")
        assert 0 < less < was < more

    def test_nothing_is_written(self, ledger: Ledger) -> None:
        before = ledger.entries(limit=10_000)
        self.retrainings(ledger, "budget=1")
        assert ledger.entries(limit=10_000) == before

    def test_it_says_what_would_differ_and_why(self, ledger: Ledger) -> None:
        policy = policy_of(["patience_days=0", "cool_down_days=1000"])
        found = [what_if(ledger, f"model-{number}", policy) for number in range(20)]
        text = what_if_text(max(found, key=lambda item: sum(one.differs for one in item.windows)))
        assert "retrain -> alert" in text
        assert "it is cooling down for 1000 days" in text
        assert "windows would have been decided otherwise;" in text.splitlines()[-1]

    def test_on_the_command_line(self, ledger: Ledger, url: str, capsys: pytest.CaptureFixture[str]) -> None:
        command = ["what-if", "model-0", "--ledger", url, "--set", "patience_days=0"]
        assert main(command) == 0
        assert capsys.readouterr().out.startswith("0 of ")
        assert main([*command, "--json"]) == 0
        shown = json.loads(capsys.readouterr().out)
        assert {item["was"] for item in shown["windows"]} == {item["would_be"] for item in shown["windows"]}
        assert main([*command, "--set", "buget=1"]) == 1
        assert "the policy has no buget; it has" in capsys.readouterr().err
        assert main(["what-if", "nobody", "--ledger", url]) == 1
        assert "no window of 'nobody' has been decided yet" in capsys.readouterr().err


def takes_back(
    evidence: Sequence[WindowEvidence], history: RetrainingHistory, *_: Any, **__: Any
) -> list[RetrainingDecision]:
    """See a change in the first window, take it back in the second, and say in the third how it stands."""
    (item,) = evidence
    training = TrainingChoice(start=item.window.start, end=item.window.end, half_life_days=None, why="")
    if item.window == window(0):
        training = replace(training, change=item.window.start)
    elif item.window == window(1):
        back = RetrainingDecision(
            window=item.window,
            outcome=Outcome.BRING_BACK,
            reason="",
            version="1",
            champion_version="2",
            undoes_since=window(0).start,
        )
        return [back]
    else:
        outcome = Outcome.NOTHING if history.world_since is None else Outcome.ALERT
        return [RetrainingDecision(window=item.window, outcome=outcome, reason="")]
    return [RetrainingDecision(window=item.window, outcome=Outcome.RETRAIN, reason="", training=training)]


def test_a_change_that_was_taken_back_is_taken_back_here_too(url: str) -> None:
    path = f"{__name__}:takes_back"
    with Ledger.open(url) as ledger:
        for index in range(3):
            about: dict[str, Any] = {"model_name": "m", "subject": None, "summary": "", "actor": "test"}
            at = window(index).end
            check = LedgerEntry(
                kind=EntryKind.PERFORMANCE_CHECK,
                key=str(index),
                window=window(index),
                payload={"measured": True, "row_count": 9},
                recorded_at=at,
                **about,
            )
            ledger.record(check)
            spec = {"model_name": "m", "actor": "a", "now": at.isoformat(), "decide": path}
            told = run_step(
                "retraining", spec | {"required_checks": ["performance_check"]}, Services(ledger_url=url)
            )
            if told["decisions"][0]["outcome"] in ACTING:
                key = f"m|{window(index).key}"
                payload = {"alias": "champion", "model_version": "1", "decision_key": key}
                promotion = LedgerEntry(
                    kind=EntryKind.PROMOTION,
                    key=str(index),
                    window=None,
                    payload=payload,
                    recorded_at=at,
                    **about,
                )
                ledger.record(promotion)
                outcome = replace(
                    promotion,
                    kind=EntryKind.RETRAINING_OUTCOME,
                    key=key,
                    payload={"outcome": "promoted"},
                )
                ledger.record(outcome)
        found = what_if(ledger, "m", RetrainingPolicy(), decide=path)
    assert [item.was for item in found.windows] == ["retrain", "bring_back", "nothing"]
    assert [item for item in found.windows if item.differs] == []


def test_a_model_nobody_decided_on(url: str) -> None:
    with (
        Ledger.open(url) as ledger,
        pytest.raises(InsufficientDataError, match="nothing to decide otherwise"),
    ):
        what_if(ledger, "nobody", RetrainingPolicy())


@pytest.mark.parametrize(
    ("setting", "why"),
    [
        ("budget", "sets nothing"),
        ("budget=none", "budget"),
        ("challengers.memry=1", "has no challengers.memry"),
        ("challengers=1 challengers.memory=0.5", "reaches into 'challengers', which was set to 1 before"),
        ("patience_days=1e9", "patience_days is 1e"),
    ],
)
def test_settings_that_make_no_sense(setting: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        policy_of(setting.split())
