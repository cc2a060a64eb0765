"""What rendering makes of arguments, and what the operators make of that."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from airflow.providers.standard.operators.empty import EmptyOperator
from airflow.sdk import DAG, TaskGroup, timezone
from airflow.sdk.exceptions import DownstreamTasksSkipped

from airflow_mlops.core.codec import from_dict
from airflow_mlops.hooks.ledger import LedgerHook
from airflow_mlops.ledger import EntryKind
from airflow_mlops.operators.check_skew import CheckSkewOperator
from airflow_mlops.operators.deploy import DeployModelOperator
from airflow_mlops.operators.evaluate import EvaluateModelOperator
from airflow_mlops.operators.promotion import PromoteModelOperator, RollBackModelOperator
from airflow_mlops.operators.register import RegisterModelOperator
from airflow_mlops.operators.retraining import DecideRetrainingOperator
from airflow_mlops.operators.score import ScoreBatchOperator
from airflow_mlops.operators.screen_dataset import ScreenDatasetOperator
from airflow_mlops.operators.select import SelectModelOperator
from airflow_mlops.operators.validate import ValidateDatasetOperator
from airflow_mlops.steps.base import load_step

VERSION = "{{ params.version }}"
TASKS = {
    DeployModelOperator: {},
    RollBackModelOperator: {},
    PromoteModelOperator: {"evaluation": {"champion_version": None, "reason": "better"}},
    ScoreBatchOperator: {"dataset": "rows", "table": "predictions", "id_column": "id", "time_column": "t"},
}
CONTEXT = {
    "data_interval_start": "2024-01-01",
    "data_interval_end": "2024-02-01",
    "ti": SimpleNamespace(dag_id="dag", run_id="run", task_id="task"),
    "dag_run": SimpleNamespace(run_after=timezone.utcnow()),
}


@pytest.mark.parametrize("cls", TASKS, ids=lambda cls: cls.__name__)
def test_a_version_that_native_rendering_made_a_number(cls: Any) -> None:
    with DAG("native", render_template_as_native_obj=True):
        task = cls(task_id="task", model_name="m", model_version=VERSION, **TASKS[cls])
    context: Any = CONTEXT | {"params": {"version": "3"}}
    task.render_template_fields(context)
    assert task.model_version == 3
    assert from_dict(load_step(cls.step).spec, task.build_spec(context)).model_version == "3"


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("nothing", [None, ""])
def test_a_version_that_a_parameter_leaves_open(nothing: str | None, native: bool) -> None:
    by_hand = {"champion_version": "{{ params.version }}", "reason": "the first one"}
    with DAG("open", render_template_as_native_obj=native):
        latest = [
            cls(task_id=cls.__name__, model_name="m", model_version=VERSION, **TASKS[cls])
            for cls in (RollBackModelOperator, DeployModelOperator, ScoreBatchOperator)
        ]
        promote = PromoteModelOperator(
            task_id="promote", model_name="m", model_version="1", evaluation=by_hand
        )
    context: Any = CONTEXT | {"params": {"version": nothing}}
    for task in (*latest, promote):
        task.render_template_fields(context)
    assert [task.build_spec(context)["model_version"] for task in latest] == [None] * 3
    assert promote.build_spec(context)["expected_version"] is None


EVALUATED = {
    "dataset": {"uri": "rows", "time_column": "t"},
    "model_name": "m",
    "run_id": "r",
    "package_digest": "sha256:1",
    "holdout": {"start": "2024-01-01T00:00:00Z", "end": "2024-02-01T00:00:00Z"},
    "metric": "mae",
}


def test_a_training_of_an_older_release_is_evaluated_itself() -> None:
    task = EvaluateModelOperator(task_id="evaluate", training=EVALUATED)
    assert task.build_spec({})["twin_digest"] is None  # type: ignore[typeddict-item]


def test_one_column_may_be_given_as_text() -> None:
    spec = EvaluateModelOperator(
        task_id="named",
        training=EVALUATED,
        groups="sex",
        slices="borough, hour",
        metrics="f1",
        minimum_group_rows="20",
    ).build_spec({})  # type: ignore[typeddict-item]
    assert (spec["groups"], spec["slices"], spec["metrics"]) == (["sex"], ["borough", "hour"], ["f1"])
    assert spec["policy"]["minimum_group_rows"] == 20
    plain = EvaluateModelOperator(task_id="plain", training=EVALUATED).build_spec({})  # type: ignore[typeddict-item]
    assert plain["slices"] is plain["metrics"] is None


def test_a_ticket_number_is_a_reason() -> None:
    with DAG("native", render_template_as_native_obj=True):
        back = RollBackModelOperator(task_id="back", model_name="m", reason="{{ params.ticket }}")
        register = RegisterModelOperator(
            task_id="register",
            training={"model_name": "m", "run_id": "r", "package_digest": "sha256:1"},  # written by hand
            vouched_by="{{ params.ticket }}",
        )
        screen = ScreenDatasetOperator(
            task_id="screen",
            dataset={"uri": "rows"},
            target="y",
            time_column="t",
            released_by="{{ params.ticket }}",
        )
    context: Any = CONTEXT | {"params": {"ticket": "4711"}}
    for task in (back, register, screen):
        task.render_template_fields(context)
    assert screen.build_spec(context)["released_by"] == "4711"
    assert from_dict(load_step("roll-back").spec, back.build_spec(context)).reason == "4711"
    assert from_dict(load_step("register").spec, register.build_spec(context)).vouched_by == "4711"


def test_a_choice_among_many_candidates_is_recorded_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    connection = {"conn_type": "mlops_ledger", "extra": {"url": f"sqlite:///{tmp_path}/ledger.db"}}
    monkeypatch.setenv("AIRFLOW_CONN_LEDGER_DEFAULT", json.dumps(connection))
    window = {"start": "2024-01-01T00:00:00Z", "end": "2024-02-01T00:00:00Z"}
    trainings = [
        {"run_id": f"{number:032x}", "run_url": "", "model_name": "m", "training": window}
        for number in range(40)
    ]
    context: Any = {"ti": SimpleNamespace(dag_id="dag", run_id="run", task_id="select")}
    for given in (trainings, trainings[::-1], trainings[1:]):
        task = SelectModelOperator(task_id="select", trainings=given)
        task.record({"training": trainings[7], "reason": "the best"}, context)
    with LedgerHook().get_conn() as ledger:
        found = ledger.entries(kind=EntryKind.SELECTION)
    assert sorted(len(one.payload["run_ids"]) for one in found) == [39, 40]
    assert {one.payload["run_id"] for one in found} == {trainings[7]["run_id"]}


def test_a_choice_among_wide_tables_is_asked_without_their_columns() -> None:
    columns = {f"c{number}": "Float64" for number in range(5_000)}
    trainings = [
        {"run_id": run_id, "dataset": {"uri": "t", "version": 1, "columns": columns}} for run_id in "abcdefgh"
    ]
    task = SelectModelOperator(task_id="select", trainings=trainings)
    asked = task.build_spec(CONTEXT)  # type: ignore[arg-type]
    assert len(json.dumps(asked)) < 1_000
    chosen = {"training": asked["trainings"][3], "reason": "the best"}
    assert task.decide(chosen, CONTEXT) == trainings[3]  # type: ignore[arg-type]


def decider(*groups: str, bring_back: str = "bring_back") -> DecideRetrainingOperator:
    """Give one that a training, an earlier champion and a deployment follow, all in a group of tasks."""
    with DAG("decided"), ExitStack() as entered:
        for group in groups:
            entered.enter_context(TaskGroup(group))
        decide = DecideRetrainingOperator(
            task_id="decide", model_name="m", deploy_task_id="deploy", bring_back_task_id=bring_back
        )
        decide >> [EmptyOperator(task_id=name) for name in ("train", "bring_back", "deploy")]
    return decide


@pytest.mark.parametrize("groups", [(), ("fare",), ("cities", "fare")])
def test_tasks_of_the_same_group_need_no_prefix(groups: tuple[str, ...]) -> None:
    decide = decider(*groups)
    assert decide.build_spec(CONTEXT)["may_bring_back"]  # type: ignore[arg-type]
    pushed: Any = {"ti": SimpleNamespace(xcom_push=lambda **_: None)}
    result = {"retrain": False, "bring_back": None, "deploy": False, "decision_key": "k", "reason": "r"}
    for way, left in (
        ({"retrain": True}, ["bring_back"]),
        ({"bring_back": "3"}, ["train"]),
        ({"deploy": True}, ["bring_back", "train"]),
    ):
        with pytest.raises(DownstreamTasksSkipped) as skipped:
            decide.decide(result | way, pushed)
        assert [str(task).split(".") for task in skipped.value.tasks] == [[*groups, name] for name in left]


def test_a_task_that_does_not_follow_is_named_before_anything_is_decided() -> None:
    with pytest.raises(
        ValueError, match=r"'bring_it_back' of task 'fare.decide' .*fare\.bring_back, fare\.deploy"
    ):
        decider("fare", bring_back="bring_it_back").build_spec(CONTEXT)  # type: ignore[arg-type]


WINDOW = {"start": "2024-01-01T00:00:00Z", "end": "2024-02-01T00:00:00Z"}
FOUND: dict[str, Any] = {
    "dataset": {"uri": "rows", "version": 3}, "window": WINDOW, "quarantine": None, "headline": "said", "verdict": "held",
    "released_by": None, "slices": [], "success": True, "report_url": None, "failures": [], "suite_name": "s", "evaluated": 1,
    "failed": 0, "failed_critical": 0, "model_name": "m",
}  # fmt: skip


@pytest.mark.parametrize(
    "task",
    [
        ScreenDatasetOperator(task_id="task", dataset="rows", target="y", time_column="t"),
        ValidateDatasetOperator(task_id="task", dataset="rows", suite="suite.json"),
        CheckSkewOperator(task_id="task", model_name="m"),
    ],
    ids=lambda task: task.step,
)
def test_each_mapped_instance_has_a_verdict_of_its_own(
    task: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    connection = {"conn_type": "mlops_ledger", "extra": {"url": f"sqlite:///{tmp_path}/ledger.db"}}
    monkeypatch.setenv("AIRFLOW_CONN_LEDGER_DEFAULT", json.dumps(connection))
    told = []
    for index in (0, 1, 1):  # the last one: what recorded it was killed, and does so again
        instance = SimpleNamespace(dag_id="d", run_id="r", task_id="task", map_index=index, try_number=1)
        context: Any = {"ti": instance, "outlet_events": {}}
        told.append(task.record(FOUND | {"headline": f"instance {index}"}, context))
    with LedgerHook().get_conn() as ledger:
        assert [one.payload["headline"] for one in ledger.entries()] == ["instance 1", "instance 0"]
    if task.step == "validate":
        assert len({one["quality"]["run_uid"] for one in told}) == 2
