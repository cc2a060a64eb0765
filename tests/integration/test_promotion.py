"""Promotion in real processes: of two that race one wins, and what a killed one left is completed by the next."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from airflow_mlops import cli
from airflow_mlops.core.windows import Window
from airflow_mlops.exceptions import ModelVersionNotFoundError, PromotionConflictError, PromotionRejectedError
from airflow_mlops.hooks.ledger import LedgerHook
from airflow_mlops.integrations.mlflow import Registry
from airflow_mlops.ledger import EntryKind, Ledger, LedgerEntry
from airflow_mlops.services import Services
from airflow_mlops.steps.base import run_step
from tests.integration.stalling_proxy import StallingProxy
from tests.integration.test_registration import Runs

pytestmark = pytest.mark.integration

NOW = "2026-03-01T12:00:00Z"


@pytest.fixture
def services(mlflow_server: str, tmp_path: Path) -> Services:
    return Services(tracking_uri=mlflow_server, ledger_url=f"sqlite:///{tmp_path / 'ledger.db'}")


@pytest.fixture(scope="module")
def trainings(mlflow_server: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    runs = Runs(mlflow_server, tmp_path_factory.mktemp("trainings"))
    return [runs.add(slope=slope) for slope in (2.0, 3.0, 4.0)]


@pytest.fixture
def model(services: Services, trainings: list[dict[str, Any]]) -> str:
    """A model with three versions, the first of which is champion."""
    name = f"promoted_{uuid.uuid4().hex}"
    for training in trainings:
        run_step("register", {"model_name": name, **training}, services)
    run_step("promote", promotion(name, "1", None), services)
    return name


def promotion(name: str, version: str, expected: str | None, **more: Any) -> dict[str, Any]:
    given = {"actor": f"dag/run/promote_{version}", "now": NOW, "reason": "better"}
    return {"model_name": name, "model_version": version, "expected_version": expected} | given | more


def start(step: str, spec: dict[str, Any], services: Services, folder: Path) -> subprocess.Popen[str]:
    file = folder / f"{time.monotonic_ns()}.json"
    file.write_text(json.dumps(spec))
    return subprocess.Popen(
        [sys.executable, "-m", "airflow_mlops.steps", step, "--spec", str(file)],
        env={**os.environ, **services.to_environment()},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def stalled(process: subprocess.Popen[str], proxy: StallingProxy) -> None:
    deadline = time.monotonic() + 60
    while not proxy.held.is_set():
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def aliases(services: Services, name: str) -> dict[str, str]:
    found = Registry.connect(services).aliases(name)
    return {alias: found[alias] for alias in ("champion", "previous") if alias in found}


def sets(alias: str) -> Callable[[str, str], bool]:
    """Choose the request that writes an alias."""
    return lambda method, text: (
        method == "POST" and "registered-models/alias" in text and f'"{alias}"' in text
    )


def test_of_two_processes_one_wins_and_the_other_says_who(
    services: Services, model: str, tmp_path: Path
) -> None:
    """Both have read what they need and are held before the ledger decides; then both go on at once."""
    asks = "model-versions/get"
    with (
        StallingProxy(str(services.tracking_uri), lambda _, text: asks in text).serving() as one,
        StallingProxy(str(services.tracking_uri), lambda _, text: asks in text).serving() as two,
    ):
        racing = {
            version: start(
                "promote",
                promotion(model, version, "1"),
                replace(services, tracking_uri=proxy.url),
                tmp_path,
            )
            for version, proxy in (("2", one), ("3", two))
        }
        for process, proxy in zip(racing.values(), (one, two), strict=True):
            stalled(process, proxy)
        one.release()
        two.release()
        ended = {version: process.communicate(timeout=60) for version, process in racing.items()}
    codes = {version: process.returncode for version, process in racing.items()}
    assert sorted(codes.values()) == [0, 1], ended
    winner, loser = sorted(codes, key=lambda version: codes[version])
    assert "PromotionConflictError" in ended[loser][1]
    assert (
        f"dag/run/promote_{winner} moved it to version {winner}; version {loser} was not" in ended[loser][1]
    )
    assert aliases(services, model) == {"champion": winner, "previous": "1"}


class TestKilled:
    @pytest.fixture(
        params=[("previous", False), ("champion", False), ("champion", True)],
        ids=["before_previous", "before_champion", "after_champion"],
    )
    def killed(self, request: pytest.FixtureRequest, services: Services, model: str, tmp_path: Path) -> str:
        """Version 2 was promoted, and the process was killed at one of its writes to MLflow."""
        alias, answered = request.param
        decided = promotion(model, "2", "1", decision_key="decision")
        with StallingProxy(str(services.tracking_uri), sets(alias), answered=answered).serving() as proxy:
            process = start("promote", decided, replace(services, tracking_uri=proxy.url), tmp_path)
            stalled(process, proxy)
            process.kill()
            process.communicate(timeout=30)
        assert process.returncode == -9
        with Ledger.open(str(services.ledger_url)) as ledger:
            assert ledger.aliases(model) == {"champion": "2"}
        if not answered:
            assert aliases(services, model)["champion"] == "1"
        return model

    def test_a_retry_completes_it(self, killed: str, services: Services) -> None:
        result = run_step("promote", promotion(killed, "2", "1", decision_key="decision"), services)
        assert not result["moved"]
        assert aliases(services, killed) == {"champion": "2", "previous": "1"}

    def test_another_promotion_completes_it_and_says_who_won(self, killed: str, services: Services) -> None:
        with pytest.raises(PromotionConflictError, match="promote_2 moved it to version 2"):
            run_step("promote", promotion(killed, "3", "1"), services)
        assert aliases(services, killed) == {"champion": "2", "previous": "1"}

    def test_a_rollback_goes_back_from_what_was_decided(self, killed: str, services: Services) -> None:
        back = run_step("roll-back", {"model_name": killed, "actor": "anna", "now": NOW}, services)
        assert (back["previous_version"], back["model_version"]) == ("2", "1")
        assert aliases(services, killed) == {"champion": "1"}


def test_killed_before_the_ledger_decided_nothing_happened(
    services: Services, model: str, tmp_path: Path
) -> None:
    asks = "model-versions/get"
    with StallingProxy(str(services.tracking_uri), lambda _, text: asks in text).serving() as proxy:
        process = start(
            "promote", promotion(model, "2", "1"), replace(services, tracking_uri=proxy.url), tmp_path
        )
        stalled(process, proxy)
        process.kill()
        process.communicate(timeout=30)
    assert aliases(services, model) == {"champion": "1"}
    assert run_step("promote", promotion(model, "3", "1"), services)["moved"]


def test_who_was_slow_does_not_write_what_is_no_longer_true(
    services: Services, model: str, tmp_path: Path
) -> None:
    """Held before it writes champion 2 to MLflow; meanwhile 3 is promoted after it."""
    with StallingProxy(str(services.tracking_uri), sets("champion")).serving() as proxy:
        slow = start(
            "promote", promotion(model, "2", "1"), replace(services, tracking_uri=proxy.url), tmp_path
        )
        stalled(slow, proxy)
        run_step("promote", promotion(model, "3", "2"), services)
        proxy.release()
        _, errors = slow.communicate(timeout=60)
    assert slow.returncode == 0, errors
    assert aliases(services, model) == {"champion": "3", "previous": "2"}


class TestEvaluated:
    """With an evaluation, it has to be a "promote" about this very package."""

    def test_of_another_run_or_with_another_verdict_it_is_refused(
        self, services: Services, model: str, trainings: list[dict[str, Any]]
    ) -> None:
        second, third = (training["run_id"] for training in trainings[1:])
        for evaluated, words in (
            ({"verdict": "promote", "evaluated_run_id": third}, f"its evaluation is about run {third}"),
            ({"verdict": "reject", "evaluated_run_id": second}, "concluded 'reject': better"),
            ({"verdict": "none", "evaluated_run_id": second}, "concluded 'none'"),
            ({"verdict": "promote"}, "does not say which run"),
            ({"package_digest": "sha256:other"}, "package sha256:other was registered, or approved"),
        ):
            with pytest.raises(PromotionRejectedError, match=words):
                run_step("promote", promotion(model, "2", "1", **evaluated), services)
        assert aliases(services, model) == {"champion": "1"}
        told = {"verdict": "promote", "evaluated_run_id": second}
        digest = trainings[1]["package_digest"]
        assert run_step("promote", promotion(model, "2", "1", package_digest=digest, **told), services)[
            "moved"
        ]

    def test_another_run_with_the_same_package_will_do(
        self, services: Services, model: str, trainings: list[dict[str, Any]]
    ) -> None:
        client = Registry.connect(services).client
        original = client.get_run(trainings[1]["run_id"])
        digest = trainings[1]["package_digest"]
        again = client.create_run(
            original.info.experiment_id, tags={"airflow_mlops.package_digest": digest}
        ).info.run_id
        told = {"verdict": "promote", "evaluated_run_id": again}
        assert run_step("promote", promotion(model, "2", "1", **told), services)["moved"]

    def test_by_hand_is_said(self, services: Services, model: str) -> None:
        spec = {
            "model_name": model,
            "model_version": "2",
            "expected_version": "1",
            "actor": "anna",
            "now": NOW,
        }
        run_step("promote", spec, services)
        with Ledger.open(str(services.ledger_url)) as ledger:
            entry = ledger.entries(model_name=model)[0]
        assert entry.summary.endswith("promoted by hand, without an evaluation")
        assert (entry.payload["verdict"], entry.payload["evaluated_run_id"]) == (None, None)


class TestComesBack:
    """Version 1 was champion, 2 is; it was decided that 1 comes back in place of 2."""

    def decide(self, services: Services, model: str, **payload: str) -> str:
        window = Window.parse("2026-01-01", "2026-02-01")
        entry = LedgerEntry(
            kind=EntryKind.RETRAINING_DECISION,
            key=f"{model}|{window.key}",
            model_name=model,
            window=window,
            subject=None,
            summary="",
            payload={"outcome": "bring_back", "version": "1", "champion_version": "2"} | payload,
            actor="test",
            recorded_at=window.end,
        )
        with Ledger.open(str(services.ledger_url)) as ledger:
            ledger.record(entry)
        return entry.key

    def come_back(self, services: Services, model: str, key: str | None) -> dict[str, Any]:
        spec = promotion(model, "1", "2", verdict="promote", decision_key=key)
        return run_step("promote", spec, services)

    @pytest.fixture(autouse=True)
    def second(self, services: Services, model: str) -> None:
        run_step("promote", promotion(model, "2", "1"), services)

    def test_as_was_decided(self, services: Services, model: str) -> None:
        key = self.decide(services, model)
        assert self.come_back(services, model, key)["moved"]
        assert not self.come_back(services, model, key)["moved"]  # a retry
        assert aliases(services, model) == {"champion": "1", "previous": "2"}
        with Ledger.open(str(services.ledger_url)) as ledger:
            assert ledger.former_champions(model) == ["2"]

    def test_one_that_was_deleted_is_not_waited_for(self, services: Services, model: str) -> None:
        key = self.decide(services, model)
        MlflowClient(str(services.tracking_uri)).delete_model_version(model, "1")
        with pytest.raises(ModelVersionNotFoundError):
            self.come_back(services, model, key)
        with Ledger.open(str(services.ledger_url)) as ledger:
            assert ledger.open_retraining(model) is None

    def test_not_once_the_decision_has_ended(self, services: Services, model: str) -> None:
        """Whoever wants it again, in a later task, has to decide again."""
        key = self.decide(services, model)
        assert self.come_back(services, model, key)["moved"]
        with Ledger.open(str(services.ledger_url)) as ledger:
            decision = ledger.find(EntryKind.RETRAINING_DECISION, key)
            assert decision is not None
            ledger.record(
                replace(decision, kind=EntryKind.RETRAINING_OUTCOME, payload={"outcome": "promoted"})
            )
        assert not self.come_back(services, model, key)["moved"]  # a retry
        run_step("promote", promotion(model, "2", "1", actor="anna"), services)
        again = promotion(model, "1", "2", verdict="promote", decision_key=key, actor="another task")
        with pytest.raises(PromotionRejectedError, match="no open decision"):
            run_step("promote", again, services)

    @pytest.mark.parametrize(
        "decided", [{"outcome": "retrain"}, {"version": "3"}, {"champion_version": "3"}, None]
    )
    def test_not_where_something_else_was(
        self, services: Services, model: str, decided: dict[str, str] | None
    ) -> None:
        key = self.decide(services, model, **decided) if decided is not None else None
        with pytest.raises(PromotionRejectedError, match="does not say which run"):
            self.come_back(services, model, key)
        assert aliases(services, model)["champion"] == "2"

    def test_what_a_person_took_back_is_not_looked_at_again(self, services: Services, model: str) -> None:
        run_step("roll-back", {"model_name": model, "actor": "anna", "now": NOW, "request": "anna"}, services)
        with Ledger.open(str(services.ledger_url)) as ledger:
            assert ledger.former_champions(model) == []


class TestTakenBack:
    """Version 2 was promoted over 1, and anna went back to 1."""

    @pytest.fixture
    def evaluated(self, trainings: list[dict[str, Any]]) -> dict[str, Any]:
        return {"verdict": "promote", "evaluated_run_id": trainings[1]["run_id"]}

    def back(self, services: Services, model: str, **more: Any) -> None:
        asked = {"model_name": model, "actor": "anna", "reason": "complaints", "now": NOW, "request": "back"}
        run_step("roll-back", asked | more, services)

    def test_the_same_promotion_again_is_refused(
        self, services: Services, model: str, evaluated: dict[str, Any]
    ) -> None:
        """Killed and tried again, or cleared; with an evaluation, or by hand."""
        for more in (evaluated, {}):
            assert run_step("promote", promotion(model, "2", "1", **more), services)["moved"]
            self.back(services, model, request=str(more))
            later = promotion(model, "2", "1", now="2026-03-02T00:00:00Z", **more)
            with pytest.raises((PromotionConflictError, PromotionRejectedError), match=r"anna .*complaints"):
                run_step("promote", later, services)
            assert aliases(services, model) == {"champion": "1"}

    def test_it_is_refused_also_when_no_rollback_but_a_promotion_undid_it(
        self, services: Services, model: str, evaluated: dict[str, Any]
    ) -> None:
        run_step("promote", promotion(model, "2", "1", **evaluated), services)
        run_step("promote", promotion(model, "1", "2", actor="anna"), services)
        with pytest.raises(PromotionConflictError, match="anna moved it on to version 1"):
            run_step("promote", promotion(model, "2", "1", **evaluated), services)
        assert aliases(services, model)["champion"] == "1"

    def test_an_evaluation_alone_does_not_bring_it_back(
        self, services: Services, model: str, evaluated: dict[str, Any]
    ) -> None:
        run_step("promote", promotion(model, "2", "1", **evaluated), services)
        self.back(services, model, now="2026-03-02T00:00:00Z")
        anew = promotion(model, "2", "1", actor="dag/next/promote", **evaluated)
        for before in (None, "2026-03-01T00:00:00Z"):
            with pytest.raises(PromotionRejectedError, match=r"anna took it back .*complaints"):
                run_step("promote", anew | {"approved_at": before}, services)
        after = {"approved_at": "2026-03-03T00:00:00Z"}
        with pytest.raises(PromotionRejectedError, match="was asked before that: clear the approval's task"):
            run_step(
                "promote", anew | after | {"asked_after": self.newest_move(services, model) - 1}, services
            )
        # Whatever the clock of the machine that asked said.
        told = {"asked_after": self.newest_move(services, model), "approved_at": "2026-03-01T00:00:00Z"}
        assert run_step("promote", anew | told, services)["moved"]
        assert aliases(services, model) == {"champion": "2", "previous": "1"}

    def newest_move(self, services: Services, model: str) -> int:
        with Ledger.open(str(services.ledger_url)) as ledger:
            return int(ledger.moves(model)[-1].entry_id or 0)

    def test_registered_anew_it_is_still_taken_back(
        self, services: Services, model: str, evaluated: dict[str, Any], trainings: list[dict[str, Any]]
    ) -> None:
        """Its number is another one, and its package the same."""
        run_step("promote", promotion(model, "2", "1", **evaluated), services)
        self.back(services, model)
        Registry.connect(services).client.delete_model_version(model, "2")
        anew = run_step("register", {"model_name": model, **trainings[1]}, services)["model_version"]
        assert anew == "4"
        words = r"version 4 .* package of version 2, was not promoted: anna took it back .*complaints"
        with pytest.raises(PromotionRejectedError, match=words):
            run_step("promote", promotion(model, anew, "1", **evaluated), services)
        assert aliases(services, model) == {"champion": "1"}

    def test_another_package_under_its_number_is_another_model(
        self, services: Services, model: str, trainings: list[dict[str, Any]], evaluated: dict[str, Any]
    ) -> None:
        run_step("promote", promotion(model, "2", "1", **evaluated), services)
        self.back(services, model)
        Registry.connect(services).client.delete_registered_model(model)
        for training in (trainings[0], trainings[2]):
            run_step("register", {"model_name": model, **training}, services)
        about = {"verdict": "promote", "evaluated_run_id": trainings[2]["run_id"]}
        assert run_step("promote", promotion(model, "2", "1", **about), services)["moved"]

    def test_a_rollback_just_before_the_ledger_decides_counts(
        self, services: Services, model: str, evaluated: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Two Dags promote one package: it was there when the second began, and is taken back before it writes."""
        run_step("promote", promotion(model, "2", "1", **evaluated), services)
        move, waiting = Ledger.move_alias, [self.back]

        def moved(ledger: Ledger, **asked: Any) -> Any:
            while waiting:
                waiting.pop()(services, model)
            return move(ledger, **asked)

        monkeypatch.setattr(Ledger, "move_alias", moved)
        with pytest.raises(PromotionRejectedError, match="anna took it back"):
            run_step("promote", promotion(model, "2", "1", actor="another Dag", **evaluated), services)
        assert aliases(services, model) == {"champion": "1"}

    def test_what_an_older_release_wrote_is_told_by_its_number(
        self, services: Services, model: str, evaluated: dict[str, Any]
    ) -> None:
        run_step("promote", promotion(model, "2", "1", **evaluated), services)
        older = {"alias": "champion", "model_version": "1", "previous_version": "2", "reason": "complaints"}
        with Ledger.open(str(services.ledger_url)) as ledger:
            entry = replace(ledger.moves(model)[-1], kind=EntryKind.ROLLBACK, payload=older, actor="anna")
            ledger.move_alias(
                model_name=model, alias="champion", model_version="1", expected_version="2", entry=entry
            )
        with pytest.raises(PromotionRejectedError, match="anna took it back"):
            run_step("promote", promotion(model, "2", "1", actor="dag/next/promote", **evaluated), services)

    def test_by_hand_it_comes_back_and_is_promoted_as_any_other(
        self, services: Services, model: str, evaluated: dict[str, Any]
    ) -> None:
        run_step("promote", promotion(model, "2", "1", **evaluated), services)
        self.back(services, model)
        run_step("promote", promotion(model, "2", "1", reason="it was the tariff"), services)
        run_step("promote", promotion(model, "3", "2"), services)
        anew = promotion(model, "2", "3", actor="dag/next/promote", **evaluated)
        assert run_step("promote", anew, services)["moved"]

    def test_the_same_rollback_again_is_refused(self, services: Services, model: str) -> None:
        run_step("promote", promotion(model, "2", "1"), services)
        self.back(services, model)
        self.back(services, model)  # a retry
        run_step("promote", promotion(model, "2", "1", actor="bob", reason="it was the tariff"), services)
        with pytest.raises(PromotionConflictError, match="bob moved it on to version 2"):
            self.back(services, model)
        assert aliases(services, model)["champion"] == "2"


