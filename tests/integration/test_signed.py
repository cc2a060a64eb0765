"""Signed models on real servers: only what a trusted key vouched for is promoted, evaluated against, scored with or served."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from mlflow import MlflowClient

from airflow_mlops.core.codec import canonical_json
from airflow_mlops.core.model.package import file_digest, package_digest
from airflow_mlops.core.model.signing import SigningKey
from airflow_mlops.demo import stream
from airflow_mlops.exceptions import ArtifactIntegrityError, ConnectionConfigError, PromotionRejectedError
from airflow_mlops.integrations.bentoml import LocalServer
from airflow_mlops.integrations.mlflow import PACKAGE_DIGEST_TAG, RUN_ID_TAG, SIGNATURE_TAG, Registry
from airflow_mlops.services import Services
from airflow_mlops.steps.base import run_step

pytestmark = pytest.mark.integration

KEY, OTHER = SigningKey.generate(), SigningKey.generate()
WINDOW = {"start": "2018-07-01T00:00:00Z", "end": "2018-08-01T00:00:00Z"}
ACTOR = {"actor": "test", "now": "2018-09-01T00:00:00Z"}


class Models:
    """One training, registered as ``signed``, as ``unsigned`` and as ``tampered``; each is champion."""

    def __init__(self, folder: Path, mlflow_url: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.folder = folder
        self.open = Services(
            tracking_uri=mlflow_url,
            ledger_url=f"sqlite:///{folder / 'ledger.db'}",
            endpoint_url=f"http://127.0.0.1:{self.port}",
        )
        stream.simulate(1, trips_per_month=600).write_parquet(folder / "trips.parquet")
        self.table = str(folder / "trips")
        run_step(
            "ingest",
            {
                "source": str(folder / "trips.parquet"),
                "table": self.table,
                "time_column": stream.TIME,
                "window": WINDOW,
                "id_column": stream.ID,
            },
            self.open,
        )
        self.training = self.train("signing", 5)

    def train(self, model_name: str, iterations: int, services: Services | None = None) -> dict[str, Any]:
        spec = {
            "dataset": self.table,
            "model_name": model_name,
            "estimator": "sklearn.ensemble.HistGradientBoostingRegressor",
            "estimator_params": {"max_iter": iterations},
            "target": stream.TARGET,
            "numeric": [name for name in stream.FEATURES if name != "rate_code_id"],
            "categorical": ["rate_code_id"],
            "time_column": stream.TIME,
            "window": WINDOW,
        }
        return run_step("train", spec, services or self.open)

    def services(self, *trusted: SigningKey, sign: SigningKey | None = None) -> Services:
        keys = " ".join(key.public_text() for key in trusted) or None
        return replace(self.open, signing_public_keys=keys, signing_key=sign.to_text() if sign else None)

    def register(
        self, name: str, services: Services, training: dict[str, Any] | None = None, **more: Any
    ) -> dict[str, Any]:
        training = training or self.training
        spec = {"run_id": training["run_id"], "package_digest": training["package_digest"]} | more
        return run_step("register", {"model_name": name, **spec}, services)

    def promote(self, name: str, services: Services, version: str = "1") -> None:
        run_step("promote", {"model_name": name, "model_version": version, **ACTOR}, services)

    def score(self, name: str, services: Services, **more: Any) -> dict[str, Any]:
        spec = {
            "dataset": self.table,
            "table": str(self.folder / f"predictions_{name}"),
            "model_name": name,
            "id_column": stream.ID,
            "time_column": stream.TIME,
            "window": WINDOW,
        }
        return run_step("score", spec | more, services)

    def evaluate(self, name: str, services: Services, **more: Any) -> dict[str, Any]:
        spec = {
            "dataset": self.table,
            "model_name": name,
            "run_id": self.training["run_id"],
            "package_digest": self.training["package_digest"],
            "window": self.training["holdout"],
            "time_column": stream.TIME,
        }
        return run_step("evaluate", spec | more, services)

    def use(self, step: str, name: str, services: Services) -> dict[str, Any]:
        if step == "score":
            return self.score(name, services)
        if step == "evaluate":
            return self.evaluate(name, services)
        serving = replace(services, serving_dir=str(self.folder / f"serving_{name}"))
        return run_step(step, {"model_name": name}, serving)


@pytest.fixture(scope="module")
def models(mlflow_server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Models]:
    made = Models(tmp_path_factory.mktemp("signed"), mlflow_server)
    signed = made.register("signed", made.services(KEY, sign=KEY))
    assert signed["signed_by"]
    assert made.register("unsigned", made.open)["signed_by"] is None
    for name in ("signed", "unsigned"):
        made.promote(name, made.open)
    try:
        yield made
    finally:
        LocalServer(made.folder / "serving_signed", port=made.port).stop()


USES = ["evaluate", "score", "deploy"]


@pytest.mark.parametrize("step", USES)
class TestUse:
    def test_what_a_trusted_key_signed(self, models: Models, step: str) -> None:
        assert models.use(step, "signed", models.services(OTHER, KEY))

    def test_what_nobody_signed(self, models: Models, step: str) -> None:
        with pytest.raises(ArtifactIntegrityError, match="is not signed as a version of 'unsigned'"):
            models.use(step, "unsigned", models.services(KEY))

    def test_what_somebody_else_signed(self, models: Models, step: str) -> None:
        with pytest.raises(ArtifactIntegrityError, match=r"is signed with key .* which is not trusted here"):
            models.use(step, "signed", models.services(OTHER))


def test_without_keys_digests_are_all_that_is_asked_for(models: Models) -> None:
    assert models.score("unsigned", models.open)["row_count"] > 100


def test_only_signed_versions_become_champion(models: Models) -> None:
    trusting = models.services(KEY)
    with pytest.raises(ArtifactIntegrityError, match="unsigned version 1 is not signed as a version"):
        models.promote("unsigned", trusting)
    models.promote("signed", trusting)
    with pytest.raises(ArtifactIntegrityError, match="not trusted here"):
        run_step("roll-back", {"model_name": "signed", "model_version": "1", **ACTOR}, models.services(OTHER))


def test_a_challenger_is_vouched_for_by_its_training(models: Models) -> None:
    with pytest.raises(ArtifactIntegrityError, match="give package_digest"):
        models.evaluate("signed", models.services(KEY), package_digest=None)
    with pytest.raises(ArtifactIntegrityError, match="not the package that was registered"):
        models.evaluate("signed", models.services(KEY), package_digest="sha256:" + "0" * 64)


def test_who_can_only_verify_registers_nothing(models: Models) -> None:
    with pytest.raises(ConnectionConfigError, match="holds public keys only"):
        models.register("verifier", models.services(KEY))
    assert Registry.connect(models.open).find_alias("verifier", "challenger") is None


def test_registering_again_with_a_key_signs_what_was_unsigned(models: Models) -> None:
    first = models.register("later", models.open)
    again = models.register("later", models.services(KEY, sign=KEY))
    assert (again["model_version"], first["signed_by"]) == (first["model_version"], None)
    models.promote("later", models.services(KEY))
    assert models.score("later", models.services(KEY))["row_count"] > 100
    replaced = models.register("later", models.services(OTHER, KEY, sign=OTHER))  # the key was changed
    assert replaced["signed_by"] != again["signed_by"]


def test_a_signature_of_one_model_does_not_do_for_another(models: Models) -> None:
    client = MlflowClient(models.open.tracking_uri)
    models.register("stolen", models.open)
    client.set_model_version_tag(
        "stolen", "1", SIGNATURE_TAG, client.get_model_version("signed", "1").tags[SIGNATURE_TAG]
    )
    models.promote("stolen", models.open)
    with pytest.raises(ArtifactIntegrityError, match="carries a signature for 'signed'"):
        models.score("stolen", models.services(KEY))
    client.set_model_version_tag("stolen", "1", SIGNATURE_TAG, "{")
    with pytest.raises(ArtifactIntegrityError, match="of stolen version 1 is no signature"):
        models.promote("stolen", models.services(KEY))


def test_who_may_write_to_mlflow_can_not_replace_a_model(models: Models, tmp_path: Path) -> None:
    """First the model file, then the manifest as well, then the tag as well: the signature is what can't be made."""
    training = models.train("tampered", 3)
    trusting = models.services(KEY, sign=KEY)
    models.register("tampered", trusting, training)
    models.promote("tampered", trusting)
    client = MlflowClient(models.open.tracking_uri)
    package = Path(client.download_artifacts(training["run_id"], "package", str(tmp_path)))
    other = Path(client.download_artifacts(models.training["run_id"], "package", str(tmp_path / "other")))

    (package / "model.onnx").write_bytes((other / "model.onnx").read_bytes())
    client.log_artifacts(training["run_id"], str(package), "package")
    with pytest.raises(ArtifactIntegrityError, match=r"model\.onnx was changed after packaging"):
        models.score("tampered", models.open)

    manifest = json.loads((package / "package.json").read_text())
    manifest["files"]["model.onnx"] = file_digest((package / "model.onnx").read_bytes())
    manifest["known_predictions"] = json.loads((other / "package.json").read_text())["known_predictions"]
    (package / "package.json").write_text(json.dumps(manifest))
    client.log_artifacts(training["run_id"], str(package), "package")
    with pytest.raises(ArtifactIntegrityError, match="not the package that was registered"):
        models.score("tampered", models.open)

    digest = package_digest((package / "package.json").read_bytes())
    client.set_model_version_tag("tampered", "1", PACKAGE_DIGEST_TAG, digest)
    with pytest.raises(
        ArtifactIntegrityError, match="its tag was changed"
    ):  # the ledger knows the champion's
        models.score("tampered", models.open)
    by_number = {"model_version": "1"}
    assert (
        models.score("tampered", models.open, **by_number)["row_count"] > 100
    )  # digests alone are satisfied
    with pytest.raises(ArtifactIntegrityError, match="carries a signature for 'tampered'"):
        models.score("tampered", trusting, **by_number)


