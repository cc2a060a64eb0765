"""What every operator, sensor, trigger and hook promises, checked by reflection."""

from __future__ import annotations

import dataclasses
import enum
import importlib
import inspect
import json
import pkgutil
import re
import subprocess
import sys
import types
import typing
from datetime import UTC, datetime

import pytest
from airflow.sdk import BaseHook, BaseNotifier, BaseOperator
from airflow.triggers.base import BaseTrigger

import airflow_mlops.hooks
import airflow_mlops.notifiers
import airflow_mlops.operators
import airflow_mlops.sensors
import airflow_mlops.triggers
from airflow_mlops.core.codec import from_dict, to_dict
from airflow_mlops.core.windows import Window
from airflow_mlops.operators.base import StepOperator
from airflow_mlops.sensors.base import PollSensor, WindowSensor
from airflow_mlops.steps.base import STEP_MODULES, load_step
from airflow_mlops.triggers.poll import PollTrigger

if typing.TYPE_CHECKING:
    from collections.abc import Iterator

OPERATORS = {
    "IngestDatasetOperator", "ValidateDatasetOperator", "InferExpectationsOperator", "ScreenDatasetOperator", "TrainModelOperator", "EvaluateModelOperator",
    "RegisterModelOperator", "PromoteModelOperator", "RollBackModelOperator", "DeployModelOperator",
    "ScoreBatchOperator", "CheckDriftOperator", "CheckSkewOperator", "CheckPerformanceOperator", "CompareChallengersOperator", "DecideRetrainingOperator",
    "SelectModelOperator", "ExplainModelOperator", "ApproveModelOperator", "UpdateIncidentsOperator",
    "BuildBentoOperator", "DeployToKubernetesOperator", "DeployToBentoCloudOperator",
}  # fmt: skip
SENSORS = {"NewDataSensor", "LabelsArrivedSensor", "ModelVersionSensor", "EndpointReadySensor", "DriftSensor"}
NOTIFIERS = {"IncidentNotifier"}
HOOKS = {"MLflowHook", "BentoMLHook", "BentoCloudHook", "LedgerHook", "SigningHook", "HashingHook"}
HEAVY = {
    "mlflow", "bentoml", "sklearn", "great_expectations", "evidently", "onnxruntime", "skl2onnx", "deltalake", "polars",
    "pandas", "pyarrow", "skops", "matplotlib", "optuna", "shap",
}  # fmt: skip


def discover(package: typing.Any, base: type) -> Iterator[type]:
    for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        for _, cls in inspect.getmembers(importlib.import_module(module.name), inspect.isclass):
            if issubclass(cls, base) and cls.__module__ == module.name:
                yield cls


BASES = (StepOperator, PollSensor, WindowSensor)  # to derive from, not to use
TASKS = [
    cls
    for package in (airflow_mlops.operators, airflow_mlops.sensors)
    for cls in discover(package, BaseOperator)
    if cls not in BASES
]
FOUND_HOOKS = list(discover(airflow_mlops.hooks, BaseHook))
FOUND_NOTIFIERS = list(discover(airflow_mlops.notifiers, BaseNotifier))
FOUND_TRIGGERS = list(discover(airflow_mlops.triggers, BaseTrigger))


def own_arguments(cls: type) -> dict[str, inspect.Parameter]:
    """The arguments a class documents itself: its constructor's, but for those passed on."""
    parameters = inspect.signature(cls.__init__).parameters
    return {
        name: item
        for name, item in parameters.items()
        if name != "self" and item.kind is not inspect.Parameter.VAR_KEYWORD
    }


def documented(cls: type) -> dict[str, str]:
    return dict(re.findall(r":param (\w+): (.+?)(?=\n\s*:|\Z)", inspect.getdoc(cls) or "", re.DOTALL))


def arguments_for(cls: type) -> dict[str, typing.Any]:
    """A value nobody would guess for every argument, unrendered where it is templated."""
    given: dict[str, typing.Any] = {}
    for name in own_arguments(cls):
        given[name] = f"{{{{ params.{name} }}}}" if name in cls.template_fields else object()
    for name in ("deferrable", "fail_on_drift"):
        if name in given:
            given[name] = True
    return given


def test_discovery_found_everything() -> None:
    assert {cls.__name__ for cls in TASKS} == OPERATORS | SENSORS
    assert {cls.__name__ for cls in FOUND_HOOKS} == HOOKS
    assert {cls.__name__ for cls in FOUND_NOTIFIERS} == NOTIFIERS
    assert {cls.__name__ for cls in FOUND_TRIGGERS} == {"PollTrigger", "RolloutTrigger"}
    asked_on_the_way = {"new-labels"}  # by CheckPerformanceOperator, before it runs its own step
    assert {cls.step for cls in TASKS if issubclass(cls, StepOperator)} == set(
        STEP_MODULES
    ) - asked_on_the_way


#: An example of each type that the results of the steps are made of; the first ones where there are several.
VALUES = {
    str: "3", int: 3, float: 0.5, bool: True, typing.Any: "anything", datetime: datetime(2024, 1, 1, tzinfo=UTC),
    Window: Window.parse("2024-01-01", "2024-02-01"),
}  # fmt: skip


