"""What RegisterModelOperator's step costs beside uploading the package: a small one, one of 200 MB, one of a model with 1,000 versions.

Signed, on a real MLflow server.

The package is uploaded as training does it. Then it is registered in the same process, registered once more (nothing is new then), and
once in a fresh process, imports included.
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
from pathlib import Path
from typing import Any

ROUNDS = 5
MANY = 1_000

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
MEASURED = {"value": 1.0, "low": 0.9, "high": 1.1}
EVALUATION = {
    "verdict": "promote",
    "reason": "better",
    "champion_version": None,
    "report": {"metric": "mae", "challenger": MEASURED, "baseline": MEASURED},
}

FRESH = """
import json, sys
from airflow_mlops.services import Services
from airflow_mlops.steps.base import run_step
run_step("register", json.loads(sys.argv[1]), Services.from_environment())
"""


def main() -> None:
    """Print the table."""
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
            print(
                f"{'median of ' + str(ROUNDS):<16}{'upload s':>10}{'register s':>12}{'again s':>10}{'fresh s':>10}"
            )
            for label, (size, versions) in CASES.items():
                model = f"bench_{versions}"
                fill(f"http://127.0.0.1:{port}", model, versions)
                rounds = [measure(f"http://127.0.0.1:{port}", folder, size, model) for _ in range(ROUNDS)]
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


def measure(uri: str, folder: Path, size: int, model: str) -> tuple[float, float, float, float]:
    """Upload a package of fresh random bytes, then register it three times."""
    from mlflow import MlflowClient

    from airflow_mlops.core.codec import from_dict
    from airflow_mlops.core.model.package import PackageManifest
    from airflow_mlops.core.model.signing import SigningKey
    from airflow_mlops.services import Services
    from airflow_mlops.serving.package import hash_files, write_manifest
    from airflow_mlops.steps.base import run_step

    client = MlflowClient(uri)
    run_id = client.create_run("0").info.run_id
    with tempfile.TemporaryDirectory(dir=folder) as package:
        (Path(package) / "model.onnx").write_bytes(os.urandom(size))
        manifest = from_dict(PackageManifest, MANIFEST | {"files": hash_files(package)})
        digest = write_manifest(package, manifest)
        upload = timed(lambda: client.log_artifacts(run_id, package, "package"))
    evaluation = EVALUATION | {"run_id": run_id, "model_name": model}
    spec = {"model_name": model, "run_id": run_id, "package_digest": digest, "evaluation": evaluation}
    key = SigningKey.generate()
    services = Services(tracking_uri=uri, signing_key=key.to_text(), signing_public_keys=key.public_text())
    first = timed(lambda: run_step("register", spec, services))
    again = timed(lambda: run_step("register", spec, services))
    environment = {**os.environ, **services.to_environment()}
    command = [sys.executable, "-W", "ignore", "-c", FRESH, json.dumps(spec)]
    fresh = timed(lambda: subprocess.run(command, env=environment, check=True))
    return upload, first, again, fresh


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
