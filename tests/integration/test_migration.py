"""The snippets for users of airflow-provider-mlflow: they parse as one Dag, and those that talk to a server are run against one."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from airflow.sdk import DAG, timezone

from airflow_mlops.core.rollouts.desired_state import ServedVersion
from airflow_mlops.exceptions import ModelVersionNotFoundError, PromotionConflictError
from airflow_mlops.integrations.bentoml import LocalServer
from airflow_mlops.integrations.mlflow import Registry
from airflow_mlops.serving.local import LocalEndpoint, deploy_package
from airflow_mlops.steps.base import run_step
from tests.conftest import REPOSITORY
from tests.integration.test_registration import Runs
from tests.packages import ROWS, build_package

pytestmark = pytest.mark.integration

PAGE = REPOSITORY / "docs" / "how-to" / "migrate-from-airflow-provider-mlflow.md"
#: Every operator of its last release.
THERE = {
    "CreateRegisteredModelOperator", "GetRegisteredModelOperator", "DeleteRegisteredModelOperator",
    "GetLatestModelVersionsOperator", "CreateModelVersionOperator", "GetModelVersionOperator",
    "DeleteModelVersionOperator", "TransitionModelVersionStageOperator", "ModelLoadAndPredictOperator",
    "CreateDeploymentOperator", "PredictOperator",
}  # fmt: skip


@pytest.fixture(scope="module")
def snippets() -> dict[str, Any]:
    names: dict[str, Any] = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert len(blocks) > 10
    with DAG("migrated", schedule=None):
        for block in blocks:
            exec(compile(block, str(PAGE), "exec"), names)  # noqa: S102 - our own page
    return names


@pytest.fixture
def call(snippets: dict[str, Any], mlflow_server: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    connection = {"conn_type": "mlflow", "extra": {"tracking_uri": mlflow_server}}
    monkeypatch.setenv("AIRFLOW_CONN_MLFLOW_DEFAULT", json.dumps(connection))
    return lambda name, *arguments: snippets[name].function(*arguments)


def test_every_operator_is_in_the_table_and_has_code() -> None:
    text = PAGE.read_text()
    table = {
        name
        for row in re.findall(r"^\| (.*?) \|", text, re.MULTILINE)
        for name in re.findall(r"`(\w+Operator)`", row)
    }
    assert table == THERE
    sections = re.split(r"^## ", text, flags=re.MULTILINE)
    coded = {section.split("\n")[0] for section in sections if "```python" in section}
    assert coded >= THERE


def test_the_snippets_are_tasks(snippets: dict[str, Any]) -> None:
    tasks = {name for name, value in snippets.items() if hasattr(value, "task_id")}
    assert tasks == {
        "train", "evaluate", "register", "new_champion", "promote", "back", "by_hand", "score", "deploy",
    }  # fmt: skip


def test_what_talks_to_mlflow_does(call: Callable[..., Any], mlflow_server: str, tmp_path: Path) -> None:
    call("create_registered_model", "migrated_by_hand")
    assert call("get_registered_model", "migrated_by_hand") == {}
    call("delete_registered_model", "migrated_by_hand")
    with pytest.raises(ModelVersionNotFoundError):
        call("get_registered_model", "migrated_by_hand")


def test_versions_that_the_old_provider_made_are_found(
    call: Callable[..., Any], mlflow_server: str, tmp_path: Path
) -> None:
    runs = Runs(mlflow_server, tmp_path)
    run_id = old_versions(runs, "migrated", 2)
    runs.client.set_registered_model_alias("migrated", "champion", "1")
    assert call("get_registered_model", "migrated") == {"champion": "1"}
    assert call("get_model_version", "migrated", "1") == {"run_id": run_id, "source": f"runs:/{run_id}/model"}
    assert call("get_champion", "migrated") == "1"
    assert call("get_latest", "migrated") == ["2", "1"]
    call("delete_model_version", "migrated", "1")
    assert call("get_latest", "migrated") == ["2"]


def old_versions(runs: Runs, name: str, count: int) -> str:
    """Make versions as MLflow's own client does, without a package."""
    run_id: str = runs.client.create_run(runs.experiment).info.run_id
    runs.client.create_registered_model(name)
    for _ in range(count):
        runs.client.create_model_version(name, f"runs:/{run_id}/model", run_id)
    return run_id


def test_the_first_promotion_by_hand_replaces_nobody(
    snippets: dict[str, Any], mlflow_server: str, tmp_path: Path
) -> None:
    """The task of the page: six versions are the old provider's, one of them is champion in MLflow."""
    runs, by_hand = Runs(mlflow_server, tmp_path), snippets["by_hand"]
    old_versions(runs, by_hand.model_name, 6)
    runs.client.set_registered_model_alias(by_hand.model_name, "champion", "6")
    runs.register(by_hand.model_name, runs.add(), alias=None)
    context = {"ti": SimpleNamespace(dag_id="migrated", run_id="run", task_id="by_hand", map_index=-1)}
    spec = by_hand.build_spec(context)
    with pytest.raises(PromotionConflictError, match=r"the ledger has none; .* give champion_version=None"):
        run_step("promote", spec | {"expected_version": "6"}, runs.services)
    assert run_step("promote", spec, runs.services)["moved"]
    assert Registry.connect(runs.services).aliases(by_hand.model_name) == {"champion": "7"}


def test_scoring_takes_all_rows_whatever_starts_the_dag(snippets: dict[str, Any]) -> None:
    """A run that is started by hand has no data interval."""
    score = snippets["score"]
    now = timezone.utcnow()
    run: dict[str, Any] = {"dag_run": SimpleNamespace(run_after=now), "run_id": "manual"}
    score.render_template_fields(run)
    assert score.build_spec(run)["window"] is None


def test_what_talks_to_the_service_does(
    call: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    digest = build_package(tmp_path / "package")
    connection = {"conn_type": "bentoml", "host": "127.0.0.1", "port": port, "password": "token"}
    monkeypatch.setenv("AIRFLOW_CONN_BENTOML_DEFAULT", json.dumps(connection))
    try:
        endpoint = LocalEndpoint(LocalServer(tmp_path / "serving", port=port, token="token"))
        served = ServedVersion(model_version="1", package_digest=digest)
        deploy_package(endpoint, tmp_path / "package", "m", served)
        assert call("predict", ROWS[:1]) == pytest.approx([2.0], abs=0.6)
    finally:
        LocalServer(tmp_path / "serving", port=port).stop()
