"""The verdict on a model that has learned from all rows: what its predecessors earned, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from airflow_mlops.core.codec import to_dict
from airflow_mlops.core.comparison.promotion import Check, Outcome, Verdict
from airflow_mlops.core.decision.challengers import ChallengerCheck, Contender
from airflow_mlops.core.windows import Window
from airflow_mlops.ledger import EntryKind, Ledger, LedgerEntry, wanted_challengers
from airflow_mlops.services import Services
from airflow_mlops.serving.package import read_package
from airflow_mlops.steps.registry.predecessors import EarnedPromotion, find_earned, judge_earned
from tests.packages import build_package

if TYPE_CHECKING:
    from airflow_mlops.core.model.package import PackageManifest

START = datetime(2024, 1, 1, tzinfo=UTC)
END = START + timedelta(days=31)
WINDOW = Window(start=START, end=END)
EARNED = EarnedPromotion(
    window=WINDOW,
    recipe="recent",
    champion_version="7",
    predecessor="6",
    since=None,
    until=END,
    tested=True,
    reason="they beat version 7",
)
RUNS = Check(name="artifact", outcome=Outcome.PASS, reason="it answers")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> PackageManifest:
    folder = tmp_path_factory.mktemp("package") / "package"
    digest = build_package(folder)
    made = read_package(folder, expected_digest=digest)
    trained = replace(
        made.trained_on,
        time_column="at",
        window_start=START,
        window_end=END,
        recipe=EARNED.recipe,
        method_digest="sha256:1",
    )
    return replace(made, trained_on=trained)


class TestVerdict:
    def test_as_decided(self, manifest: PackageManifest) -> None:
        decision = judge_earned(EARNED, manifest, manifest, "7", RUNS)
        assert (decision.verdict, decision.reason) == (Verdict.PROMOTE, "they beat version 7")
        assert [check.name for check in decision.checks] == ["predecessors", "artifact"]

    def test_another_champion_by_now(self, manifest: PackageManifest) -> None:
        decision = judge_earned(EARNED, manifest, manifest, "8", RUNS)
        assert decision.verdict is Verdict.REJECT
        assert "beat version 7, and version 8 is champion by now" in decision.reason

    def test_made_in_another_way(self, manifest: PackageManifest) -> None:
        decision = judge_earned(EARNED._replace(recipe="all"), manifest, manifest, "7", RUNS)
        assert decision.verdict is Verdict.REJECT
        assert "models of recipe 'all' earned the promotion, and this one is of 'recent'" in decision.reason

    def test_of_rows_nobody_decided_on(self, manifest: PackageManifest) -> None:
        decision = judge_earned(EARNED._replace(until=END - timedelta(days=1)), manifest, manifest, "7", RUNS)
        assert decision.verdict is Verdict.REJECT
        assert "has learned from later ones" in decision.reason

    @pytest.mark.parametrize(
        ("outcome", "verdict"),
        [(Outcome.FAIL, Verdict.REJECT), (Outcome.NOT_MEASURED, Verdict.NO_VERDICT)],
    )
    def test_a_package_that_does_not_answer_is_not_promoted(
        self, manifest: PackageManifest, outcome: Outcome, verdict: Verdict
    ) -> None:
        broken = replace(RUNS, outcome=outcome, reason="it does not answer")
        decision = judge_earned(EARNED, manifest, manifest, "7", broken)
        assert (decision.verdict, decision.reason) == (verdict, "it does not answer")

    def test_a_policy_that_wants_no_test_gets_none(self, manifest: PackageManifest) -> None:
        untested = EARNED._replace(tested=False, recipe=None, champion_version=None)
        assert judge_earned(untested, manifest, None, "8", RUNS).verdict is Verdict.PROMOTE

    def test_it_has_to_be_of_all_the_rows_that_were_decided(self, manifest: PackageManifest) -> None:
        newer = EARNED._replace(until=END + timedelta(days=31))
        decision = judge_earned(newer, manifest, manifest, "7", RUNS)
        assert decision.verdict is Verdict.REJECT
        assert "learned from those until 2024-02-01 00:00 only" in decision.reason
        later = EARNED._replace(since=START + timedelta(days=3))
        decision = judge_earned(later, manifest, manifest, "7", RUNS)
        assert decision.verdict is Verdict.REJECT
        assert "it was decided on rows from 2024-01-04" in decision.reason

    @pytest.mark.parametrize("method", ["sha256:2", None])
    def test_a_name_alone_makes_no_predecessor(self, manifest: PackageManifest, method: str | None) -> None:
        other = replace(manifest, trained_on=replace(manifest.trained_on, method_digest=method))
        for new, old in [(manifest, other), (other, manifest), (other, replace(other))][
            : 3 if method is None else 2
        ]:
            decision = judge_earned(EARNED, new, old, "7", RUNS)
            assert decision.verdict is Verdict.REJECT
            assert "version 6 of recipe 'recent' earned the promotion" in decision.reason

    def test_a_predecessor_that_is_gone_says_nothing(self, manifest: PackageManifest) -> None:
        decision = judge_earned(EARNED, manifest, None, "7", RUNS)
        assert decision.verdict is Verdict.NO_VERDICT
        assert "no model of recipe 'recent' that was compared" in decision.reason

    def test_a_decision_is_carried_out_once(self, manifest: PackageManifest) -> None:
        decision = judge_earned(EARNED._replace(closed="version 8 serves"), manifest, manifest, "7", RUNS)
        assert decision.verdict is Verdict.REJECT
        assert "carried out already: version 8 serves" in decision.reason


def record(
    ledger: Ledger,
    kind: EntryKind,
    key: str,
    *,
    window: Window | None = WINDOW,
    model_name: str = "fares",
    **payload,
) -> None:
    ledger.record(
        LedgerEntry(
            kind=kind,
            key=key,
            model_name=model_name,
            window=window,
            subject=None,
            summary=key,
            payload=payload,
            actor="test",
            recorded_at=END,
        )
    )


@pytest.fixture
def services(tmp_path: Path) -> Services:
    services = Services(ledger_url=f"sqlite:///{tmp_path}/ledger.db")
    with Ledger.open(str(services.ledger_url)) as ledger:
        common = {"outcome": "retrain", "recipe": "recent", "champion_version": "7", "reason": "long"}
        training = {"start": None, "end": END.isoformat()}
        decided = {**common, "training": training, "grounds": "they beat version 7"}
        record(ledger, EntryKind.RETRAINING_DECISION, "earned", promote_on="predecessors", **decided)
        record(ledger, EntryKind.RETRAINING_DECISION, "to test", promote_on="held_out", **decided)
        idle = {"outcome": "nothing", "promote_on": "held_out"}
        record(ledger, EntryKind.RETRAINING_DECISION, "idle", **idle)
        contenders = [
            Contender(
                version=str(number),
                recipe="recent",
                trained_until=START - timedelta(days=7 - number),
                loss=1.0,
            )
            for number in (5, 6)
        ]
        check = ChallengerCheck(
            window=WINDOW, row_count=100, champion="7", simple_loss=2.0, contenders=tuple(contenders), gaps=()
        )
        record(ledger, EntryKind.CHALLENGER_CHECK, "checked", check=to_dict(check))
    return services


def ask(services: Services, key: str | None, *, run_id: str = "r") -> EarnedPromotion | None:
    return find_earned(services, "fares", key, run_id=run_id)


class TestDecision:
    def test_it_is_read_from_the_ledger(self, services: Services) -> None:
        assert ask(services, "earned") == EARNED

    def test_a_model_that_is_to_be_tested_is(self, services: Services) -> None:
        assert ask(services, "to test") is None
        assert ask(services, None) is None

    def test_another_models_decision_earns_nothing(self, services: Services) -> None:
        with pytest.raises(ValueError, match="earned"):
            find_earned(services, "tips", "earned", run_id="r")

    def test_one_that_wants_no_model_earns_nothing(self, services: Services) -> None:
        with pytest.raises(ValueError, match="decision 'idle' was 'nothing': it asks for no model of fares"):
            ask(services, "idle")

    def test_what_became_of_it_is_known(self, services: Services) -> None:
        with Ledger.open(str(services.ledger_url)) as ledger:
            record(
                ledger, EntryKind.RETRAINING_OUTCOME, "earned", outcome="reject", reason="slow", run_id="r"
            )
        assert ask(services, "earned") == EARNED  # the same run may ask again
        assert ask(services, "earned", run_id="other") == EARNED._replace(closed="earned")


class TestWanted:
    @pytest.fixture
    def ledger(self, tmp_path: Path):
        with Ledger.open(f"sqlite:///{tmp_path}/wanted.db") as ledger:
            yield ledger

    def decide(self, ledger: Ledger, window: Window, *recipes: str) -> None:
        record(
            ledger,
            EntryKind.RETRAINING_DECISION,
            f"fares|{window.key}",
            window=window,
            outcome="nothing",
            shadow=list(recipes),
        )

    def test_what_the_newest_decided_window_asks_for(self, ledger: Ledger) -> None:
        assert wanted_challengers(ledger, "fares") == []
        later = Window(start=END, end=END + timedelta(days=30))
        self.decide(ledger, later, "recent", "all")
        self.decide(ledger, WINDOW, "all")  # late
        wanted = wanted_challengers(ledger, "fares")
        assert [item["recipe"] for item in wanted] == ["recent", "all"]
        assert [item["half_life_days"] for item in wanted] == [30.0, None]
        assert {item["window"]["end"] for item in wanted} == {later.end.isoformat().replace("+00:00", "Z")}

    def test_what_was_trained_and_registered_is_not_trained_again(self, ledger: Ledger) -> None:
        self.decide(ledger, WINDOW, "recent", "all")
        older = Window(start=START, end=END - timedelta(days=1))
        record(ledger, EntryKind.TRAINING, "old", window=older, recipe="all", run_id="old")
        record(ledger, EntryKind.TRAINING, "by hand", recipe=None, run_id="by hand")
        record(ledger, EntryKind.TRAINING, "promoted", recipe="recent", run_id="promoted")
        record(ledger, EntryKind.TRAINING, "lost its test", recipe="all", run_id="lost")
        for run in ("old", "by hand", "promoted"):
            record(ledger, EntryKind.REGISTRATION, f"version of {run}", window=None, run_id=run)
        assert [item["recipe"] for item in wanted_challengers(ledger, "fares")] == ["all"]
