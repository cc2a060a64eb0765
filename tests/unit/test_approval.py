from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from airflow.providers.standard.exceptions import HITLRejectException, HITLTriggerEventError
from airflow.sdk import DAG, Param, RetryAction

from airflow_mlops.core.model.model_card import Change, describe_request
from airflow_mlops.exceptions import PromotionRejectedError
from airflow_mlops.ledger import EntryKind, Ledger, LedgerEntry
from airflow_mlops.operators.approval import ApproveModelOperator
from airflow_mlops.operators.promotion import NOT_ASKED, PromoteModelOperator
from airflow_mlops.policies import MLOPS_RETRY_POLICY
from tests.unit.test_model_card import EVERYTHING, HOSTILE, ONE_METRIC, rendered

REGISTRATION = {
    "model_name": "fare",
    "model_version": "5",
    "run_id": "run",
    "package_digest": "sha256:1",
    "version_url": "http://mlflow/#/models/fare/versions/5",
    "card_url": "http://mlflow/card",
}
EVALUATION = ONE_METRIC | {"model_name": "fare", "run_id": "run", "evaluation_url": "http://mlflow/run"}
YES = {
    "approved": True,
    "model_name": "fare",
    "model_version": "5",
    "package_digest": "sha256:1",
    "champion_version": "4",
    "champion_alias": "champion",
    "ledger_position": 0,
    "responded_by": {"name": "anna"},
    "responded_at": "2026-03-01T00:00:00+00:00",
}


@pytest.fixture
def ledger_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    url = f"sqlite:///{tmp_path / 'ledger.db'}"
    connection = {"conn_type": "mlops_ledger", "extra": {"url": url}}
    monkeypatch.setenv("AIRFLOW_CONN_LEDGER_DEFAULT", json.dumps(connection))
    return url


def context(try_number: int = 1) -> dict[str, Any]:
    instance = SimpleNamespace(
        dag_id="dag", run_id="run", task_id="approve", map_index=-1, try_number=try_number
    )
    return {"ti": instance}


def event(option: str, **more: Any) -> dict[str, Any]:
    return {
        "chosen_options": [option],
        "params_input": {"comment": "fine"},
        "responded_at": datetime(2026, 3, 1, tzinfo=UTC),
        "responded_by_user": {"id": "7", "name": "anna"},
        "timedout": False,
        **more,
    }


def asking(**more: Any) -> ApproveModelOperator:
    with DAG("dag", schedule=None):
        return ApproveModelOperator(
            task_id="approve", registration=REGISTRATION, evaluation=EVALUATION, **more
        )


def promoting(approval: Any, **more: Any) -> PromoteModelOperator:
    about = {"model_name": "fare", "model_version": REGISTRATION, "evaluation": EVALUATION}
    with DAG("dag", schedule=None):
        return PromoteModelOperator(task_id="promote", approval=approval, **(about | more))


def written(url: str) -> list[LedgerEntry]:
    with Ledger.open(url) as ledger:
        return ledger.entries(newest_first=False)