class TestForged:
    """Somebody who may write to MLflow makes a run that looks like a finished training, with a package of their own."""

    def forge(self, models: Models, honest: dict[str, Any], folder: Path) -> dict[str, Any]:
        client = MlflowClient(models.open.tracking_uri)
        original = client.get_run(honest["run_id"])
        tags = {
            "airflow_mlops.step_key": original.data.tags["airflow_mlops.step_key"],
            PACKAGE_DIGEST_TAG: models.training["package_digest"],
        }
        run_id = client.create_run(original.info.experiment_id, tags=tags).info.run_id
        package = client.download_artifacts(models.training["run_id"], "package", str(folder))
        client.log_artifacts(run_id, package, "package")
        forged = honest | {"run_id": run_id, "package_digest": models.training["package_digest"]}
        client.log_text(run_id, canonical_json(forged), "training/result.json")
        digest = file_digest(canonical_json(forged).encode())
        client.set_tag(run_id, "airflow_mlops.result_digest", digest)
        client.set_terminated(run_id)
        return forged

    def test_it_is_not_taken_for_the_training_and_not_signed(self, models: Models, tmp_path: Path) -> None:
        signing = models.services(KEY, sign=KEY)
        honest = models.train("forged", 4, models.services(KEY))
        forged = self.forge(models, honest, tmp_path)
        assert (
            models.train("forged", 4)["run_id"] == forged["run_id"]
        )  # without keys nobody vouches for anything
        again = models.train("forged", 4, models.services(KEY))
        assert (again["run_id"], again["reused"]) == (honest["run_id"], True)
        with pytest.raises(ArtifactIntegrityError, match="is not known to have made any package here"):
            models.register("forged", signing, forged)
        assert models.register("forged", signing, forged, vouched_by="anna")["vouched_by"] == "anna"
        claimed = honest | {"package_digest": forged["package_digest"]}
        with pytest.raises(ArtifactIntegrityError, match=f"made package {honest['package_digest']}"):
            models.register("forged", signing, claimed, vouched_by="anna")
        assert models.register("forged", signing, honest)["vouched_by"] is None

    def test_a_run_that_was_taken_from_mlflow_is_made_again(self, models: Models) -> None:
        trusting = models.services(KEY)
        first = models.train("deleted", 4, trusting)
        MlflowClient(models.open.tracking_uri).delete_run(first["run_id"])
        second = models.train("deleted", 4, trusting)
        assert (second["reused"], second["package_digest"]) == (False, first["package_digest"])
        assert models.train("deleted", 4, trusting)["run_id"] == second["run_id"]

    def test_without_a_ledger_it_is_trained_again(self, models: Models) -> None:
        first = models.train("unledgered", 4)
        again = models.train("unledgered", 4, replace(models.services(KEY), ledger_url=None))
        assert (again["reused"], again["package_digest"]) == (False, first["package_digest"])

    def test_an_evaluation_of_another_package_promotes_nothing(self, models: Models) -> None:
        """The evaluated run is made to look as if it held the package of a version that was signed long ago."""
        trusting = models.services(KEY, sign=KEY)
        good = models.train("swapped", 4, models.services(KEY))
        for training in (models.training, good):
            models.register("swapped", trusting, training)
        client = MlflowClient(models.open.tracking_uri)
        client.set_tag(good["run_id"], PACKAGE_DIGEST_TAG, models.training["package_digest"])
        evaluated = {"verdict": "promote", "evaluated_run_id": good["run_id"]}
        asked = {"model_name": "swapped", "model_version": "1", **evaluated, **ACTOR}
        for run_id in (models.training["run_id"], good["run_id"]):
            client.set_model_version_tag("swapped", "1", RUN_ID_TAG, run_id)
            with pytest.raises(PromotionRejectedError, match="holds another package"):
                run_step("promote", asked, models.services(KEY))
        assert run_step("promote", asked | {"model_version": "2"}, models.services(KEY))["moved"]


def test_the_service_itself_asks_for_the_signature(models: Models) -> None:
    """Somebody who may write to the serving folder does not go through the deployment."""
    models.use("deploy", "signed", models.services(KEY))
    folder = models.folder / "serving_signed"
    LocalServer(folder, port=models.port).stop()
    server = LocalServer(folder, port=models.port, public_keys=OTHER.public_text())
    server.start()
    try:
        status = _status(f"{server.url}/status")
    finally:
        server.stop()
    assert not status["ready"]
    assert "which is not trusted here" in status["error"]


def _status(url: str) -> dict[str, Any]:
    deadline = time.monotonic() + 60
    while True:
        try:
            answer = httpx.get(url, timeout=2)
            return dict(answer.json())
        except (httpx.HTTPError, ValueError):
            assert time.monotonic() < deadline
            time.sleep(0.2)


def test_a_key_made_by_the_command_signs(models: Models, tmp_path: Path) -> None:
    made = subprocess.run(
        [sys.executable, "-m", "airflow_mlops.cli", "signing-key"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout
    private = made.splitlines()[0].rsplit(": ", 1)[1]
    key = SigningKey.parse(private)
    assert models.register("by_command", models.services(key, sign=key))["signed_by"] in made
