from __future__ import annotations

import inspect
import re
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise

import pytest

from airflow_mlops import exceptions
from airflow_mlops.core.decision.evidence import RetrainingHistory, WindowEvidence
from airflow_mlops.core.decision.retraining import RetrainingPolicy
from airflow_mlops.core.windows import Window
from airflow_mlops.ledger import EntryKind
from airflow_mlops.policies import MLOPS_RETRY_POLICY
from tests.conftest import REPOSITORY

README = REPOSITORY / "README.md"
REFERENCE = REPOSITORY / "docs" / "reference"
PAGES = [README, REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
PAGES = [page for page in PAGES if "_build" not in page.parts]


def test_there_are_pages():
    assert len(PAGES) >= 12


def test_the_dag_of_the_readme_parses_and_holds_the_loop():
    from airflow.sdk import DAG

    (source,) = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    names: dict[str, object] = {}
    exec(compile(source, str(README), "exec"), names)  # noqa: S102 - our own README
    (dag,) = {id(task.dag): task.dag for task in names.values() if hasattr(task, "task_id")}.values()
    assert isinstance(dag, DAG)
    order = ["train", "evaluate", "register", "promote", "deploy"]
    assert set(dag.task_ids) == set(order)
    for before, after in pairwise(order):
        assert after in dag.get_task(before).get_flat_relative_ids(upstream=False), f"{before} before {after}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_lead_to_files(page):
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text())
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing


def test_snippets_are_cut_out_of_files_that_run():
    found = 0
    for page in PAGES:
        for path, body in re.findall(
            r"```\{literalinclude\} (\S+)\n(.*?)```", page.read_text(), flags=re.DOTALL
        ):
            source = (page.parent / path).read_text()
            for marker in re.findall(r'(?:start-after|end-before): "(.*?)"', body):
                assert source.count(marker) == 1, f"{page.name}: {marker} in {path}"
                found += 1
    assert found >= 8


def test_make_commands_that_are_named_exist():
    targets = set(re.findall(r"^([a-z]+):", (REPOSITORY / "Makefile").read_text(), flags=re.MULTILINE))
    named = {
        name for page in PAGES for name in re.findall(r"^\$ make ([a-z]+)", page.read_text(), re.MULTILINE)
    }
    assert {"demo", "test"} <= named <= targets


def test_every_error_is_in_the_reference():
    assert ".. automodule:: airflow_mlops.exceptions" in (REFERENCE / "errors.md").read_text()
    errors = [
        value for name, value in vars(exceptions).items() if inspect.isclass(value) and name.endswith("Error")
    ]
    assert len(errors) > 15
    assert not [error for error in errors if not error.__dict__.get("__doc__")], "automodule leaves these out"


def test_every_error_has_its_row_and_the_policy_it_says():
    table = re.findall(
        r"^\| `(\w+)` \|.*\| (retry|fail) \|$", (REFERENCE / "errors.md").read_text(), re.MULTILINE
    )
    named = dict(table)
    leaves = {
        name: value
        for name, value in vars(exceptions).items()
        if inspect.isclass(value)
        and issubclass(value, exceptions.MLOpsError)
        and (not value.__subclasses__() or value is exceptions.RolloutError)  # is raised itself as well
    }
    assert set(named) == set(leaves)
    for name, error in leaves.items():
        made = error("x", evidence={}) if issubclass(error, exceptions.GateFailedError) else error("x")
        decision = MLOPS_RETRY_POLICY.evaluate(made, 1, 3)
        assert named[name] == decision.action.value, name


def test_every_option_of_the_commands_is_in_the_reference():
    text = (REFERENCE / "cli.md").read_text()
    sections = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
    documented = {
        section.splitlines()[0]: set(re.findall(r"^\| `(--[a-z]+)", section, re.MULTILINE))
        for section in sections
    }
    commands = [
        ["airflow_mlops.cli", name]
        for name in ("demo", "ledger", "timeline", "score", "who-was-champion", "signing-key", "stop-service")
    ]
    for command in [*commands, ["airflow_mlops.steps"]]:
        shown = subprocess.run(
            [sys.executable, "-m", *command, "--help"], capture_output=True, text=True, check=True, timeout=60
        ).stdout
        title = " ".join(command).replace("airflow_mlops.cli", "airflow-mlops")
        title = title if title.startswith("airflow-mlops") else f"python -m {title}"
        assert documented[title] == set(re.findall(r"^  (--[a-z]+)", shown, re.MULTILINE)) - {"--help"}, title


@pytest.mark.parametrize("layer", ["operators", "sensors"])
def test_every_operator_and_sensor_is_in_the_reference(layer):
    files = sorted((REPOSITORY / "airflow_mlops" / layer).glob("*.py"))
    classes = [
        f"airflow_mlops.{layer}.{file.stem}.{name}"
        for file in files
        for name in re.findall(r"^class (\w+(?:Operator|Sensor))\(", file.read_text(), flags=re.MULTILINE)
        if file.stem != "base"
    ]
    assert len(classes) == {"operators": 23, "sensors": 5}[layer]
    text = (REFERENCE / "operators.md").read_text()
    assert not [name for name in classes if f".. autoclass:: {name}\n" not in text]


def test_every_kind_of_entry_is_in_the_reference():
    text = (REFERENCE / "ledger.md").read_text()
    assert not [kind for kind in EntryKind if f"`{kind}`" not in text]


def test_the_policy_of_the_page_decides_what_it_says():
    page = REPOSITORY / "docs" / "how-to" / "choose-a-policy.md"
    (source,) = [
        block
        for block in re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
        if "def careful" in block
    ]
    made: dict = {}
    exec(source, made)  # noqa: S102 - our own page
    start = datetime(2024, 1, 1, tzinfo=UTC)
    windows = [
        Window(start=start + timedelta(days=index), end=start + timedelta(days=index + 1))
        for index in range(3)
    ]
    evidence = [
        WindowEvidence(
            window=window,
            performance={"measured": True, "degraded": degraded, "reason": "graded"},
            drift=None,
            row_count=5000,
        )
        for window, degraded in zip(windows, (False, True, True), strict=True)
    ]
    decisions = made["careful"](evidence, RetrainingHistory(), RetrainingPolicy())
    assert [decision.outcome for decision in decisions] == ["nothing", "covered", "retrain"]
    (once,) = made["careful"](
        evidence[1:2], RetrainingHistory(), RetrainingPolicy(), previous_checks=evidence[:1]
    )
    assert (once.outcome, once.training) == ("alert", None)
    apart = [evidence[1], replace(evidence[0], window=windows[1]), evidence[2]]
    apart[0] = replace(apart[0], window=windows[0])
    decisions = made["careful"](apart, RetrainingHistory(), RetrainingPolicy())
    assert [decision.outcome for decision in decisions] == [
        "alert",
        "nothing",
        "alert",
    ]  # nothing is covered by no retraining