class TestChampionDeletedInMlflow:
    """Version 1 is champion in the ledger, and MLflow has it no more."""

    @pytest.fixture
    def orphaned(self, services: Services, model: str) -> str:
        Registry.connect(services).client.delete_model_version(model, "1")
        return model

    def test_an_evaluation_takes_nothing_for_a_first_model(
        self, services: Services, orphaned: str, trainings: list[dict[str, Any]]
    ) -> None:
        dataset = {"uri": "gone", "version": 0, "dataset_digest": "sha256:0", "row_count": 1, "columns": {}}
        asked = {
            "dataset": dataset,
            "model_name": orphaned,
            "run_id": trainings[1]["run_id"],
            "window": {"start": NOW, "end": "2026-03-02T00:00:00Z"},
            "time_column": "t",
        }
        with pytest.raises(
            ModelVersionNotFoundError, match=r"champion of .* is version 1 in the ledger, and MLflow"
        ):
            run_step("evaluate", asked, services)

    def test_by_hand_another_one_takes_its_place(self, services: Services, orphaned: str) -> None:
        assert run_step("promote", promotion(orphaned, "2", "1"), services)["moved"]
        assert aliases(services, orphaned) == {"champion": "2"}

    def test_or_one_rolls_back_to_one_that_is_there(self, services: Services, orphaned: str) -> None:
        back = {"model_name": orphaned, "actor": "anna", "now": NOW, "model_version": "3"}
        run_step("roll-back", back, services)
        assert aliases(services, orphaned) == {"champion": "3"}


