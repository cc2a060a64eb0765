from __future__ import annotations

import inspect
import re
from itertools import pairwise

import pytest

from airflow_mlops import exceptions
from airflow_mlops.ledger import EntryKind
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


@pytest.mark.parametrize("layer", ["operators", "sensors"])
def test_every_operator_and_sensor_is_in_the_reference(layer):
    files = sorted((REPOSITORY / "airflow_mlops" / layer).glob("*.py"))
    classes = [
        f"airflow_mlops.{layer}.{file.stem}.{name}"
        for file in files
        for name in re.findall(r"^class (\w+(?:Operator|Sensor))\(", file.read_text(), flags=re.MULTILINE)
        if file.stem != "base"
    ]
    assert len(classes) == {"operators": 14, "sensors": 5}[layer]
    text = (REFERENCE / "operators.md").read_text()
    assert not [name for name in classes if f".. autoclass:: {name}\n" not in text]


def test_every_kind_of_entry_is_in_the_reference():
    text = (REFERENCE / "ledger.md").read_text()
    assert not [kind for kind in EntryKind if f"`{kind}`" not in text]
