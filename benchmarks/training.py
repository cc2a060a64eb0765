"""What TrainModelOperator's step costs over the bare fit: 1,000,000 rows of 20 columns, beside the same work by hand.

By hand: read Parquet, fit the same estimator, score the newest fifth, log parameters, metric and the model to the same MLflow server
with its requirements given. Each runs in a fresh process, in turn; wall and CPU seconds and peak memory of each.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

ROWS, COLUMNS, ROUNDS = 1_000_000, 20, 3

DATA = f"""
import sys
from datetime import UTC, datetime, timedelta
import numpy as np, polars as pl
from airflow_mlops.integrations import delta
rng = np.random.default_rng(0)
x = rng.normal(size=({ROWS}, {COLUMNS})).astype("float32")
frame = pl.DataFrame({{f"x{{i}}": x[:, i] for i in range({COLUMNS})}}).with_columns(
    y=pl.Series(x[:, 0] * 2 + np.sin(x[:, 1]) + rng.normal(scale=0.1, size={ROWS})),
    t=pl.datetime_range(datetime(2024, 1, 1, tzinfo=UTC), datetime(2024, 1, 1, tzinfo=UTC) + timedelta(seconds={ROWS} - 1), "1s", eager=True),
)
frame.write_parquet(sys.argv[1] + "/rows.parquet")
delta.replace_window(sys.argv[1] + "/table", frame, time_column="t", window=None)
"""

COST = """
usage = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps([time.monotonic() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, fit_seconds]))
"""

BY_HAND = """
import json, resource, sys, time
started = time.monotonic()
import mlflow, pandas as pd
from mlflow.models import infer_signature
from sklearn.ensemble import HistGradientBoostingRegressor
from sklearn.metrics import mean_absolute_error
folder, uri, number = sys.argv[1:]
mlflow.set_tracking_uri(uri)
mlflow.set_experiment("by_hand")
frame = pd.read_parquet(folder + "/rows.parquet").sort_values("t")
cut = int(len(frame) * 0.8)
features = [name for name in frame if name.startswith("x")]
with mlflow.start_run():
    model = HistGradientBoostingRegressor(max_iter=100, random_state=int(number))
    begun = time.monotonic()
    model.fit(frame[features][:cut], frame["y"][:cut])
    fit_seconds = time.monotonic() - begun
    predicted = model.predict(frame[features][cut:])
    mlflow.log_params(model.get_params())
    mlflow.log_metric("mae", mean_absolute_error(frame["y"][cut:], predicted))
    mlflow.sklearn.log_model(model, name="model", signature=infer_signature(frame[features][cut:], predicted),
        pip_requirements=["scikit-learn"], skops_trusted_types=["sklearn.ensemble._hist_gradient_boosting.predictor.TreePredictor"])
"""

OURS = f"""
import json, resource, sys, time
started = time.monotonic()
from airflow_mlops.services import Services
from airflow_mlops.steps.base import run_step
folder, uri, number = sys.argv[1:]
told = run_step("train", {{
    "dataset": folder + "/table", "model_name": "bench", "estimator": "sklearn.ensemble.HistGradientBoostingRegressor",
    "estimator_params": {{"max_iter": 100}}, "seed": int(number), "target": "y", "time_column": "t",
    "numeric": [f"x{{i}}" for i in range({COLUMNS})],
}}, Services(tracking_uri=uri))
from mlflow import MlflowClient
metrics = MlflowClient(uri).get_run(told["run_id"]).data.metrics
fit_seconds = metrics["fit_seconds"]
print({{name: round(value, 2) for name, value in metrics.items() if name.endswith("_seconds")}}, told["serving_reason"], file=sys.stderr)
"""


def main() -> None:
    """Print the table."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-c", DATA, folder], check=True, env=environment)
        port = "25871"
        command = [
            sys.executable,
            "-m",
            "mlflow",
            "server",
            "--host",
            "127.0.0.1",
            "--port",
            port,
            "--workers",
            "1",
        ]
        command += [
            "--backend-store-uri",
            f"sqlite:///{folder}/mlflow.db",
            "--artifacts-destination",
            f"{folder}/artifacts",
        ]
        with Path(folder, "log").open("w") as log:
            server = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        try:
            wait_for(f"http://127.0.0.1:{port}/health")
            rounds: dict[str, list[list[float]]] = {"by hand": [], "train step": []}
            for number in range(ROUNDS):
                for name, code in (("by hand", BY_HAND), ("train step", OURS)):
                    rounds[name].append(
                        measure(code, folder, f"http://127.0.0.1:{port}", str(number), environment)
                    )
        finally:
            server.terminate()
            server.wait()
    medians = {
        name: [statistics.median(values) for values in zip(*many, strict=True)]
        for name, many in rounds.items()
    }
    print(f"{ROWS:,} rows x {COLUMNS} columns, median of {ROUNDS}")
    print(f"{'':<14}{'wall s':>8}{'CPU s':>8}{'peak MB':>9}{'fit s':>8}")
    for name, (wall, cpu, memory, fit) in medians.items():
        print(f"{name:<14}{wall:>8.1f}{cpu:>8.1f}{memory:>9.0f}{fit:>8.1f}")
    (hand, hand_cpu, *_), (ours, ours_cpu, *_) = medians["by hand"], medians["train step"]
    print(
        f"overhead: {ours - hand:+.1f} s wall ({ours / hand - 1:+.0%}), {ours_cpu - hand_cpu:+.1f} s CPU ({ours_cpu / hand_cpu - 1:+.0%})"
    )


def measure(code: str, folder: str, uri: str, number: str, environment: dict[str, str]) -> list[float]:
    """Run in a fresh process; it prints its own cost last."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code + COST, folder, uri, number],
        env=environment, stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    cost: list[float] = json.loads(done.stdout.splitlines()[-1])
    return cost


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