class TestAnswer:
    def test_a_yes_is_written_down(self, ledger_url: str) -> None:
        task = asking()
        asked = task._asked() | {"asked_at": "2026-02-28T00:00:00+00:00"}
        answer = task.execute_complete(context(), event("Approve"), asked)  # type: ignore[arg-type]
        assert json.loads(json.dumps(answer)) == {
            "approved": True,
            "model_name": "fare",
            "model_version": "5",
            "package_digest": "sha256:1",
            "champion_version": "4",
            "champion_alias": "champion",
            "ledger_position": 0,
            "responded_by": {"id": "7", "name": "anna"},
            "asked_at": "2026-02-28T00:00:00+00:00",
            "responded_at": "2026-03-01T00:00:00+00:00",
            "comment": "fine",
            "timed_out": False,
            "taken_back": None,
        }
        (entry,) = written(ledger_url)
        assert (entry.kind, entry.actor) == (EntryKind.APPROVAL, "anna")
        assert entry.summary == "anna approved version 5 of fare: fine"
        assert entry.payload["asked_by"] == "dag/run/approve"
        assert task.found_links == {"Model version": REGISTRATION["version_url"]}

    def test_an_answer_is_about_what_was_asked_whatever_was_made_since(self, ledger_url: str) -> None:
        """Airflow renders the arguments anew when the answer comes: they are those of the tasks as they ran last."""
        task = asking()
        asked = task._asked()
        task.registration = REGISTRATION | {"model_version": "6", "package_digest": "sha256:2"}
        answer = task.execute_complete(context(), event("Approve"), asked)  # type: ignore[arg-type]
        assert (answer["model_version"], answer["package_digest"]) == ("5", "sha256:1")
        assert written(ledger_url)[0].summary == "anna approved version 5 of fare: fine"
        with pytest.raises(
            PromotionRejectedError, match=r"the yes was about fare version 5 .* asks about this"
        ):
            promoting(answer, model_version="6").build_spec(context())  # type: ignore[arg-type]

    def test_a_yes_for_one_alias_is_none_for_another(self, ledger_url: str) -> None:
        evaluation = EVALUATION | {"champion_alias": "shadow"}
        with DAG("dag", schedule=None):
            task = ApproveModelOperator(task_id="a", registration=REGISTRATION, evaluation=evaluation)
        assert "become shadow?" in task._question()
        answer = task.execute_complete(context(), event("Approve"), task._asked())  # type: ignore[arg-type]
        assert written(ledger_url)[0].summary == "anna approved version 5 of fare as shadow: fine"
        with pytest.raises(PromotionRejectedError, match="the yes was about fare version 5 against shadow 4"):
            promoting(answer).build_spec(context())  # type: ignore[arg-type]

    @pytest.mark.parametrize("key", ["None", "", None])
    def test_a_key_that_is_none_is_none(self, ledger_url: str, key: str | None) -> None:
        assert asking(decision_key=key)._asked()["decision_key"] is None

    def test_a_key_that_names_no_decision_is_told_before_anybody_is_asked(self, ledger_url: str) -> None:
        with pytest.raises(ValueError, match="'elsewhere' names no retraining decision of fare"):
            asking(decision_key="elsewhere").execute(context())  # type: ignore[arg-type]

    def test_a_no_closes_the_retraining(self, ledger_url: str) -> None:
        decision = LedgerEntry(
            kind=EntryKind.RETRAINING_DECISION,
            key="decision",
            model_name="fare",
            window=None,
            subject=None,
            summary="retrain",
            payload={"outcome": "retrain"},
            actor="dag/run/decide",
            recorded_at=datetime(2026, 2, 1, tzinfo=UTC),
        )
        with Ledger.open(ledger_url) as ledger:
            ledger.record(decision)
        asking(decision_key="decision").execute_complete(context(), event("Reject"))  # type: ignore[arg-type]
        _, approval, outcome = written(ledger_url)
        assert approval.summary == "anna rejected version 5 of fare: fine"
        assert (outcome.kind, outcome.key) == (EntryKind.RETRAINING_OUTCOME, "decision")
        assert outcome.payload["outcome"] == "rejected"

    def test_a_no_that_fails_the_task_is_not_asked_again(self, ledger_url: str) -> None:
        with pytest.raises(HITLRejectException) as no:
            asking(fail_on_reject=True).execute_complete(context(), event("Reject"))  # type: ignore[arg-type]
        assert MLOPS_RETRY_POLICY.evaluate(no.value, try_number=1, max_tries=3).action is RetryAction.FAIL
        assert [entry.payload["approved"] for entry in written(ledger_url)] == [False]

    def test_each_question_has_its_answer(self, ledger_url: str) -> None:
        for number, option in ((1, "Reject"), (1, "Reject"), (2, "Approve")):  # the second one is a repeat
            asking().execute_complete(context(number), event(option))  # type: ignore[arg-type]
        assert [entry.payload["approved"] for entry in written(ledger_url)] == [False, True]

    def test_what_is_no_answer_is_not_written_down(self, ledger_url: str) -> None:
        with pytest.raises(HITLTriggerEventError):
            asking().execute_complete(context(), {"error": "broken", "error_type": "unknown"})  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="Maybe"):
            asking().execute_complete(context(), event("Maybe"))  # type: ignore[arg-type]
        assert written(ledger_url) == []

    @pytest.mark.parametrize("given", [{"note": "fine"}, {"comment": 5}])
    def test_an_answer_that_airflow_refuses_is_not_written_down(
        self, given: dict[str, Any], ledger_url: str
    ) -> None:
        """Its API takes any parameters with an answer; they are looked at when the task goes on."""
        with pytest.raises(ValueError, match=r"params_input|Invalid input"):
            asking().execute_complete(context(), event("Approve", params_input=given))  # type: ignore[arg-type]
        assert written(ledger_url) == []

    def test_a_yes_of_nobody_is_a_no(self, ledger_url: str) -> None:
        nobody = event("Approve", responded_by_user=None)
        answer = asking().execute_complete(context(), nobody)  # type: ignore[arg-type]
        assert (answer["approved"], answer["timed_out"]) == (False, True)

    def test_the_default_is_no_and_can_not_be_made_yes(self) -> None:
        assert asking().defaults == ["Reject"]
        with pytest.raises(TypeError, match="defaults"):
            asking(defaults="Approve")


