"""The ledger says where aliases point, whatever MLflow shows, on a real MLflow and a real ledger."""

from __future__ import annotations

import re
import uuid
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import polars as pl
import pytest

from airflow_mlops.exceptions import ArtifactIntegrityError, ModelVersionNotFoundError, PromotionRejectedError
from airflow_mlops.integrations import delta
from airflow_mlops.integrations.mlflow import Registry
from airflow_mlops.ledger import Ledger
from airflow_mlops.services import Services
from airflow_mlops.steps.base import run_step
from airflow_mlops.steps.registry.aliases import find_rival, resolve_alias
from tests.integration.test_registration import Runs

pytestmark = pytest.mark.integration

STEPS = Path(run_step.__code__.co_filename).parent


@pytest.fixture
def services(mlflow_server: str, tmp_path: Path) -> Services:
    return Services(tracking_uri=mlflow_server, ledger_url=f"sqlite:///{tmp_path / 'ledger.db'}")


@pytest.fixture(scope="module")
def runs(mlflow_server: str, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(mlflow_server, tmp_path_factory.mktemp("aliases"))


@pytest.fixture(scope="module")
def packages(runs: Runs) -> list[dict[str, str]]:
    return [runs.add(slope=slope) for slope in (2.0, 3.0, 4.0)]


@pytest.fixture
def model(services: Services, packages: list[dict[str, str]]) -> str:
    """Two versions, the first of which is champion."""
    name = f"aliased_{uuid.uuid4().hex}"
    for package in packages[:2]:
        run_step("register", {"model_name": name, **package}, services)
    promote(services, name, "1", None)
    return name


def promote(services: Services, model: str, version: str, expected: str | None, **more: str) -> None:
    asked = {"model_name": model, "model_version": version, "expected_version": expected, "actor": "anna"}
    run_step("promote", asked | {"now": "2026-03-01T12:00:00Z"} | more, services)


def test_an_alias_moved_in_mlflow_moves_nothing_else(services: Services, model: str, tmp_path: Path) -> None:
    """As somebody may by hand, and as a promotion leaves it that was killed once the ledger had decided."""
    registry = Registry.connect(services)
    registry.set_alias(model, "champion", "2")
    table = str(tmp_path / "rows")
    rows = pl.DataFrame({"id": [1], "t": [datetime(2026, 3, 1, tzinfo=UTC)], "x": [1.0], "kind": ["a"]})
    delta.replace_window(table, rows, time_column="t", window=None)
    asked = {"dataset": table, "model_name": model, "id_column": "id", "time_column": "t"}
    scored = run_step("score", asked | {"table": str(tmp_path / "scores")}, services)
    assert scored["model_version"] == "1"
    # Who knows no ledger, or whose ledger has no such alias, goes by MLflow.
    other = f"sqlite:///{tmp_path / 'other.db'}"
    for ledger_url in (None, other):
        elsewhere = replace(services, ledger_url=ledger_url)
        assert resolve_alias(registry, elsewhere, model, "champion").model_version == "2"
    assert resolve_alias(registry, services, model, "challenger").model_version == "2"


def test_a_champion_that_mlflow_lost_is_said(services: Services, model: str) -> None:
    registry = Registry.connect(services)
    registry.client.delete_model_version(model, "1")
    for ask in (resolve_alias, find_rival):
        with pytest.raises(
            ModelVersionNotFoundError, match=r"is version 1 in the ledger, .* promote one by hand"
        ):
            ask(registry, services, model, "champion")


def test_a_model_made_anew_inherits_no_champion(
    services: Services, model: str, packages: list[dict[str, str]], runs: Runs
) -> None:
    """MLflow gives the number 1 again, to a package that nobody evaluated."""
    registry = Registry.connect(services)
    promote(services, model, "2", "1")
    registry.client.delete_registered_model(model)
    for package in (packages[2], packages[1]):
        run_step("register", {"model_name": model, **package}, services)
    back = {"model_name": model, "actor": "anna", "now": "2026-03-02T00:00:00Z"}
    with pytest.raises(
        ArtifactIntegrityError, match=r"the model was deleted and made anew\. Name model_version"
    ):
        run_step("roll-back", back, services)  # to what is version 1 by now
    assert resolve_alias(registry, services, model, "champion").model_version == "2"  # the same package
    with pytest.raises(ArtifactIntegrityError, match=r"previous of .* holds .* promote one by hand"):
        resolve_alias(registry, services, model, "previous")
    promote(services, model, "1", "2")
    assert registry.aliases(model) == {"champion": "1", "previous": "2", "challenger": "2"}

    registry.client.delete_registered_model(model)
    run_step("register", {"model_name": model, **packages[0]}, services)
    for ask in (resolve_alias, find_rival):
        with pytest.raises(ArtifactIntegrityError, match=r"champion of .* holds .* promote one by hand"):
            ask(registry, services, model, "champion")
    assert registry.aliases(model) == {"challenger": "1"}
    promote(services, model, "1", "1", reason="made anew")  # the remedy, also for the same number
    assert (
        resolve_alias(registry, services, model, "champion").package_digest == packages[0]["package_digest"]
    )
    assert registry.aliases(model) == {"champion": "1", "challenger": "1"}


def test_previous_is_where_one_step_back_leads(
    services: Services, model: str, packages: list[dict[str, str]]
) -> None:
    registry = Registry.connect(services)
    run_step("register", {"model_name": model, **packages[2]}, services)
    promote(services, model, "2", "1")
    promote(services, model, "3", "2")
    shown = [registry.aliases(model)]
    for day in (2, 3):
        asked = {"model_name": model, "actor": "anna", "now": f"2026-03-0{day}T12:00:00Z"}
        run_step("roll-back", asked, services)
        shown.append(registry.aliases(model))
    assert [(found["champion"], found.get("previous")) for found in shown] == [
        ("3", "2"),
        ("2", "1"),
        ("1", None),
    ]


def test_previous_is_not_what_mlflow_says_where_there_is_no_way_back(services: Services, model: str) -> None:
    registry = Registry.connect(services)
    registry.set_alias(model, "previous", "2")
    for ask in (resolve_alias, find_rival):
        with pytest.raises(ModelVersionNotFoundError, match="version 1 is the first champion in the ledger"):
            ask(registry, services, model, "previous")


def test_a_model_that_was_deleted_is_begun_anew_as_the_error_says(
    services: Services, model: str, packages: list[dict[str, str]]
) -> None:
    registry = Registry.connect(services)
    promote(services, model, "2", "1")
    registry.client.delete_registered_model(model)
    words = r'deleted or renamed\. .* register the training without an evaluation, .*"champion_version": "2"'
    with pytest.raises(ModelVersionNotFoundError, match=words):
        find_rival(registry, services, model, "champion")
    run_step("register", {"model_name": model, **packages[2]}, services)
    promote(services, model, "1", "2", reason="the model was deleted")
    rival = find_rival(registry, services, model, "champion")
    assert rival is not None
    assert rival.package_digest == packages[2]["package_digest"]


def test_a_model_that_was_renamed_gets_its_name_back(services: Services, model: str) -> None:
    registry = Registry.connect(services)
    registry.client.rename_registered_model(model, f"{model}_renamed")
    with pytest.raises(ModelVersionNotFoundError, match="Give it its name back"):
        find_rival(registry, services, model, "champion")
    registry.client.rename_registered_model(f"{model}_renamed", model)
    rival = find_rival(registry, services, model, "champion")
    assert rival is not None
    assert rival.model_version == "1"


def test_a_move_is_made_when_the_ledger_makes_it(
    services: Services, model: str, packages: list[dict[str, str]]
) -> None:
    """The rollback's task began long before its pod did; an approval of meanwhile knew nothing of it."""
    asked_at, approved_at = (datetime(2026, 3, day, tzinfo=UTC).isoformat() for day in (2, 5))
    promote(services, model, "2", "1", now="2026-03-04T00:00:00Z")
    began = datetime.now(UTC)
    back = {"model_name": model, "actor": "anna", "requested_at": asked_at, "request": "back"}
    run_step("roll-back", back, services)
    with Ledger.open(str(services.ledger_url)) as ledger:
        (promotion, rollback) = ledger.moves(model)[1:]
        told = ledger.who_was_champion(model, datetime(2026, 3, 6, tzinfo=UTC))
    assert rollback.payload["requested_at"] == asked_at
    assert rollback.recorded_at >= began > promotion.recorded_at
    assert (told.model_version, told.until) == ("2", rollback.recorded_at) if told else False
    evaluated = {"verdict": "promote", "evaluated_run_id": packages[1]["run_id"], "actor": "later"}
    with pytest.raises(PromotionRejectedError, match="anna took it back"):
        promote(services, model, "2", "1", approved_at=approved_at, **evaluated)


def test_a_promotion_that_moved_nothing_names_whom_it_found(services: Services, model: str) -> None:
    promote(services, model, "2", "1")
    asked = {"model_name": model, "model_version": "2", "expected_version": "99", "actor": "bob"}
    result = run_step("promote", asked | {"requested_at": "2026-03-02T00:00:00Z"}, services)
    assert (result["moved"], result["previous_version"]) == (False, "1")


def test_no_step_takes_mlflows_word_for_an_alias() -> None:
    """Where MLflow is asked: to resolve an alias the ledger has not, and to adopt one."""
    asking = {
        file.relative_to(STEPS).as_posix()
        for file in STEPS.rglob("*.py")
        if re.search(r"\.(version_by_alias|find_alias)\(", file.read_text())
    }
    assert asking == {"registry/aliases.py", "promote.py"}