def a_value(kind: typing.Any) -> typing.Any:
    """A value of a type, by its annotations; what may be missing is there."""
    if kind in VALUES:
        return VALUES[kind]
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return a_value(parts[0])
    if origin is typing.Literal:
        return parts[0]
    if origin is tuple:
        return tuple(a_value(part) for part in parts if part is not ...)
    if origin is dict:
        return {a_value(parts[0]): a_value(parts[1])}
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return kind(**{field.name: a_value(hints[field.name]) for field in dataclasses.fields(kind)})
    assert isinstance(kind, enum.EnumType), f"no example of {kind}"
    return next(iter(kind))


@pytest.mark.parametrize("cls", TASKS, ids=lambda cls: cls.__name__)
class TestTask:
    def test_arguments_are_keyword_only(self, cls: type) -> None:
        assert all(item.kind is inspect.Parameter.KEYWORD_ONLY for item in own_arguments(cls).values())

    def test_constructor_stores_untouched(self, cls: type, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*args: object, **kwargs: object) -> None:
            raise AssertionError("a constructor must not open anything")

        monkeypatch.setattr("socket.socket.connect", refuse)
        given = arguments_for(cls)
        task = cls(task_id="task", **given)
        for name, value in given.items():
            assert getattr(task, name) is value or getattr(task, name) == value, name

    def test_every_argument_is_documented(self, cls: type) -> None:
        assert set(documented(cls)) == set(own_arguments(cls))

    def test_templated_is_said_exactly_where_true(self, cls: type) -> None:
        said = {name for name, text in documented(cls).items() if text.rstrip().endswith("(templated)")}
        assert said == set(cls.template_fields) & set(own_arguments(cls))

    def test_template_fields_are_arguments(self, cls: type) -> None:
        assert set(cls.template_fields) <= set(own_arguments(cls))

    def test_result_is_json(self, cls: type) -> None:
        """What XCom gets is what the next task reads."""
        given = arguments_for(cls)
        if "fail_on_drift" in given:
            given["fail_on_drift"] = False  # the example drifted
        for name in {"deploy_task_id", "bring_back_task_id"} & set(given):
            given[name] = None  # no task follows
        if "trainings" in given:  # one of which is chosen
            given["trainings"] = [to_dict(a_value(load_step("train").result))]
        task = cls(task_id="task", **given)
        if issubclass(cls, StepOperator):
            step = load_step(cls.step)
            made = a_value(step.result)
            result = to_dict(made)
            assert from_dict(step.result, json.loads(json.dumps(result))) == made
            result = task.decide(result, {})
        elif issubclass(cls, PollSensor):
            result = task.execute_complete({}, {"found": {"what": "it waited for"}})
        else:  # one of Airflow's own, derived: what it may give is only declared
            hints = typing.get_type_hints(cls.execute, localns={"Context": dict})
            assert typing.get_origin(hints["return"]) is dict
            return
        assert isinstance(result, dict)
        assert result
        assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_triggers_survive_a_round_trip() -> None:
    trigger = PollTrigger(
        poll="airflow_mlops.sensors.polls:new_data",
        arguments={"source": "/x/*.csv", "min_files": 1},
        poke_interval=2.0,
    )
    path, kwargs = json.loads(json.dumps(trigger.serialize()))
    module, _, name = path.rpartition(".")
    again = getattr(importlib.import_module(module), name)(**kwargs)
    assert again.serialize() == trigger.serialize()
    assert issubclass(PollSensor, BaseOperator)


@pytest.mark.parametrize("cls", FOUND_NOTIFIERS, ids=lambda cls: cls.__name__)
class TestNotifier:
    def test_arguments_are_keyword_only_and_stored_untouched(self, cls: type) -> None:
        assert all(item.kind is inspect.Parameter.KEYWORD_ONLY for item in own_arguments(cls).values())
        given = arguments_for(cls)
        notifier = cls(**given)
        assert {name: getattr(notifier, name) for name in given} == given

    def test_every_argument_is_documented_and_templated_said_where_true(self, cls: type) -> None:
        assert set(documented(cls)) == set(own_arguments(cls))
        said = {name for name, text in documented(cls).items() if text.rstrip().endswith("(templated)")}
        assert said == set(cls.template_fields)

    def test_it_speaks_both_ways(self, cls: type) -> None:
        assert cls.notify is not BaseNotifier.notify
        assert cls.async_notify is not BaseNotifier.async_notify


@pytest.mark.parametrize("cls", FOUND_HOOKS, ids=lambda cls: cls.__name__)
def test_hooks_say_what_they_connect_to(cls: type) -> None:
    for name in ("conn_name_attr", "default_conn_name", "conn_type", "hook_name"):
        assert getattr(cls, name), name
    hook = cls(**{cls.conn_name_attr: "somewhere"})
    assert getattr(hook, cls.conn_name_attr) == "somewhere"


def test_the_surface_imports_no_machine_learning() -> None:
    """Dag files are parsed every few seconds: what they import must be light."""
    code = """
import importlib, json, pkgutil, sys
import airflow.sdk
before = set(sys.modules)
import airflow_mlops
for name in ("operators", "sensors", "notifiers", "triggers", "hooks"):
    package = importlib.import_module(f"airflow_mlops.{name}")
    for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
for name in ("links", "assets", "policies", "provider"):
    importlib.import_module(f"airflow_mlops.{name}")
print(json.dumps(sorted({name.split(".")[0] for name in set(sys.modules) - before})))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    new = set(json.loads(done.stdout.splitlines()[-1]))
    assert "airflow_mlops" in new
    assert new & HEAVY == set()