class TestComment:
    def test_it_is_asked_for_also_where_the_dag_has_params(self) -> None:
        assert set(asking().serialized_params) == {"comment"}
        with DAG("dag", schedule=None, params={"minimum_uplift": Param(0.1, type="number")}):
            task = ApproveModelOperator(task_id="approve", registration=REGISTRATION, evaluation=EVALUATION)
        assert set(task.serialized_params) == {"comment"}
        assert task.serialized_params["comment"]["schema"]["title"] == "Comment"

    def test_further_questions_may_be_asked(self) -> None:
        task = asking(params={"ticket": Param("", type="string")})
        assert set(task.serialized_params) == {"comment", "ticket"}


class TestPromotion:
    @staticmethod
    def spec(approval: Any, **more: Any) -> dict[str, Any]:
        return promoting(approval, **more).build_spec(context())  # type: ignore[arg-type]

    def test_who_approved_is_part_of_the_reason(self) -> None:
        spec = self.spec(YES)
        assert spec["reason"] == "MAE 2.5 against 3.1; approved by anna"
        assert (spec["verdict"], spec["evaluated_run_id"], spec["package_digest"]) == (
            "promote",
            "run",
            "sha256:1",
        )
        assert spec["approved_at"] == "2026-03-01T00:00:00+00:00"

    def test_where_nobody_is_asked(self) -> None:
        with DAG("dag", schedule=None):
            task = PromoteModelOperator(
                task_id="promote", model_name="fare", model_version=REGISTRATION, evaluation=EVALUATION
            )
        spec = task.build_spec(context())  # type: ignore[arg-type]
        assert (spec["reason"], spec["approved_at"]) == ("MAE 2.5 against 3.1", None)
        assert spec["package_digest"] == REGISTRATION["package_digest"]
        assert self.spec(NOT_ASKED, model_version="5")["package_digest"] is None

    @pytest.mark.parametrize("nothing", [None, "", "None", {}, {"approved": True}])
    def test_an_approval_that_comes_out_as_nothing_is_no_yes(self, nothing: Any) -> None:
        """Marked as success, skipped, or its XCom deleted."""
        with pytest.raises(PromotionRejectedError, match=r"gave no answer .* clear it, so that it asks"):
            self.spec(nothing)

    @pytest.mark.parametrize(
        ("other", "words"),
        [
            ({"approved": False}, "anna said no"),
            ({"approved": False, "responded_by": None}, "nobody said yes in time"),
            ({"model_version": "4"}, "about fare version 4 against champion 4"),
            ({"model_name": "tip"}, "about tip version 5 against champion 4"),
            ({"champion_version": "3"}, "about fare version 5 against champion 3"),
            ({"package_digest": "sha256:2"}, "about package sha256:2, and sha256:1 was registered"),
            ({"approved": "False"}, "anna said no"),
            ({"responded_by": None}, "nobody said yes in time"),
        ],
    )
    def test_without_a_yes_for_this_version_nothing_is_promoted(
        self, other: dict[str, Any], words: str
    ) -> None:
        with pytest.raises(PromotionRejectedError, match=f"version 5 of fare was not approved.*{words}"):
            self.spec(YES | other)

    def test_the_evaluation_and_the_version_are_of_this_model(self) -> None:
        with pytest.raises(PromotionRejectedError, match="evaluation is about 'tip'"):
            self.spec(NOT_ASKED, evaluation=EVALUATION | {"model_name": "tip"})
        with pytest.raises(PromotionRejectedError, match="model_version is about 'tip'"):
            self.spec(NOT_ASKED, model_version=REGISTRATION | {"model_name": "tip"})

    def test_an_evaluation_moves_only_the_alias_it_compared_with(self) -> None:
        shadow = EVALUATION | {"champion_alias": "shadow", "champion_version": "9"}
        assert self.spec(NOT_ASKED, evaluation=shadow, alias="shadow")["expected_version"] == "9"
        for evaluation, alias in ((EVALUATION, "shadow"), (shadow, "champion")):
            with pytest.raises(PromotionRejectedError, match=f"Evaluate with champion_alias='{alias}'"):
                self.spec(NOT_ASKED, evaluation=evaluation, alias=alias)
        by_hand = {"champion_version": None, "reason": "the first one"}
        assert self.spec(NOT_ASKED, evaluation=by_hand, alias="shadow")["alias"] == "shadow"

    def test_an_evaluation_without_a_verdict_is_none(self) -> None:
        without = {name: value for name, value in EVALUATION.items() if name not in {"verdict", "run_id"}}
        assert self.spec(NOT_ASKED, evaluation=without)["verdict"] == "none"

    def test_by_hand_one_says_whom_it_replaces_and_why(self) -> None:
        by_hand = {"champion_version": 4, "reason": "decided in the review"}
        spec = self.spec(NOT_ASKED, evaluation=by_hand)
        assert (spec["verdict"], spec["evaluated_run_id"], spec["expected_version"]) == (None, None, "4")
        assert spec["reason"] == "by hand: decided in the review"
        for nothing in (None, {"reason": "x"}, by_hand | {"reason": " "}):
            with pytest.raises(ValueError, match="To promote by hand"):
                self.spec(NOT_ASKED, evaluation=nothing)


