"""What RegisterModelOperator's step costs beside uploading the package: a small one, one of 200 MB, one of a model with 1,000 versions.

Signed, on a real MLflow server, with a ledger, a champion to compare parameters with, and the result of a real evaluation.

The package is uploaded as training does it. Then it is registered in the same process ("register s": the number that answers the target, at
most 1 s beyond the upload), registered once more (nothing is new then), and once in a fresh process, imports included. An argument sets the
rounds, and a second one the many versions, for a look whether it runs.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from airflow_mlops.services import Services

ROUNDS = int(sys.argv[1]) if len(sys.argv) > 1 else 5
MANY = int(sys.argv[2]) if len(sys.argv) > 2 else 1_000

#: Of the table that the evaluated models learn from.
ROWS = 4_000

#: Bytes of the package, and how many versions the model has before.
CASES = {"small": (20_000, 0), "200 MB": (200_000_000, 0), f"{MANY:,} versions": (20_000, MANY)}

MANIFEST: dict[str, Any] = {
    "task": "regression",
    "signature": {"inputs": [{"name": f"x{i}", "type": "number"} for i in range(20)], "output": "y"},
    "serving_form": "onnx",
    "serving_reason": "for a measurement",
    "model_file": "model.onnx",
    "target": "y",
    "known_rows": [{f"x{i}": 1.0 for i in range(20)}],
    "known_predictions": [1.0],
    "trained_on": {
        "dataset_digest": "sha256:0",
        "dataset_uri": "memory",
        "dataset_version": 0,
        "rows": 1,
        "simple_prediction": 0.0,
    },
    "holdout": {"metric": "mae", "value": 0.1, "row_count": 1},
}
FRESH = """
import json, sys
from airflow_mlops.services import Services
from airflow_mlops.steps.base import run_step
run_step("register", json.loads(sys.argv[1]), Services.from_environment())
"""


def main() -> None:
    """Print the table."""
    from airflow_mlops.core.model.signing import SigningKey
    from airflow_mlops.services import Services

    os.environ.update({"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false"})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
        command += ["--artifacts-destination", f"{folder}/artifacts"]
        with (folder / "log").open("w") as log:
            server = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            wait_for(f"http://127.0.0.1:{port}/health")
            key = SigningKey.generate()
            services = Services(
                tracking_uri=f"http://127.0.0.1:{port}",
                ledger_url=f"sqlite:///{folder}/ledger.db",
                signing_key=key.to_text(),
                signing_public_keys=key.public_text(),
            )
            evaluation = evaluated(services, folder)
            print(
                f"{'median of ' + str(ROUNDS):<16}{'upload s':>10}{'register s':>12}{'again s':>10}{'fresh s':>10}"
            )
            for label, (size, versions) in CASES.items():
                model = f"bench_{size}_{versions}"
                fill(str(services.tracking_uri), model, versions)
                champion, _ = upload(services, folder, 20_000, model, evaluation["run_id"])
                crown(services, champion)
                rounds = [measure(services, folder, size, model, evaluation) for _ in range(ROUNDS)]
                medians = [statistics.median(values) for values in zip(*rounds, strict=True)]
                print(
                    f"{label:<16}{medians[0]:>10.2f}{medians[1]:>12.2f}{medians[2]:>10.2f}{medians[3]:>10.2f}"
                )
        finally:
            server.terminate()
            server.wait()


def fill(uri: str, model: str, versions: int) -> None:
    """Give a model versions with tags and a description as long as those of a registration."""
    from mlflow import MlflowClient

    if not versions:
        return
    client = MlflowClient(uri)
    client.create_registered_model(model)
    run_id = client.create_run("0").info.run_id
    tags = {f"airflow_mlops.metric.m{number}": "x" * 100 for number in range(20)}
    for number in range(versions):
        digest = {"airflow_mlops.package_digest": f"sha256:{number}", "airflow_mlops.run_id": run_id}
        client.create_model_version(
            model, f"runs:/{run_id}/package", run_id, tags=tags | digest, description="d" * 5000
        )


def evaluated(services: Services, folder: Path) -> dict[str, Any]:
    """Train two models and evaluate the second against the first: the result, as a registration is given it."""
    import numpy as np
    import polars as pl

    from airflow_mlops.integrations import delta
    from airflow_mlops.steps.base import run_step

    rng = np.random.default_rng(0)
    values = rng.normal(size=(ROWS, 20))
    columns = {f"x{number}": values[:, number] for number in range(20)}
    start = datetime(2026, 1, 1, tzinfo=UTC)
    times = [start + timedelta(minutes=row) for row in range(ROWS)]
    target = values[:, 0] + 0.5 * values[:, 1] + rng.normal(scale=0.5, size=ROWS)
    table = str(folder / "table")
    delta.replace_window(
        table, pl.DataFrame({"t": times, **columns, "y": target}), time_column="t", window=None
    )
    trainings = [
        run_step(
            "train",
            {
                "dataset": table,
                "model_name": "evaluated",
                "estimator": "sklearn.linear_model.Ridge",
                "target": "y",
                "numeric": names,
                "time_column": "t",
            },
            services,
        )
        for names in (list(columns)[10:], list(columns))  # the target follows the first two
    ]
    crown(services, trainings[0])
    challenger = trainings[1]
    asked = {name: challenger[name] for name in ("dataset", "model_name", "run_id", "package_digest")}
    asked |= {"window": challenger["holdout"], "time_column": "t", "metric": challenger["metric"]}
    return run_step("evaluate", asked, services)


def crown(services: Services, training: dict[str, Any]) -> None:
    """Register a model and make it the first champion."""
    from airflow_mlops.steps.base import run_step

    spec = {name: training[name] for name in ("model_name", "run_id", "package_digest")}
    version = run_step("register", spec | {"vouched_by": "benchmark"}, services)["model_version"]
    promotion = {"model_name": training["model_name"], "model_version": version, "actor": "benchmark"}
    run_step("promote", promotion, services)


def upload(
    services: Services, folder: Path, size: int, model: str, like: str
) -> tuple[dict[str, Any], float]:
    """Make a run with a package of fresh random bytes, as training does; give it, and the seconds the upload took.

    :param like: the run whose parameters it has.
    """
    from mlflow import MlflowClient
    from mlflow.entities import Param

    from airflow_mlops.core.codec import from_dict
    from airflow_mlops.core.model.package import PackageManifest
    from airflow_mlops.serving.package import hash_files, write_manifest
    from airflow_mlops.steps.registry.provenance import note_package

    client = MlflowClient(services.tracking_uri)
    run_id = client.create_run("0").info.run_id
    given = client.get_run(like).data.params
    client.log_batch(run_id, params=[Param(name, value) for name, value in given.items()])
    with tempfile.TemporaryDirectory(dir=folder) as package:
        (Path(package) / "model.onnx").write_bytes(os.urandom(size))
        manifest = from_dict(PackageManifest, MANIFEST | {"files": hash_files(package)})
        digest = write_manifest(package, manifest)
        seconds = timed(lambda: client.log_artifacts(run_id, package, "package"))
    training = {"model_name": model, "run_id": run_id, "package_digest": digest}
    note_package(services, step_key=run_id, training=training)
    return training, seconds


def measure(
    services: Services, folder: Path, size: int, model: str, evaluation: dict[str, Any]
) -> tuple[float, float, float, float]:
    """Upload a package, then register it three times."""
    from airflow_mlops.steps.base import run_step

    training, uploaded = upload(services, folder, size, model, evaluation["run_id"])
    spec = {**training, "evaluation": evaluation | {"run_id": training["run_id"], "model_name": model}}
    first = timed(lambda: run_step("register", spec, services))
    again = timed(lambda: run_step("register", spec, services))
    environment = {**os.environ, **services.to_environment()}
    command = [sys.executable, "-W", "ignore", "-c", FRESH, json.dumps(spec)]
    fresh = timed(lambda: subprocess.run(command, env=environment, check=True))
    return uploaded, first, again, fresh


def timed(work: Any) -> float:
    """Give the seconds some work takes."""
    started = time.monotonic()
    work()
    return time.monotonic() - started


def wait_for(url: str) -> None:
    """Wait until a server answers."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            urllib.request.urlopen(url, timeout=2).close()  # noqa: S310 - our own server
        except OSError:
            time.sleep(0.2)
        else:
            return
    raise TimeoutError(url)


if __name__ == "__main__":
    main()