def test_an_alias_moved_by_hand_is_put_back(services: Services, model: str) -> None:
    registry = Registry.connect(services)
    registry.set_alias(model, "champion", "3")
    with pytest.raises(PromotionConflictError):
        run_step("promote", promotion(model, "2", "3"), services)
    assert aliases(services, model) == {"champion": "1"}


def test_a_first_champion_set_by_hand_is_not_replaced_by_what_never_met_it(
    services: Services, model: str, tmp_path: Path
) -> None:
    """As when somebody sets it in MLflow while a person is asked about a model that had nobody to beat."""
    knows_none = replace(services, ledger_url=f"sqlite:///{tmp_path / 'other.db'}")
    words = "to be no version, but somebody set it to version 1 in MLflow; version 2 was not promoted"
    with pytest.raises(PromotionConflictError, match=words):
        run_step("promote", promotion(model, "2", None), knows_none)
    assert aliases(services, model) == {"champion": "1"}
    assert run_step("promote", promotion(model, "2", "1"), knows_none)["moved"]


def test_a_champion_that_was_deleted_is_nothing_to_go_back_to(services: Services, model: str) -> None:
    run_step("promote", promotion(model, "2", "1"), services)
    Registry.connect(services).client.delete_model_version(model, "2")
    run_step("roll-back", {"model_name": model, "actor": "anna", "now": NOW}, services)
    assert aliases(services, model) == {"champion": "1"}