class TestQuestion:
    def test_it_says_what_one_has_to_know(self) -> None:
        text = describe_request(
            model_name="fare",
            model_version="5",
            evaluation=EVERYTHING,
            changes=[Change(name="seed", champion="1", challenger=None)],
            links={"This version": "http://mlflow/#/models/my fare(1)/versions/5"},
        )
        shown = rendered(text).text
        for words in (
            "Shall version 5",
            "2.5 (2.4 to 2.6)",
            "kind b",
            "Groups of sex",
            "seed",
            "This version",
        ):
            assert words in shown, words
        (link,) = [given["href"] for tag, given in rendered(text).tags if tag == "a"]
        assert link == "http://mlflow/#/models/my%20fare%281%29/versions/5"

    @pytest.mark.parametrize(("version", "package"), [("5", "sha256:1"), ("3", "sha256:1")])
    def test_that_it_was_rolled_back_comes_first(self, ledger_url: str, version: str, package: str) -> None:
        """Under this number, or under another one and the same package; the answer keeps it."""
        with Ledger.open(ledger_url) as ledger:
            for kind, to, digest, before in (
                (EntryKind.PROMOTION, "4", "sha256:0", None),
                (EntryKind.PROMOTION, version, package, "4"),
                (EntryKind.ROLLBACK, "4", "sha256:0", version),
            ):
                left = package if kind is EntryKind.ROLLBACK else None
                ledger.move_alias(
                    model_name="fare",
                    alias="champion",
                    model_version=to,
                    expected_version=before,
                    entry=LedgerEntry(
                        kind=kind,
                        key=f"fare|{to}",
                        model_name="fare",
                        window=None,
                        subject=to,
                        summary="",
                        payload={
                            "alias": "champion",
                            "model_version": to,
                            "package_digest": digest,
                            "previous_version": before,
                            "previous_package_digest": left,
                            "reason": "complaints <b>",
                        },
                        actor="bob",
                        recorded_at=datetime(2026, 2, 3, 4, 5, tzinfo=UTC),
                    ),
                )
        task = asking()
        shown = rendered(task._question(task._asked()["taken_back"])).text.strip()
        assert shown.startswith("It was rolled back: bob took version " + version)
        assert "at 2026-02-03 04:05 UTC: complaints <b>" in shown
        answer = task.execute_complete(context(), event("Approve"), task._asked())  # type: ignore[arg-type]
        assert answer["taken_back"]["actor"] == "bob"
        assert answer["ledger_position"] == written(ledger_url)[-2].entry_id
        assert written(ledger_url)[-1].payload["taken_back"] == answer["taken_back"]

    def test_names_from_outside_are_text(self) -> None:
        text = describe_request(
            model_name=HOSTILE,
            model_version=HOSTILE,
            evaluation=EVERYTHING | {"reason": HOSTILE, "slices": [{"where": {HOSTILE: HOSTILE}}]},
            changes=[Change(name=HOSTILE, champion=HOSTILE, challenger=HOSTILE)],
            links={HOSTILE: "javascript:alert(1)", "x": f"http://h/{HOSTILE}"},
        )
        page = rendered(text)
        assert {tag for tag, _ in page.tags}.isdisjoint({"script", "img", "h1", "code"})
        assert [given["href"][:9] for tag, given in page.tags if tag == "a"] == ["http://h/"]
