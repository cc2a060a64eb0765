"""The ML Test Score of a model that was really trained, explained, registered, evaluated and promoted on a real MLflow."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from airflow_mlops.demo import stream
from airflow_mlops.ledger import EntryKind, Ledger, LedgerEntry
from airflow_mlops.services import Services
from airflow_mlops.steps.base import run_step
from airflow_mlops.steps.ml_test_score import attest, score_model

if TYPE_CHECKING:
    from airflow_mlops.core.ml_test.ml_test_score import MLTestScore, TestPoints

pytestmark = pytest.mark.integration

NOW = datetime(2018, 9, 1, tzinfo=UTC)
WINDOW = {"start": "2018-07-01T00:00:00Z", "end": "2018-08-01T00:00:00Z"}
NAME = "scored_fare"

ESTIMATOR = """
from sklearn.linear_model import Ridge


def build(alpha: float = 1.0) -> Ridge:
    return Ridge(alpha=alpha)
"""


class Made:
    """A model made by the steps; what operators write is written here, as by a Dag that is scheduled."""

    def __init__(self, folder: Path, mlflow_url: str) -> None:
        self.services = Services(tracking_uri=mlflow_url, ledger_url=f"sqlite:///{folder / 'ledger.db'}")
        (folder / "landing").mkdir()
        stream.simulate(1, trips_per_month=800).write_parquet(folder / "landing" / "trips.parquet")
        source = {"source": str(folder / "landing" / "*.parquet"), "table": str(folder / "trips")}
        about = {"time_column": stream.TIME, "window": WINDOW, "id_column": stream.ID}
        self.dataset = run_step("ingest", source | about, self.services)["dataset"]

    def run(
        self, step: str, kind: EntryKind | None = None, subject: str | None = None, **spec: Any
    ) -> dict[str, Any]:
        result = run_step(step, spec, self.services)
        if kind is not None:
            entry = LedgerEntry(
                kind=kind,
                key=f"{kind}|{result.get('run_id')}",
                model_name=NAME,
                window=None,
                subject=str(result[subject or "run_id"]),
                summary=str(kind),
                payload=result,
                actor=f"train_and_deploy/scheduled__2018-08-01/{step}",
                recorded_at=NOW - timedelta(days=1),
            )
            with Ledger.open(str(self.services.ledger_url)) as ledger:
                ledger.record(entry)
        return result

    def release(self, estimator: str) -> str:
        trained = self.run(
            "train",
            EntryKind.TRAINING,
            dataset=self.dataset,
            model_name=NAME,
            estimator=estimator,
            target=stream.TARGET,
            numeric=[name for name in stream.FEATURES if name != "rate_code_id"],
            categorical=["rate_code_id"],
            time_column=stream.TIME,
            window=WINDOW,
        )
        about = {"dataset": self.dataset, "model_name": NAME, "run_id": trained["run_id"]}
        rows = {"window": trained["holdout"], "time_column": stream.TIME}
        judged = self.run("evaluate", EntryKind.EVALUATION, **about, **rows)
        self.run("explain", EntryKind.EXPLANATION, **about, **rows, explained_rows=5)
        self.run(
            "register",
            EntryKind.REGISTRATION,
            subject="model_version",
            model_name=NAME,
            run_id=trained["run_id"],
            package_digest=trained["package_digest"],
            model_id=trained["model_id"],
        )
        self.run(
            "promote",
            model_name=NAME,
            model_version="1",
            verdict=judged["verdict"],
            reason=judged["reason"],
            evaluated_run_id=trained["run_id"],
            actor="train_and_deploy/scheduled__2018-08-01/promote",
            now=(NOW - timedelta(days=1)).isoformat(),
        )
        return str(trained["run_id"])

    def score(self, services: Services | None = None) -> tuple[MLTestScore, dict[str, TestPoints]]:
        score = score_model(NAME, services or self.services, now=NOW)
        return score, {one.test_id: one for one in score.tests}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A git checkout with the code of a model, and nothing that is not in it."""
    folder = tmp_path_factory.mktemp("checkout")
    (folder / "scored_model.py").write_text(ESTIMATOR)
    git = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@example.org"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "a model"]):
        subprocess.run([*git, *command], check=True, timeout=30)
    return folder


def test_a_released_model_is_scored_by_what_the_ledger_and_mlflow_hold(
    mlflow_server: str, checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(checkout)
    made = Made(tmp_path, mlflow_server)
    run_id = made.release("scored_model.build")
    score, told = made.score()
    assert score.model_version == "1"
    whole = {"data-2", "model-5", "infra-4", "infra-5", "monitor-6"}
    assert {name for name, one in told.items() if one.points == 1.0} == whole
    assert {name for name, one in told.items() if one.points == 0.5} == {"model-1", "monitor-5"}
    assert score.parts == {"data": 1.0, "model": 1.5, "infra": 2.0, "monitor": 1.5}
    assert (score.score, score.interpretation.startswith("not totally untested")) == (1.0, True)
    sources = [one.source for one in told["data-2"].evidence]
    assert sources[1] == f"MLflow run {run_id}, explanation/importance.json"
    assert "features are worth something" in told["data-2"].sentence
    assert "5 rows, each with what every input did" in told["infra-5"].sentence
    assert told["model-1"].sentence.endswith("without changes; whether anybody reviewed it is not known")

    attest(
        NAME,
        made.services,
        test_id="model-1",
        by="Anna",
        evidence="https://git.example/rules",
        automated=True,
        now=NOW,
    )
    assert made.score()[1]["model-1"].points == 1.0

    # Without MLflow the ledger's word is half, and it is said why.
    for services, why in (
        (replace(made.services, tracking_uri=None), "set AIRFLOW_MLOPS_TRACKING_URI"),
        (replace(made.services, tracking_uri="http://127.0.0.1:9"), "MLflow could not be asked"),
    ):
        _, without = made.score(services)
        assert {name: without[name].points for name in ("data-2", "infra-5", "model-1")} == {
            "data-2": 0.5,
            "infra-5": 0.5,
            "model-1": 0.0,
        }
        assert why in without["data-2"].sentence
        assert without["infra-4"].points == 1.0