def test_a_version_deleted_from_mlflow_is_said_and_stops_nobody(
    services: Services, model: str, caplog: pytest.LogCaptureFixture
) -> None:
    run_step("promote", promotion(model, "2", "1"), services)
    Registry.connect(services).client.delete_model_version(model, "1")
    with caplog.at_level(logging.WARNING):
        assert run_step("promote", promotion(model, "3", "2"), services)["moved"]
    assert f"previous of {model} is version 1, which MLflow no longer has" in caplog.text
    assert aliases(services, model) == {"champion": "3", "previous": "2"}
    Registry.connect(services).client.delete_model_version(model, "2")
    back = {"model_name": model, "actor": "anna", "now": NOW}
    with pytest.raises(ModelVersionNotFoundError, match=r"was version 2 before, .*: name model_version"):
        run_step("roll-back", back, services)
    assert aliases(services, model) == {"champion": "3"}


def test_another_alias_leaves_champion_and_previous_alone(services: Services, model: str) -> None:
    run_step("promote", promotion(model, "2", None, alias="shadow"), services)
    run_step("promote", promotion(model, "3", "2", alias="shadow"), services)
    assert aliases(services, model) == {"champion": "1"}
    assert Registry.connect(services).aliases(model)["shadow"] == "3"


def test_an_alias_has_one_owner(
    services: Services, model: str, trainings: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Once the ledger owns it, a registration moves it there, and nobody puts it back."""
    run_step("promote", promotion(model, "1", None, alias="challenger"), services)
    newest = {"model_name": model, **trainings[2], "actor": "dag/run/register"}
    for _ in range(2):
        run_step("register", newest, services)
        run_step("promote", promotion(model, "1", None), services)  # any step that shows the aliases
        assert Registry.connect(services).aliases(model)["challenger"] == "3"
    with Ledger.open(str(services.ledger_url)) as ledger:
        moves = [(move.actor, move.subject) for move in ledger.moves(model, "challenger")]
    assert moves == [("dag/run/promote_1", "1"), ("dag/run/register", "3")]


@pytest.mark.parametrize("owner", ["mlflow", "ledger"])
def test_an_older_version_that_is_registered_again_takes_no_alias_from_a_newer_one(
    services: Services, model: str, trainings: list[dict[str, Any]], owner: str
) -> None:
    """A retry that comes late, or a version that is signed again; once the newer one is gone it takes it."""
    if owner == "ledger":
        run_step("promote", promotion(model, "3", None, alias="challenger"), services)
    registry = Registry.connect(services)
    run_step("register", {"model_name": model, **trainings[1]}, services)
    assert registry.aliases(model)["challenger"] == "3"
    registry.client.delete_model_version(model, "3")
    run_step("register", {"model_name": model, **trainings[1]}, services)
    assert registry.aliases(model)["challenger"] == "2"


def test_aliases_that_are_moved_by_others_are_refused(
    services: Services, model: str, trainings: list[dict[str, Any]]
) -> None:
    for alias in ("champion", "previous"):
        with pytest.raises(ValueError, match=f"alias '{alias}'.*promote"):
            run_step("register", {"model_name": model, **trainings[1], "alias": alias}, services)
    for alias in ("v7", "latest", "a b", "s" * 101):  # before there is a version, or an entry in the ledger
        other = {"model_name": f"{model} {alias}", **trainings[1], "alias": alias}
        with pytest.raises(
            ValueError, match=f"alias '{alias}' is refused by MLflow or the ledger: .* 100 at most"
        ):
            run_step("register", other, services)
        assert Registry.connect(services).client.search_model_versions(f"name = '{model} {alias}'") == []
        with pytest.raises(
            ValueError, match=f"alias '{alias}' is refused by MLflow or the ledger: .* 100 at most"
        ):
            run_step("promote", promotion(model, "2", None, alias=alias), services)
    with pytest.raises(ValueError, match="alias 'previous' follows 'champion'"):
        run_step("promote", promotion(model, "2", None, alias="previous"), services)
    back = {"model_name": model, "actor": "anna", "now": NOW, "alias": "previous"}
    with pytest.raises(ValueError, match="alias 'previous' follows 'champion'"):
        run_step("roll-back", back, services)
    assert aliases(services, model) == {"champion": "1"}


def test_going_back_twice_goes_two_steps_back(services: Services, model: str) -> None:
    run_step("promote", promotion(model, "2", "1"), services)
    run_step("promote", promotion(model, "3", "2"), services)
    back = {"model_name": model, "actor": "anna", "now": NOW}
    targets = [
        run_step("roll-back", back | {"request": request}, services)["model_version"]
        for request in ("first", "first", "second")  # the second one is a retry
    ]
    assert targets == ["2", "2", "1"]
    with pytest.raises(ModelVersionNotFoundError, match="version 1 is the first champion"):
        run_step("roll-back", back | {"request": "third"}, services)
    assert (
        run_step("roll-back", back | {"request": "named", "model_version": "3"}, services)["previous_version"]
        == "1"
    )
    assert aliases(services, model) == {"champion": "3", "previous": "1"}


def test_who_was_champion(
    services: Services, model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Made champion on the 1st; 2 on the 10th; back on the 20th; 3 on the 25th, by a worker whose clock is slow."""
    run_step("promote", promotion(model, "2", "1", now="2026-03-10T00:00:00Z"), services)
    back = {"model_name": model, "actor": "anna", "reason": "complaints", "now": "2026-03-20T00:00:00Z"}
    run_step("roll-back", back, services)
    run_step("promote", promotion(model, "3", "1", now="2026-03-19T23:59:59Z"), services)
    monkeypatch.setenv(
        "AIRFLOW_CONN_AUDIT", json.dumps({"conn_type": "mlops_ledger", "extra": {"url": services.ledger_url}})
    )
    hook = LedgerHook(ledger_conn_id="audit")
    versions = {}
    for day in (28, 1, 9, 10, 19, 20, 26):
        at = datetime(2026, 3 if day != 28 else 2, day, 12, tzinfo=UTC)
        found = hook.who_was_champion(model, at)
        versions[at.strftime("%m-%d")] = found.model_version if found else None
    assert versions == {
        "02-28": None, "03-01": "1", "03-09": "1", "03-10": "2", "03-19": "2", "03-20": "3", "03-26": "3",
    }  # fmt: skip
    period = hook.who_was_champion(model, datetime(2026, 3, 15, tzinfo=UTC))
    assert period is not None
    assert (period.since.day, period.until and period.until.day, period.actor) == (
        10,
        20,
        "dag/run/promote_2",
    )
    command = ["who-was-champion", model, "--ledger", str(services.ledger_url)]
    assert cli.main([*command, "--at", "2026-03-15"]) == 0
    told = capsys.readouterr().out
    assert "version 2, from 2026-03-10 00:00:00 until 2026-03-20 00:00:00 (UTC)" in told
    assert "moved there by dag/run/promote_2: version 2 became champion" in told
    assert cli.main(command) == 0
    assert "version 3, from 2026-03-20 00:00:00 to this day (UTC)" in capsys.readouterr().out
    assert cli.main([*command, "--at", "2026-03-01T10:00:00+05:00"]) == 1
    assert f"{model} had no champion at 2026-03-01 05:00:00 UTC." in capsys.readouterr().err


def test_the_ledger_survives_an_answer_that_came_twice(services: Services, model: str) -> None:
    """A retry after everything was done writes nothing twice."""
    for _ in range(2):
        run_step("promote", promotion(model, "2", "1"), services)
    with Ledger.open(str(services.ledger_url)) as ledger:
        kinds = [entry.kind for entry in ledger.entries(model_name=model)]
    assert kinds == [
        EntryKind.PROMOTION,
        EntryKind.PROMOTION,
    ]  # the second is the champion before it, adopted
